// Kernel launches on torch's current stream, and all other uses of the CUDA runtime: .cu files call no cuda* function
// themselves. Included by .cu files only. Tests compile kernels for the CPU against tests/cuda_emulation instead.
#pragma once

#ifdef SSLFAST_EMULATE_CUDA
#include <emulation.h>
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "common/torch_cuda.h"

namespace sslfast {

// Makes a device current for torch, and for this library's own copy of the CUDA runtime, whose current device need not
// follow torch's: kernels and attributes of GPU 1 and later depend on it. It is set each time and not set back: torch's
// guard, which ends last, makes the context of its own device current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_index) : torch_guard_(device_index) {
    if (const cudaError_t error = cudaSetDevice(device_index); error != cudaSuccess) {
      throw std::runtime_error("sslfast: GPU " + std::to_string(device_index) +
                               " cannot be used: " + cudaGetErrorString(error));
    }
  }

 private:
  torch::stable::accelerator::DeviceGuard torch_guard_;
};

inline cudaStream_t current_stream(int32_t device_index) {
  static const auto current =
      reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(torch_cuda_symbol("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (current == nullptr || current(device_index, &stream) != 0) {
    throw std::runtime_error("sslfast: this torch has no CUDA streams; install a CUDA build of torch");
  }
  return static_cast<cudaStream_t>(stream);
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
// 80 for 8.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}
// Largest shared memory of a block in bytes, static included: 163 KiB on 8.0, 99 KiB on 8.6, 8.9 and 12.0, 227 KiB
// on 9.0.
inline int64_t shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Blocks of a kernel that run on a multiprocessor of the current device at a time; asked once for each kernel and
// device.
template <typename... Parameters>
int blocks_per_multiprocessor(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Parameters...), int, int, size_t>, int> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device, threads, shared_bytes}];
  if (blocks == 0) {
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) != cudaSuccess) {
      cudaGetLastError();
    }
    blocks = blocks < 1 ? 1 : blocks;
  }
  return blocks;
}

// The block's dynamic shared memory, whose size is an argument of launch_kernel.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char sslfast_dynamic_shared[];
  return reinterpret_cast<T*>(sslfast_dynamic_shared);
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); throws on errors, naming the op.
template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  constexpr size_t kDefaultLimit = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultLimit) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess && static_cast<int64_t>(shared_bytes) > shared_memory_limit()) {
      cudaGetLastError();  // clears the error, which the next launch would report
      throw std::runtime_error(std::string(op) + ": needs " + std::to_string(shared_bytes) +
                               " bytes of shared memory in a block, this GPU has " +
                               std::to_string(shared_memory_limit()));
    }
  }
  if (error == cudaSuccess) {
    // clang-format off: it would split >>>
    kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
    // clang-format on
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

}  // namespace sslfast

#endif  // SSLFAST_EMULATE_CUDA

namespace sslfast {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

}  // namespace sslfast
