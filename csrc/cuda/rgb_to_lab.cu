#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "rgb_to_lab.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockPixels = 4 * kThreads;

// A block takes kBlockPixels pixels of one image.
template <typename T>
__global__ void __launch_bounds__(kThreads) rgb_to_lab_kernel(const T* __restrict__ pixels,  // [N, 3, P], or [N, P, 3]
                                                              float* __restrict__ lab,       // the same
                                                              const LabShape shape, const bool channels_last) {
  const int64_t blocks = (shape.pixels + kBlockPixels - 1) / kBlockPixels;  // of an image
  const int64_t image = blockIdx.x / blocks, begin = blockIdx.x % blocks * kBlockPixels;
  const int64_t end = begin + kBlockPixels < shape.pixels ? begin + kBlockPixels : shape.pixels;
  const int64_t step = channels_last ? 1 : shape.pixels;  // from channel to channel
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t at = image * 3 * shape.pixels + (channels_last ? 3 * i : i);
    const Lab x = lab_of(static_cast<float>(pixels[at]), static_cast<float>(pixels[at + step]),
                         static_cast<float>(pixels[at + 2 * step]));
    lab[at] = x.l, lab[at + step] = x.a, lab[at + 2 * step] = x.b;
  }
}

Tensor rgb_to_lab_cuda(const Tensor& pixels_, bool channels_last) {
  const LabShape shape = check_rgb_to_lab(pixels_, channels_last);
  const DeviceGuard guard(pixels_.get_device_index());
  const Tensor pixels = readable("rgb_to_lab", "pixels", pixels_);
  const std::vector<int64_t> sizes = {pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)};
  Tensor lab = allocate("rgb_to_lab", pixels, sizes, ScalarType::Float);
  if (lab.numel() == 0) return lab;
  const int64_t blocks = shape.images * ((shape.pixels + kBlockPixels - 1) / kBlockPixels);
  SSLFAST_CHECK(blocks < int64_t(1) << 31, "rgb_to_lab: ", shape.images, " images of ", shape.pixels,
                " pixels are too many for one call; split the batch");
  SSLFAST_DISPATCH_FLOAT(pixels.scalar_type(), "rgb_to_lab", [&] {
    launch_kernel("rgb_to_lab", rgb_to_lab_kernel<scalar_t>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                  current_stream(pixels.get_device_index()), static_cast<const scalar_t*>(pixels.const_data_ptr()),
                  static_cast<float*>(lab.mutable_data_ptr()), shape, channels_last);
  });
  return lab;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("rgb_to_lab", TORCH_BOX(&sslfast::rgb_to_lab_cuda));
}
