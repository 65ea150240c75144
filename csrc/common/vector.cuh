// Four neighbouring elements at a time: one 8-byte (half types), 16-byte (fp32) or two 16-byte (fp64) loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sslfast {

__device__ __forceinline__ void load4(const float* __restrict__ p, float (&x)[4]) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(p));
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

__device__ __forceinline__ void load4(const double* __restrict__ p, double (&x)[4]) {
  const double2 a = __ldg(reinterpret_cast<const double2*>(p)), b = __ldg(reinterpret_cast<const double2*>(p) + 1);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

__device__ __forceinline__ void load4(const torch::headeronly::BFloat16* __restrict__ p, float (&x)[4]) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  // A bf16 is the upper half of an fp32.
  x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
  x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
}

__device__ __forceinline__ void load4(const torch::headeronly::Half* __restrict__ p, float (&x)[4]) {
  const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
  const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&v.x));
  const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&v.y));
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

// Four neighbouring elements as they are stored: for memory that the kernel also writes (no __ldg), and for stores.
template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
  T x[4];
};

// In whole vectors also where the compiler would merge the first elements of stores on both sides of a branch.
template <typename T>
__device__ __forceinline__ void store_quad(T* p, const Quad<T>& quad) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  constexpr int kVectors = static_cast<int>(sizeof(Quad<T>) / sizeof(Vector));
  Vector values[kVectors];
  memcpy(values, &quad, sizeof(quad));
#pragma unroll
  for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(p)[v] = values[v];
}

template <typename T>
__device__ __forceinline__ bool is_quad_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Quad<T>) == 0;
}

}  // namespace sslfast
