#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/launch.cuh"
#include "negative_rows.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;

// One thread writes one pair of rows: block (x) runs over pairs, grid y over samples.
__global__ void negative_rows_kernel(const int64_t* __restrict__ index,        // [B]
                                     const int64_t* __restrict__ step_tensor,  // [] or null
                                     NegativeSampler sampler, int64_t num_rows, int64_t num_negatives, int64_t batch,
                                     int64_t* __restrict__ rows) {  // [B, K]
  if (step_tensor != nullptr) sampler.step = *step_tensor;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const int64_t self = index[b];
    if (self < 0 || self >= num_rows) __trap();
    for (int64_t pair = blockIdx.x * int64_t(kThreads) + threadIdx.x; 2 * pair < num_negatives;
         pair += int64_t(gridDim.x) * kThreads) {
      int64_t first, second;
      sampler.draw(static_cast<uint32_t>(pair), self, &first, &second);
      rows[b * num_negatives + 2 * pair] = first;
      if (2 * pair + 1 < num_negatives) rows[b * num_negatives + 2 * pair + 1] = second;
    }
  }
}

Tensor negative_rows_cuda(const Tensor& index_,  // [B] int64
                          std::optional<Tensor> step_tensor, int64_t step, int64_t num_negatives, int64_t num_rows,
                          int64_t seed, bool exclude_self, bool shared) {
  check_negative_rows(index_, step_tensor, num_negatives, num_rows, seed, exclude_self, shared);
  const DeviceGuard guard(index_.get_device_index());
  const Tensor index = readable("negative_rows", "index", index_);
  const int64_t batch = index.size(0);
  Tensor rows = allocate("negative_rows", index, {batch, num_negatives});
  if (batch == 0) return rows;
  const NegativeSampler sampler = make_sampler(seed, step, num_rows, exclude_self, shared);
  const int64_t pairs = (num_negatives + 1) / 2;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((pairs + kThreads - 1) / kThreads, 1024)),
                  static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
  launch_kernel("negative_rows", negative_rows_kernel, grid, kThreads, 0, current_stream(index.get_device_index()),
                static_cast<const int64_t*>(index.const_data_ptr()),
                step_tensor ? static_cast<const int64_t*>(step_tensor->const_data_ptr()) : nullptr, sampler, num_rows,
                num_negatives, batch, static_cast<int64_t*>(rows.mutable_data_ptr()));
  return rows;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("negative_rows", TORCH_BOX(&sslfast::negative_rows_cuda));
}
