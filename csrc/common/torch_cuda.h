// Looks up functions of libtorch_cuda.so at run time. The binary does not link it and also loads with a CPU build of
// torch.
#pragma once

#include <dlfcn.h>

namespace sslfast {

// Null in a CPU build of torch. `import torch` loads the library with local visibility, where a weak symbol would not
// resolve to it.
inline void* torch_cuda_symbol(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

}  // namespace sslfast
