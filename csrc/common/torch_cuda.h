// Functions of libtorch_cuda.so, to which the binary has no link: it also loads beside a CPU build of torch.
#pragma once

#include <dlfcn.h>

namespace sslfast {

// Null in a CPU build of torch. `import torch` has loaded the library, but where no weak symbol of ours would find it.
inline void* torch_cuda_symbol(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace sslfast
