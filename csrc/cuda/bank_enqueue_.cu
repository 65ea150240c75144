#include <torch/csrc/stable/library.h>

#include "bank_enqueue_.h"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace sslfast {
namespace {

constexpr int kWarpsPerBlock = 8, kMaxBlocks = 1024;

// The position of the head, which every block reads before it moves. Bits from kTicketShift on count the blocks that
// have read it: the last one stores the next position, without them. So one launch needs no counter beside the head,
// which would have to be reset, and which streams could not share.
constexpr int kTicketShift = 48;
__device__ __forceinline__ int64_t take_head(int64_t* head, const Ring& ring) {
  __shared__ int64_t shared_position;
  if (threadIdx.x == 0) {
    using Word = unsigned long long;
    const Word seen = atomicAdd(reinterpret_cast<Word*>(head), Word(1) << kTicketShift);
    const int64_t position = static_cast<int64_t>(seen & ((Word(1) << kTicketShift) - 1));
    const unsigned ticket = static_cast<unsigned>(seen >> kTicketShift);
    if (position >= ring.num_rows || ticket >= gridDim.x) __trap();
    if (ticket == gridDim.x - 1) *head = ring.advanced(position);
    shared_position = position;
  }
  __syncthreads();
  return shared_position;
}

// One warp writes one key at a time, four columns at a time if rows are aligned to quads. Rows are distinct: warps do
// not conflict.
template <typename T, typename F>
__global__ void bank_enqueue_kernel(T* __restrict__ bank,        // [N, D]
                                    int64_t* __restrict__ head,  // []
                                    const F* __restrict__ keys,  // [B, D]
                                    int64_t columns, Ring ring) {
  const int64_t start = ring.start(take_head(head, ring));
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t k = blockIdx.x * int64_t(kWarpsPerBlock) + threadIdx.x / kWarpSize; k < ring.kept;
       k += int64_t(gridDim.x) * kWarpsPerBlock) {
    T* row = bank + ring.row(start, k) * columns;
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
}

template <typename T, typename F>
void launch(const Tensor& bank, const Tensor& head, const Tensor& keys, const Ring& ring) {
  const int64_t blocks = std::min<int64_t>((ring.kept + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks);
  launch_kernel("bank_enqueue_", bank_enqueue_kernel<T, F>, dim3(static_cast<unsigned>(blocks)),
                dim3(kWarpsPerBlock * kWarpSize), 0, current_stream(bank.get_device_index()),
                static_cast<T*>(bank.mutable_data_ptr()), static_cast<int64_t*>(head.mutable_data_ptr()),
                static_cast<const F*>(keys.const_data_ptr()), bank.size(1), ring);
}

void bank_enqueue_cuda(const Tensor& bank, const Tensor& head, const Tensor& keys_) {
  check_bank_enqueue(bank, head, keys_);
  const DeviceGuard guard(bank.get_device_index());
  const Tensor keys = readable("bank_enqueue_", "keys", keys_);
  const Ring ring(bank.size(0), keys.size(0));
  if (ring.batch == 0) return;
  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_enqueue_", [&] {
    using bank_t = scalar_t;
    SSLFAST_DISPATCH_FLOAT(keys.scalar_type(), "bank_enqueue_",
                           [&] { launch<bank_t, scalar_t>(bank, head, keys, ring); });
  });
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("bank_enqueue_", TORCH_BOX(&sslfast::bank_enqueue_cuda));
}
