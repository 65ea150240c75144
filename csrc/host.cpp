// What the library offers beside its ops, as plain C functions for ctypes (sslfast/ops/_core.py): facts about the
// build, and computations without tensors. Neither needs a header of Python, so that one library serves every Python.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <vector>

#include "permutations.h"

#define SSLFAST_EXPORT extern "C" __attribute__((visibility("default")))

// Lines of "name=value", in UTF-8.
SSLFAST_EXPORT const char* sslfast_build_info() {
  return "version=" SSLFAST_VERSION "\nnote=" SSLFAST_BUILD_NOTE "\ncuda_architectures=" SSLFAST_CUDA_ARCHS
         "\ncompiler=g++ " __VERSION__;
}

// Fills rows [count, cells]; arguments as permutations.h asks. Returns 0, or 1 where memory is short.
SSLFAST_EXPORT int sslfast_max_hamming_permutations(int64_t count, int64_t cells, int64_t seed, uint8_t* rows) {
  try {
    const std::vector<uint8_t> found = sslfast::max_hamming_permutations(count, cells, seed);
    std::copy(found.begin(), found.end(), rows);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
