// Kernels with one fault each, for the tests that the emulation detects it. `which` 0 is the kernel without a fault.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "common/wgmma.cuh"

namespace sslfast {
namespace {

using torch::stable::Tensor;

enum Fault {
  kNone,
  kMissingSyncthreads,
  kMissingSyncwarp,
  kDivergentShuffle,
  kExitBeforeBarrier,
  kReadBehindTensor,
  kWriteBehindResult,
  kMisaligned,
  kMissingCopyWait,
  kSharedTooSmall,
  kSpinForever,
  kUnwritten,
  kMissingBoxWait,
  kStageReleasedEarly,
  kMissingProductWait,
  kMissingProxyFence,
};

// Reverses 64 floats through shared memory.
__global__ void reverse_kernel(const float* x, float* out, int which) {
  __shared__ float values[64];
  const int i = threadIdx.x;
  if (which == kReadBehindTensor) {
    values[i] = x[i + 1];
  } else if (which == kMisaligned) {
    values[i] = __ldg(reinterpret_cast<const float2*>(x + 1)).x;
  } else {
    values[i] = x[i];
  }
  if (which == kExitBeforeBarrier && i == 5) return;
  if (which == kDivergentShuffle) {
    if (i != 7) values[i] += 0.0f * __shfl_xor_sync(kFullMask, values[i], 1);
  }
  if (which == kSpinForever) {
    for (volatile float* flag = values; *flag != 12345.0f;) __nanosleep(10);
  }
  if (which != kMissingSyncthreads) __syncthreads();
  if (which == kUnwritten && i == 3) return;
  out[which == kWriteBehindResult ? 64 - i : i] = values[63 - i];
}

// The same within each half through warp shuffles.
__global__ void warp_kernel(const float* x, float* out, bool synchronised) {
  __shared__ float values[64];
  const int i = threadIdx.x;
  values[i] = x[i];
  if (synchronised) __syncwarp();
  out[i] = values[i ^ 31];
}

// Copies 64 floats through cp.async.
__global__ void copy_kernel(const float* x, float* out, bool waits) {
  float* const values = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (i < 16) cp_async_16(values + 4 * i, x + 4 * i, true);
  cp_async_commit();
  if (waits) cp_async_wait<0>();
  __syncthreads();
  out[i] = values[i];
}

// out [64, 64] = 4 a a^T for a bf16 [64, 64], through the copy engine and a warpgroup.
__global__ void product_kernel(const __grid_constant__ RowMap map, float* out, int which) {
  unsigned char* const stage = dynamic_shared<unsigned char>();
  uint64_t* const full = reinterpret_cast<uint64_t*>(stage + 64 * 128 * 2);
  if (threadIdx.x == 0) barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expecting(full, 2 * 64 * 128);
    load_box(stage, &map, 0, 0, full);
    load_box(stage + 64 * 128, &map, 0, 64, full);  // rows outside of the matrix: zeros
  }
  if (which != kMissingBoxWait) barrier_wait(full, 0);
  if (threadIdx.x < 64) {
    torch::headeronly::BFloat16* const row = reinterpret_cast<torch::headeronly::BFloat16*>(stage + 128 * threadIdx.x);
    for (int c = 0; c < 64; ++c) row[c] = 2 * static_cast<float>(row[c]);
  }
  if (which != kMissingProxyFence) async_proxy_fence();
  __syncthreads();
  float d[64];
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    const uint64_t operand = matrix_descriptor(descriptor_word(stage + 32 * k, 0));
    wgmma_m64n128k16(Bf16{}, d, operand, operand, k > 0);
  }
  wgmma_commit();
  if (which == kStageReleasedEarly) stage[2 * threadIdx.x + 1] = 0;
  if (which != kMissingProductWait) wgmma_wait<0>();
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 64; ++i) {
    const int c = i / 4 * 8 + column + i % 2;
    if (c < 64) out[(row + i % 4 / 2 * 8) * 64 + c] = d[i];
  }
  wgmma_wait<0>();
  if (which == kMissingBoxWait) barrier_wait(full, 0);
}

Tensor faulty_reverse(const Tensor& x, int64_t which) {
  const DeviceGuard guard(0);
  const float* from = static_cast<const float*>(x.const_data_ptr());
  Tensor out = torch::stable::new_empty(x, {64});
  launch_kernel("faulty", reverse_kernel, 1, 64, 0, current_stream(0), from,
                static_cast<float*>(out.mutable_data_ptr()), static_cast<int>(which));
  return out;
}
Tensor faulty_warp(const Tensor& x, int64_t which) {
  const DeviceGuard guard(0);
  Tensor out = torch::stable::new_empty(x, {64});
  launch_kernel("faulty", warp_kernel, 1, 64, 0, current_stream(0), static_cast<const float*>(x.const_data_ptr()),
                static_cast<float*>(out.mutable_data_ptr()), which != kMissingSyncwarp);
  return out;
}
Tensor faulty_copy(const Tensor& x, int64_t which) {
  const DeviceGuard guard(0);
  Tensor out = torch::stable::new_empty(x, {64});
  launch_kernel("faulty", copy_kernel, 1, 64, which == kSharedTooSmall ? 128 : 256, current_stream(0),
                static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                which != kMissingCopyWait);
  return out;
}
Tensor faulty_product(const Tensor& x, int64_t which) {
  const DeviceGuard guard(0);
  Tensor out = torch::stable::new_empty(x, {64, 64}, torch::headeronly::ScalarType::Float);
  const RowMap map = make_row_map(Bf16{}, x.const_data_ptr(), 64, 64, 64);
  launch_kernel("faulty", product_kernel, 1, 128, 64 * 128 * 2 + 8, current_stream(0), map,
                static_cast<float*>(out.mutable_data_ptr()), static_cast<int>(which));
  return out;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY(sslfast, m) {
  m.def("faulty_reverse(Tensor x, int which) -> Tensor");
  m.def("faulty_warp(Tensor x, int which) -> Tensor");
  m.def("faulty_copy(Tensor x, int which) -> Tensor");
  m.def("faulty_product(Tensor x, int which) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("faulty_reverse", TORCH_BOX(&sslfast::faulty_reverse));
  m.impl("faulty_warp", TORCH_BOX(&sslfast::faulty_warp));
  m.impl("faulty_copy", TORCH_BOX(&sslfast::faulty_copy));
  m.impl("faulty_product", TORCH_BOX(&sslfast::faulty_product));
}
