// rotate90: checks.
#pragma once

#include "common/check.h"
#include "common/element.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Counter-clockwise quarter turns 0..3; two's complement makes this right for negative numbers too.
SSLFAST_HD int turns_mod_4(int64_t quarter_turns) {
  return static_cast<int>(quarter_turns & 3);
}

inline void check_rotate90(const Tensor& images,           // [N, C, S, S]
                           const Tensor& quarter_turns) {  // [N] int64
  constexpr const char* op = "rotate90";
  SSLFAST_CHECK(images.dim() == 4, op, ": images must have shape [N, C, H, W], got ", shape_string(images));
  check_element(op, images);
  SSLFAST_CHECK(images.size(2) == images.size(3), op, ": images must be square (H == W), got ", shape_string(images),
                "; crop them first");
  check_index(op, "quarter_turns", quarter_turns);
  SSLFAST_CHECK(quarter_turns.size(0) == images.size(0), op, ": quarter_turns must have shape [N] = [", images.size(0),
                "], got ", shape_string(quarter_turns), "; images are ", shape_string(images));
  check_same_device(op, "quarter_turns", quarter_turns, "images", images);
}

}  // namespace sslfast
