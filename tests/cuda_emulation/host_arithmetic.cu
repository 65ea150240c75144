// Host arithmetic of csrc that the ops do not return, for tests.
#include "common/launch.cuh"
#include "common/waves.h"

extern "C" __attribute__((visibility("default"))) int64_t whole_wave_parts(int64_t blocks, int64_t steps, int64_t slots,
                                                                           int64_t fixed_steps, int64_t max_parts) {
  return sslfast::whole_wave_parts(blocks, steps, slots, fixed_steps, max_parts);
}
