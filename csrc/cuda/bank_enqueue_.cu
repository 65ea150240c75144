#include <torch/csrc/stable/library.h>

#include "bank_enqueue_.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace sslfast {
namespace {

constexpr int kWarpsPerBlock = 8;

__device__ __forceinline__ int64_t read_head(const int64_t* head, int64_t num_rows) {
  const int64_t position = *head;
  if (position < 0 || position >= num_rows) __trap();
  return position;
}

// One warp writes one key, four columns at a time if rows are aligned to quads. Rows are distinct: warps do not
// conflict.
template <typename T, typename F>
__global__ void bank_enqueue_kernel(T* __restrict__ bank,              // [N, D]
                                    const int64_t* __restrict__ head,  // []
                                    const F* __restrict__ keys,        // [B, D]
                                    int64_t columns, Ring ring) {
  const int64_t k = blockIdx.x * int64_t(kWarpsPerBlock) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (k >= ring.kept) return;
  T* row = bank + ring.row(ring.start(read_head(head, ring.num_rows)), k) * columns;
  const F* key = keys + (ring.skipped + k) * columns;
  if (columns % 4 == 0 && is_quad_aligned(row) && is_quad_aligned(key)) {
    for (int64_t d = 4 * lane; d < columns; d += 4 * kWarpSize) {
      const Quad<F> from = *reinterpret_cast<const Quad<F>*>(key + d);
      Quad<T> to;
#pragma unroll
      for (int i = 0; i < 4; ++i) to.x[i] = static_cast<T>(from.x[i]);
      *reinterpret_cast<Quad<T>*>(row + d) = to;
    }
  } else {
    for (int64_t d = lane; d < columns; d += kWarpSize) row[d] = static_cast<T>(key[d]);
  }
}

// A separate launch: every block of the first one reads the head, and stream order guarantees that all of them have
// done so before it moves. Counting finished blocks would need a counter that is reset before each launch, which is a
// second launch too, and streams could not share it.
__global__ void advance_kernel(int64_t* head, Ring ring) {
  *head = ring.advanced(read_head(head, ring.num_rows));
}

template <typename T, typename F>
void launch(const Tensor& bank, const Tensor& head, const Tensor& keys, const Ring& ring, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((ring.kept + kWarpsPerBlock - 1) / kWarpsPerBlock);
  launch_kernel("bank_enqueue_", bank_enqueue_kernel<T, F>, blocks, kWarpsPerBlock * kWarpSize, 0, stream,
                static_cast<T*>(bank.mutable_data_ptr()), static_cast<const int64_t*>(head.const_data_ptr()),
                static_cast<const F*>(keys.const_data_ptr()), bank.size(1), ring);
}

void bank_enqueue_cuda(const Tensor& bank, const Tensor& head, const Tensor& keys_) {
  check_bank_enqueue(bank, head, keys_);
  const DeviceGuard guard(bank.get_device_index());
  const Tensor keys = readable("bank_enqueue_", "keys", keys_);
  const Ring ring(bank.size(0), keys.size(0));
  if (ring.batch == 0) return;
  const cudaStream_t stream = current_stream(bank.get_device_index());
  if (bank.size(1) > 0) {
    SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_enqueue_", [&] {
      using bank_t = scalar_t;
      SSLFAST_DISPATCH_FLOAT(keys.scalar_type(), "bank_enqueue_",
                             [&] { launch<bank_t, scalar_t>(bank, head, keys, ring, stream); });
    });
  }
  launch_kernel("bank_enqueue_", advance_kernel, 1, 1, 0, stream, static_cast<int64_t*>(head.mutable_data_ptr()), ring);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("bank_enqueue_", TORCH_BOX(&sslfast::bank_enqueue_cuda));
}
