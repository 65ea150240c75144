// The numbers that say what render_views does to the pixels of one picture. Generated; edit the table in
// sslfast/ops/view_parameters.py, then run
//   python sslfast/ops/view_parameters.py > csrc/view_parameters.h
#pragma once

#include <cfloat>

#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Index of each in the kViewParameters fp32 numbers of a picture.
enum ViewParameter : int {
  kFlip,                   // gate (0 off, else on): mirror left to right
  kJitter,                 // gate of the four jitters
  kJitterOrder,            // of the four jitters: index into pixels.ORDERS
  kBrightness,             // factor of the levels
  kContrast,               // factor of the distance to the mean luminance
  kSaturation,             // factor of the distance to the luminance
  kHue,                    // shift in turns
  kPhotometric,            // gate of posterize, sharpness, solarize and autocontrast
  kPosterizeBits,          // upper bits kept of every level, rounded down
  kSharpness,              // factor: 0 smoothed, above 1 sharpened
  kSolarizeThreshold,      // levels at or above it are inverted
  kGrayscale,              // gate: the luminance in all three channels
  kBlurSigma,              // of the Gaussian blur, in pixels; 0 no blur
  kLastSolarizeThreshold,  // levels at or above it are inverted behind the blur
};
constexpr int kViewParameters = 14;

struct ViewParameterInfo {
  const char* name;
  float neutral;          // the operation changes nothing
  float lowest, highest;  // allowed
};

// The compiler folds this away where the index is a constant.
SSLFAST_HD constexpr ViewParameterInfo view_parameter(int index) {
  constexpr ViewParameterInfo table[] = {
      {"flip", 0.0f, -FLT_MAX, FLT_MAX},
      {"jitter", 0.0f, -FLT_MAX, FLT_MAX},
      {"jitter_order", 0.0f, 0.0f, 23.0f},
      {"brightness", 1.0f, 0.0f, 100.0f},
      {"contrast", 1.0f, 0.0f, 100.0f},
      {"saturation", 1.0f, 0.0f, 100.0f},
      {"hue", 0.0f, -1.0f, 1.0f},
      {"photometric", 0.0f, -FLT_MAX, FLT_MAX},
      {"posterize_bits", 8.0f, 0.0f, 8.0f},
      {"sharpness", 1.0f, -FLT_MAX, FLT_MAX},
      {"solarize_threshold", 256.0f, -FLT_MAX, FLT_MAX},
      {"grayscale", 0.0f, -FLT_MAX, FLT_MAX},
      {"blur_sigma", 0.0f, 0.0f, 5.0f},
      {"last_solarize_threshold", 256.0f, -FLT_MAX, FLT_MAX},
  };
  return table[index];
}

}  // namespace sslfast
