// exp and log(1 + e) as straight-line arithmetic, which vectorises, for the scoring kernels on the CPU; fp64 uses libm.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bank_nce.h"
#include "common/simd.h"

namespace sslfast {

// exp for x <= 0 (and up to 88), of -inf, inf and NaN; relative error below 2e-7: 2^n times a polynomial on [-ln2/2,
// ln2/2].
SSLFAST_INLINE float fast_exp(float x) {
  const bool zero = x < -FLT_MAX;  // -inf
  x = x < -87.0f ? -87.0f : x;     // below: 1e-38, negligible in a sum
  // inf and NaN have a power of two of their own and come out of the polynomial as they are.
  const float n = __builtin_rintf((x < 88.0f ? x : 88.0f) * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts
  float p = 1.9875691500e-4f;  // Taylor coefficients, minimax-adjusted, from Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return zero ? 0.0f : p * scale;
}
SSLFAST_INLINE double fast_exp(double x) {
  return std::exp(x);
}

// log(1 + e) for 0 <= e <= 1 by the series of 2 artanh(e / (2 + e)): relative error below 2e-7 also for tiny e.
SSLFAST_INLINE float fast_log1p(float e) {
  const float z = e / (2.0f + e), y = z * z;  // z <= 1/3
  float p = 1.0f / 13;
  p = p * y + 1.0f / 11;
  p = p * y + 1.0f / 9;
  p = p * y + 1.0f / 7;
  p = p * y + 1.0f / 5;
  p = p * y + 1.0f / 3;
  return 2 * z + 2 * z * y * p;
}
SSLFAST_INLINE double fast_log1p(double e) {
  return std::log1p(e);
}

template <typename A>
SSLFAST_INLINE NceTerm<A> nce_term(A u) {
  const A e = fast_exp(u > 0 ? -u : u);
  return NceTerm<A>(u, e, fast_log1p(e));
}

}  // namespace sslfast
