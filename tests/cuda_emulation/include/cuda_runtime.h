// Replaces CUDA's header: the keywords and vector types of CUDA C++ for a host compiler.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Blocks run one after another on one OS thread, so one copy is enough; the emulation can find and poison thread-local
// storage as a whole, also where a template declares it.
#define __shared__ static thread_local

#define SSLFAST_VECTOR_TYPES(T, name, one, two, four) \
  struct alignas(one) name##1 {                       \
    T x;                                              \
  };                                                  \
  struct alignas(two) name##2 {                       \
    T x, y;                                           \
  };                                                  \
  struct name##3 {                                    \
    T x, y, z;                                        \
  };                                                  \
  struct alignas(four) name##4 {                      \
    T x, y, z, w;                                     \
  };                                                  \
  inline name##2 make_##name##2(T x, T y) {           \
    return {x, y};                                    \
  }                                                   \
  inline name##4 make_##name##4(T x, T y, T z, T w) { \
    return {x, y, z, w};                              \
  }
SSLFAST_VECTOR_TYPES(unsigned char, uchar, 1, 2, 4)
SSLFAST_VECTOR_TYPES(unsigned short, ushort, 2, 4, 8)
SSLFAST_VECTOR_TYPES(int, int, 4, 8, 16)
SSLFAST_VECTOR_TYPES(unsigned, uint, 4, 8, 16)
SSLFAST_VECTOR_TYPES(float, float, 4, 8, 16)
SSLFAST_VECTOR_TYPES(long long, longlong, 8, 16, 16)
SSLFAST_VECTOR_TYPES(unsigned long long, ulonglong, 8, 16, 16)
SSLFAST_VECTOR_TYPES(double, double, 8, 16, 16)
#undef SSLFAST_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

// Of the running thread.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

template <typename To, typename From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}
inline float __uint_as_float(unsigned x) {
  return bits_as<float>(x);
}
inline float __int_as_float(int x) {
  return bits_as<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return bits_as<unsigned>(x);
}
inline int __float_as_int(float x) {
  return bits_as<int>(x);
}

inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
inline float __saturatef(float x) {
  return x > 0.0f ? std::min(x, 1.0f) : 0.0f;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7u) & 255u) << 8 * i;
  return result;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
