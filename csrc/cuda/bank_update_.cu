#include <torch/csrc/stable/library.h>

#include "bank_update_.h"
#include "common/launch.cuh"

namespace sslfast {
namespace {

constexpr int kWarpsPerBlock = 8;

// One warp per batch position. It first looks for a later occurrence of its own index and leaves the row to that one,
// so that repeated indices give the same result in every run; then it blends, sums the squares and writes.
template <typename T, typename F>
__global__ void bank_update_kernel(T* __restrict__ bank,               // [N, D]
                                   const int64_t* __restrict__ index,  // [B]
                                   const F* __restrict__ features,     // [B, D]
                                   int64_t batch, int64_t columns, int64_t num_rows, double momentum_) {
  using A = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<F, double>, double, float>;
  const int64_t b = blockIdx.x * int64_t(kWarpsPerBlock) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (b >= batch) return;
  const int64_t target = index[b];
  if (target == -1) return;
  if (target < -1 || target >= num_rows) __trap();
  bool later = false;
  for (int64_t other = b + 1 + lane; other < batch; other += kWarpSize) later |= index[other] == target;
  if (__any_sync(kFullMask, later)) return;

  const A momentum = static_cast<A>(momentum_);
  T* row = bank + target * columns;
  const F* feature = features + b * columns;
  A squares = 0;
  for (int64_t d = lane; d < columns; d += kWarpSize) {
    const A x = blend<A>(static_cast<A>(row[d]), static_cast<A>(feature[d]), momentum);
    squares += x * x;
  }
  squares = warp_sum(squares);
  const A norm = sqrt(squares);
  const A scale = A(1) / (norm < static_cast<A>(kNormFloor) ? static_cast<A>(kNormFloor) : norm);  // NaN stays NaN
  // The second read of row and feature hits L1; keeping the blend in registers would fix the number of columns.
  for (int64_t d = lane; d < columns; d += kWarpSize) {
    row[d] = static_cast<T>(blend<A>(static_cast<A>(row[d]), static_cast<A>(feature[d]), momentum) * scale);
  }
}

template <typename T, typename F>
void launch(const Tensor& bank, const Tensor& index, const Tensor& features, double momentum) {
  const int64_t batch = index.size(0);
  const unsigned blocks = static_cast<unsigned>((batch + kWarpsPerBlock - 1) / kWarpsPerBlock);
  launch_kernel("bank_update_", bank_update_kernel<T, F>, blocks, kWarpsPerBlock * kWarpSize, 0,
                current_stream(bank.get_device_index()), static_cast<T*>(bank.mutable_data_ptr()),
                static_cast<const int64_t*>(index.const_data_ptr()), static_cast<const F*>(features.const_data_ptr()),
                batch, bank.size(1), bank.size(0), momentum);
}

void bank_update_cuda(const Tensor& bank, const Tensor& index_, const Tensor& features_, double momentum) {
  check_bank_update(bank, index_, features_, momentum);
  const DeviceGuard guard(bank.get_device_index());
  const Tensor index = readable("bank_update_", "index", index_);
  const Tensor features = readable("bank_update_", "features", features_);
  if (index.size(0) == 0 || bank.size(1) == 0) return;
  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_update_", [&] {
    using bank_t = scalar_t;
    SSLFAST_DISPATCH_FLOAT(features.scalar_type(), "bank_update_",
                           [&] { launch<bank_t, scalar_t>(bank, index, features, momentum); });
  });
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("bank_update_", TORCH_BOX(&sslfast::bank_update_cuda));
}
