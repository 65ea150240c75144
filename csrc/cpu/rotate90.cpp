#include "rotate90.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/element.h"

namespace sslfast {
namespace {

constexpr int64_t kTile = 32;        // 32 x 32 elements of two planes fit the first-level cache
constexpr int64_t kGrain = 1 << 16;  // bytes that one thread takes at least

// out[i, j] = in[j, S-1-i] (one turn) or in[S-1-j, i] (three turns), tile by tile so that the columns that are read
// stay in the cache until all of each line is used.
template <bool kThree, typename T>
void rotate_odd(const T* __restrict__ in, T* __restrict__ out, int64_t side) {
  for (int64_t i0 = 0; i0 < side; i0 += kTile) {
    const int64_t i1 = std::min(i0 + kTile, side);
    for (int64_t j0 = 0; j0 < side; j0 += kTile) {
      const int64_t j1 = std::min(j0 + kTile, side);
      for (int64_t i = i0; i < i1; ++i) {
        T* row = out + i * side;
        if (kThree) {
          for (int64_t j = j0; j < j1; ++j) row[j] = in[(side - 1 - j) * side + i];
        } else {
          for (int64_t j = j0; j < j1; ++j) row[j] = in[j * side + side - 1 - i];
        }
      }
    }
  }
}

template <typename T>
void rotate_plane(const T* __restrict__ in,  // [S, S]
                  T* __restrict__ out,       // [S, S]
                  int64_t side, int turns) {
  const int64_t count = side * side;
  switch (turns) {
    case 0:
      std::memcpy(out, in, count * sizeof(T));
      break;
    case 1:
      rotate_odd<false>(in, out, side);
      break;
    case 2:
      for (int64_t i = 0; i < count; ++i) out[i] = in[count - 1 - i];
      break;
    default:
      rotate_odd<true>(in, out, side);
  }
}

Tensor rotate90_cpu(const Tensor& images_,           // [N, C, S, S]
                    const Tensor& quarter_turns_) {  // [N] int64
  check_rotate90(images_, quarter_turns_);
  const Tensor images = torch::stable::contiguous(images_);
  const Tensor quarter_turns = torch::stable::contiguous(quarter_turns_);
  const int64_t channels = images.size(1), side = images.size(2);
  Tensor rotated = torch::stable::new_empty(images, {images.size(0), channels, side, side});
  if (images.numel() == 0) return rotated;
  const int64_t* turns = static_cast<const int64_t*>(quarter_turns.const_data_ptr());
  SSLFAST_DISPATCH_ELEMENT(images, [&] {
    const element_t* in = static_cast<const element_t*>(images.const_data_ptr());
    element_t* out = static_cast<element_t*>(rotated.mutable_data_ptr());
    const int64_t plane = side * side;
    const int64_t grain = std::max<int64_t>(1, kGrain / static_cast<int64_t>(plane * sizeof(element_t)));
    torch::stable::parallel_for(0, images.size(0) * channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        rotate_plane(in + p * plane, out + p * plane, side, turns_mod_4(turns[p / channels]));
      }
    });
  });
  return rotated;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("rotate90", TORCH_BOX(&sslfast::rotate90_cpu));
}
