#include "rgb_to_lab.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/simd.h"

namespace sslfast {
namespace {

constexpr int64_t kStrip = 512;  // pixels that stay in the L1 cache

template <typename T>
struct Problem {
  const T* pixels;  // [N, 3, P], or [N, P, 3]
  float* lab;       // the same
  LabShape shape;
  bool channels_last;
  int64_t begin, end;  // strips of this call
};

template <typename T>
SSLFAST_INLINE void convert_strips(const Problem<T>& p) {
  const int64_t plane = p.shape.pixels, strips = (plane + kStrip - 1) / kStrip;
  alignas(64) float planes[6][kStrip];
  for (int64_t strip = p.begin; strip < p.end; ++strip) {
    const int64_t image = strip / strips, first = strip % strips * kStrip, count = std::min(kStrip, plane - first);
    const int64_t step = p.channels_last ? 1 : plane;  // from channel to channel
    const int64_t base = image * 3 * plane + (p.channels_last ? 3 * first : first);
    for (int c = 0; c < 3; ++c) {
      const T* __restrict__ source = p.pixels + base + c * step;
      float* __restrict__ target = planes[c];
      if (p.channels_last) {
        for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(source[3 * i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(source[i]);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Lab lab = lab_of(planes[0][i], planes[1][i], planes[2][i]);
      planes[3][i] = lab.l, planes[4][i] = lab.a, planes[5][i] = lab.b;
    }
    for (int c = 0; c < 3; ++c) {
      float* target = p.lab + base + c * step;
      if (p.channels_last) {
        for (int64_t i = 0; i < count; ++i) target[3 * i] = planes[3 + c][i];
      } else {
        std::copy_n(planes[3 + c], count, target);
      }
    }
  }
}

SSLFAST_MULTIVERSION(convert_strips_best, convert_strips, const Problem<T>&)

Tensor rgb_to_lab_cpu(const Tensor& pixels_, bool channels_last) {
  const LabShape shape = check_rgb_to_lab(pixels_, channels_last);
  const Tensor pixels = readable("rgb_to_lab", "pixels", pixels_);
  const std::vector<int64_t> sizes = {pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)};
  Tensor lab = allocate("rgb_to_lab", pixels, sizes, ScalarType::Float);
  if (lab.numel() == 0) return lab;
  SSLFAST_DISPATCH_FLOAT(pixels.scalar_type(), "rgb_to_lab", [&] {
    Problem<scalar_t> p{};
    p.pixels = static_cast<const scalar_t*>(pixels.const_data_ptr());
    p.lab = static_cast<float*>(lab.mutable_data_ptr());
    p.shape = shape;
    p.channels_last = channels_last;
    const int64_t strips = (shape.pixels + kStrip - 1) / kStrip;
    torch::stable::parallel_for(0, shape.images * strips, 16, [&](int64_t begin, int64_t end) {
      Problem<scalar_t> some = p;
      some.begin = begin;
      some.end = end;
      convert_strips_best<scalar_t>(some);
    });
  });
  return lab;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("rgb_to_lab", TORCH_BOX(&sslfast::rgb_to_lab_cpu));
}
