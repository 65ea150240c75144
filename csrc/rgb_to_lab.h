// rgb_to_lab: checks, and the arithmetic of one pixel.
#pragma once

#include <cfloat>
#include <cstring>

#include "common/check.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// x^(-1/n) of a normal x > 0, n 3 or 5: dividing the bits by -n gives it to 4 %, each step of Newton's method squares
// that error. Straight-line arithmetic without a division, which vectorises; results for other x are not used.
template <int n>
SSLFAST_HD float inverse_root(float x) {
  static_assert(n == 3 || n == 5, "the powers below are x^3 or x^5");
  constexpr float kExponentBias = (127.0f - 0.045f) * 8388608.0f;  // 0.045 halves the largest error of the line
  x = x < FLT_MAX ? x : FLT_MAX;                                   // of inf
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = static_cast<int32_t>(kExponentBias * (n + 1) / n) - bits / n;
  float y;
  memcpy(&y, &bits, sizeof y);
  for (int step = 0; step < 3; ++step) {
    const float square = y * y, power = n == 3 ? square * y : square * square * y;
    y = y * ((n + 1.0f) / n - x * power * (1.0f / n));
  }
  return y;
}

// sRGB value to linear light, IEC 61966-2-1: base^2.4 above the straight line, which is (base * base^(-1/5))^3.
SSLFAST_HD float linear_light(float x) {
  const float base = (x + 0.055f) * (1.0f / 1.055f), power = base * inverse_root<5>(base);
  return x > 0.04045f ? power * power * power : x * (1.0f / 12.92f);
}

// CIE's f: the cube root, t * (t^(-1/3))^2, with a straight line near zero.
SSLFAST_HD float lab_curve(float t) {
  const float root = inverse_root<3>(t);
  return t > 216.0f / 24389.0f ? t * root * root : t * (24389.0f / 27.0f / 116.0f) + 16.0f / 116.0f;
}

struct Lab {
  float l, a, b;
};

SSLFAST_HD Lab lab_of(float red, float green, float blue) {
  red = linear_light(red), green = linear_light(green), blue = linear_light(blue);
  // XYZ over the white of D65 (0.95047, 1, 1.08883): rows sum to one.
  const float x = lab_curve(0.433949941f * red + 0.376209769f * green + 0.189840290f * blue);
  const float y = lab_curve(0.2126729f * red + 0.7151522f * green + 0.0721749f * blue);
  const float z = lab_curve(0.017756583f * red + 0.109467961f * green + 0.872775456f * blue);
  return {116.0f * y - 16.0f, 500.0f * (x - y), 200.0f * (y - z)};
}

struct LabShape {
  int64_t images, pixels;  // pixels of one image
};

inline LabShape check_rgb_to_lab(const Tensor& pixels,  // [N, 3, H, W], or [N, H, W, 3] when channels_last
                                 bool channels_last) {
  constexpr const char* op = "rgb_to_lab";
  SSLFAST_CHECK(pixels.dim() == 4 && pixels.size(channels_last ? 3 : 1) == 3, op, ": pixels must have shape ",
                channels_last ? "[N, H, W, 3]" : "[N, 3, H, W]", ", got ", shape_string(pixels));
  SSLFAST_CHECK(
      is_floating(pixels.scalar_type()), op,
      ": pixels must be float32, float64, bfloat16 or float16 in 0..1; convert bytes with .float() / 255, got ",
      torch::headeronly::toString(pixels.scalar_type()));
  const int height = channels_last ? 1 : 2;
  return {pixels.size(0), pixels.size(height) * pixels.size(height + 1)};
}

}  // namespace sslfast
