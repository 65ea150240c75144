// Gaussian blur of a picture, the last operation of render_views before normalisation: weights and border.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/philox.h"  // SSLFAST_HD
#include "view_parameters.h"

namespace sslfast {

constexpr float kMaxBlurSigma = view_parameter(kBlurSigma).highest;
constexpr int kMaxBlurRadius = static_cast<int>(3.0f * kMaxBlurSigma);
static_assert(static_cast<float>(kMaxBlurRadius) == 3.0f * kMaxBlurSigma, "blur_radius rounds up");

// Radius of the kernel: ceil(3 sigma), at most what one reflection at the border covers. 0: no blur.
SSLFAST_HD int blur_radius(float sigma, int64_t side) {
  const int radius = static_cast<int>(ceilf(3.0f * sigma));
  return radius < side ? radius : static_cast<int>(side) - 1;
}

// Weights of the distances 0 .. radius; those of both sides sum to one.
SSLFAST_HD void blur_weights(float sigma, int radius, float* weights) {
  float sum = 0.0f;
  for (int i = 0; i <= radius; ++i) {
    const float x = static_cast<float>(i) / sigma;
    weights[i] = expf(-0.5f * x * x);
    sum += i == 0 ? weights[i] : 2.0f * weights[i];
  }
  for (int i = 0; i <= radius; ++i) weights[i] /= sum;
}

// The border is mirrored without repeating the outermost pixel; -side < i < 2 * side - 1.
SSLFAST_HD int64_t reflect(int64_t i, int64_t side) {
  i = i < 0 ? -i : i;
  return i < side ? i : 2 * side - 2 - i;
}

}  // namespace sslfast
