// The NCE term of one score on the device; cpu/fast_math.h has the one for the CPU.
#pragma once

#include "bank_nce.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace sslfast {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// log(1 + e) for 0 <= e <= 1: e times a minimax polynomial, relative error below 3.3e-7 also for tiny e.
SSLFAST_HD float fast_log1p(float e) {
  float p = -8.539207280e-3f;
  p = fmaf(p, e, 4.408963397e-2f);
  p = fmaf(p, e, -1.076817289e-1f);
  p = fmaf(p, e, 1.774524301e-1f);
  p = fmaf(p, e, -2.449546456e-1f);
  p = fmaf(p, e, 3.327547908e-1f);
  p = fmaf(p, e, -4.999740422e-1f);
  p = fmaf(p, e, 9.999998212e-1f);
  return p * e;
}

// `u` as a power of two: the logit times log2(e).
__device__ __forceinline__ NceTerm<float> nce_term_of_power(float u) {
  const float e = fast_exp2(-fabsf(u));
  const float inverse = fast_reciprocal(1.0f + e);
  return {fmaf(fmaxf(u, 0.0f), kLn2, fast_log1p(e)), u > 0.0f ? inverse : e * inverse};
}
__device__ __forceinline__ NceTerm<float> nce_term(float u) {
  return nce_term_of_power(u * kLog2E);
}
__device__ __forceinline__ NceTerm<double> nce_term(double u) {
  const double e = exp(u > 0.0 ? -u : u);
  return NceTerm<double>(u, e, log1p(e));
}

// Sums over the scores of a query whose logits are small, for log-sum-exp and loss.
struct SmallSums {
  float firsts = 0.0f, seconds = 0.0f, sigmoids = 0.0f;

  // Adds them to `loss` and to `sum`, which has the factor 2^reference.
  __device__ __forceinline__ void fold(float offset, float& reference, float& sum, float& loss) const {
    loss += 0.5f * firsts + (1.0f / 6) * seconds + (1.0f / 3) * sigmoids;
    if (!(firsts > 0.0f)) return;
    const float raised = fmaxf(reference, offset);
    sum = sum * fast_exp2(reference - raised) + firsts * fast_exp2(offset - raised);
    reference = raised;
  }
};

// NCE of the kCount scores of a query that a lane holds, if all logits of the warp are small; returns false and changes
// nothing otherwise. With E = exp(u) = 2^(score * scale - offset) <= 2^-6:
//   a = E - E^2,  sigmoid = E - E^2 + E^3 = E - E a                        relative error below E^3 = 2^-18
//   softplus = E - E^2 / 2 + E^3 / 3 = E / 2 + a / 6 + sigmoid / 3         relative error below E^3 / 4 = 2^-20
// so that the sums of E, a and the sigmoid are all that the loss needs: four instructions for a score beyond its
// exponential. The sum of E tells whether logits are small (each is below it), without a maximum; it is NaN or too
// large otherwise, or too small to be exact where all scores are far below the offset.
// at(i) is a reference to score i, which becomes sigmoid * weight_scale.
template <int kCount, typename At>
__device__ __forceinline__ bool weigh_small(const At& at, float scale, float offset, float weight_scale,
                                            SmallSums& sums) {
  constexpr float kLowest = 0x1p-80f, kHighest = 0x1p-6f;
  float e[kCount], firsts = 0.0f, seconds = 0.0f, sigmoids = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    e[i] = fast_exp2(fmaf(at(i), scale, -offset));
    firsts += e[i];
  }
  if (!__all_sync(kFullMask, firsts >= kLowest && firsts <= kHighest)) return false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float second = fmaf(-e[i], e[i], e[i]), sigmoid = fmaf(-e[i], second, e[i]);
    seconds += second;
    sigmoids += sigmoid;
    at(i) = sigmoid * weight_scale;
  }
  sums.firsts += firsts;
  sums.seconds += seconds;
  sums.sigmoids += sigmoids;
  return true;
}

// NCE of scores of any size; `sum` collects 2^(score * scale - reference). A score of -inf counts nothing.
template <int kCount, typename At>
__device__ __forceinline__ void weigh_any(const At& at, float scale, float offset, float reference, float weight_scale,
                                          float& sum, float& loss) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float& score = at(i);
    sum += fast_exp2(fmaf(score, scale, -reference));
    const NceTerm<float> term = nce_term_of_power(fmaf(score, scale, -offset));
    const bool counts = score != -INFINITY;
    loss += counts ? term.softplus : 0.0f;
    score = counts ? term.sigmoid * weight_scale : 0.0f;
  }
}

}  // namespace sslfast
