// Replaces CUDA's header: fp16 as the kernels use it. Rounding is to nearest, ties to even.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(torch::headeronly::Half(x).x) {}
  operator float() const { return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits()); }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) {
  return x;
}
inline __half __float2half_rn(float x) {
  return x;
}
inline float __half2float(__half x) {
  return x;
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {x, y};
}
inline __half2 __float22half2_rn(float2 x) {
  return {x.x, x.y};
}
inline float2 __half22float2(__half2 x) {
  return {x.x, x.y};
}
inline float __low2float(__half2 x) {
  return x.x;
}
inline float __high2float(__half2 x) {
  return x.y;
}
inline unsigned short __half_as_ushort(__half x) {
  return x.bits;
}
inline __half __ushort_as_half(unsigned short x) {
  __half result;
  result.bits = x;
  return result;
}
