// render_views: the view stage in one pass over the bytes. Checks, source pixels, and the arithmetic of one pixel.
//
// A picture is a whole rotated crop, or one jigsaw patch of it. Operations, in this order: flip, the four jitters in
// the picture's own order, rounding and the photometric set (posterize, sharpen, solarize, autocontrast), apply_colour,
// Gaussian blur, solarize, normalisation. All are per pixel except four: contrast needs the mean luminance of the
// picture at that step, sharpen the levels of the eight neighbours, autocontrast the extremes of each channel; levels
// are integers there and fit a byte. Blur needs a square of up to 31 pixels, in float32.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "common/check.h"
#include "common/philox.h"  // SSLFAST_HD
#include "gaussian_blur.h"
#include "view_parameters.h"

namespace sslfast {

#ifdef __CUDA_ARCH__
#define SSLFAST_UNROLL _Pragma("unroll")
#else
#define SSLFAST_UNROLL
#endif

enum Jitter : int { kJitterBrightness, kJitterContrast, kJitterSaturation, kJitterHue };

// The operations on one picture.
struct PictureOps {
  bool flip, photometric, grayscale;
  bool recolours;    // apply_colour changes pixels
  int kinds[4];      // the jitters in the picture's order
  float factors[4];  // of each; hue: turns
  bool applies[4];   // whether it changes anything
  int contrast;      // the step at which contrast applies; 4: it does not
  float level_step;  // posterize: 2^(8 - bits)
  float sharpness, threshold;
  float sigma;           // of the blur; 0: none
  float last_threshold;  // of the solarize behind it

  // Loops have constant bounds and the list of kinds is an integer, so that all of it stays in registers on a GPU.
  SSLFAST_HD static PictureOps read(const float* p) {
    PictureOps ops{};
    ops.flip = p[kFlip] != 0;
    ops.photometric = p[kPhotometric] != 0;
    ops.grayscale = p[kGrayscale] != 0;
    ops.recolours = ops.grayscale;
    int code = static_cast<int>(p[kJitterOrder]);  // rank of the order among the 24, lexicographic
    unsigned left = 0x3210;                        // kinds not yet used, four bits each
    ops.contrast = 4;
    SSLFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int block = i == 0 ? 6 : i == 1 ? 2 : 1, shift = 4 * (code / block);
      const int kind = static_cast<int>(left >> shift & 15u);
      left = (left & ((1u << shift) - 1)) | (left >> (shift + 4) << shift);
      code %= block;
      const float factor = kind == kJitterBrightness   ? p[kBrightness]
                           : kind == kJitterContrast   ? p[kContrast]
                           : kind == kJitterSaturation ? p[kSaturation]
                                                       : p[kHue];
      ops.kinds[i] = kind;
      ops.factors[i] = factor;
      ops.applies[i] = p[kJitter] != 0 && factor != (kind == kJitterHue ? 0.0f : 1.0f);
      if (ops.applies[i] && kind == kJitterContrast) ops.contrast = i;
    }
    ops.level_step = static_cast<float>(1 << (8 - static_cast<int>(p[kPosterizeBits])));
    ops.sharpness = p[kSharpness];
    ops.threshold = p[kSolarizeThreshold];
    ops.sigma = p[kBlurSigma];
    ops.last_threshold = p[kLastSolarizeThreshold];
    return ops;
  }
};

SSLFAST_HD bool parameter_in_range(int index, float value) {
  const ViewParameterInfo info = view_parameter(index);
  return value >= info.lowest && value <= info.highest;  // false for NaN
}

SSLFAST_HD bool parameters_in_range(const float* p) {
  bool in_range = true;
  SSLFAST_UNROLL
  for (int i = 0; i < kViewParameters; ++i) in_range &= parameter_in_range(i, p[i]);
  return in_range;
}

SSLFAST_HD float luminance(float r, float g, float b) {
  return 0.2989f * r + 0.587f * g + 0.114f * b;
}

// A GPU has one instruction each for these, which the compiler does not find in the forms that vectorise on a CPU.
#if defined(__CUDA_ARCH__) || defined(SSLFAST_EMULATE_CUDA)
SSLFAST_HD float clamp_level(float x) {
  return fminf(fmaxf(x, 0.0f), 255.0f);
}
SSLFAST_HD float clamp_unit(float x) {
  return __saturatef(x);
}
SSLFAST_HD float lowest_of(float a, float b, float c) {
  return fminf(fminf(a, b), c);
}
SSLFAST_HD float highest_of(float a, float b, float c) {
  return fmaxf(fmaxf(a, b), c);
}
SSLFAST_HD float quotient(float a, float b) {
  return __fdividef(a, b);  // two units in the last place
}
#else
SSLFAST_HD float clamp_level(float x) {
  x = x > 0.0f ? x : 0.0f;
  return x < 255.0f ? x : 255.0f;
}
SSLFAST_HD float clamp_unit(float x) {
  return x < 0.0f ? 0.0f : x < 1.0f ? x : 1.0f;
}
SSLFAST_HD float lowest_of(float a, float b, float c) {
  return a < b ? (a < c ? a : c) : (b < c ? b : c);
}
SSLFAST_HD float highest_of(float a, float b, float c) {
  return a > b ? (a > c ? a : c) : (b > c ? b : c);
}
SSLFAST_HD float quotient(float a, float b) {
  return a / b;
}
#endif

struct Rgb {
  float r, g, b;
};

// factor * x + level: brightness (level 0) and contrast (level (1 - factor) * mean luminance).
SSLFAST_HD Rgb scale_levels(Rgb x, float factor, float level) {
  return {clamp_level(factor * x.r + level), clamp_level(factor * x.g + level), clamp_level(factor * x.b + level)};
}

SSLFAST_HD Rgb saturate_levels(Rgb x, float factor) {
  return scale_levels(x, factor, (1.0f - factor) * luminance(x.r, x.g, x.b));
}

SSLFAST_HD float ramp(float distance) {  // 1 up to distance 1, 0 from 2 on
  return clamp_unit(2.0f - distance);
}

// Rotates the hue at fixed HSV saturation and value. `turns6`: six times the turns, in [0, 6).
SSLFAST_HD Rgb shift_hue(Rgb x, float turns6) {
  const float low = lowest_of(x.r, x.g, x.b), high = highest_of(x.r, x.g, x.b);
  const float chroma = high - low;
  const float rg = x.r - x.g, gb = x.g - x.b, br = x.b - x.r;
  const float over = chroma > 1e-6f ? chroma : 1e-6f;  // gray pixels have no hue
  float sextant = x.r == high ? gb : x.g == high ? br + 2.0f * chroma : rg + 4.0f * chroma;
  sextant = quotient(sextant, over) + turns6;  // in (-1, 11)
  sextant = sextant >= 6.0f ? sextant - 6.0f : sextant;
  sextant = sextant < 0.0f ? sextant + 6.0f : sextant;
  // Red is high around 0 (and 6), green around 2, blue around 4.
  const float to3 = sextant > 3.0f ? sextant - 3.0f : 3.0f - sextant;
  const float to2 = sextant > 2.0f ? sextant - 2.0f : 2.0f - sextant;
  const float to4 = sextant > 4.0f ? sextant - 4.0f : 4.0f - sextant;
  return {low + chroma * ramp(3.0f - to3), low + chroma * ramp(to2), low + chroma * ramp(to4)};
}

SSLFAST_HD float hue_sixths(float turns) {
  return turns < 0.0f ? 6.0f * turns + 6.0f : 6.0f * turns;
}

// `level`: (1 - factor) * mean luminance for contrast.
SSLFAST_HD Rgb apply_jitter(Rgb x, int kind, float factor, float level) {
  return kind == kJitterHue          ? shift_hue(x, hue_sixths(factor))
         : kind == kJitterSaturation ? saturate_levels(x, factor)
                                     : scale_levels(x, factor, kind == kJitterContrast ? level : 0.0f);
}

// floor(s + f (x - s)), s the rounded mean of the pixel (five times) and its neighbours; `sum` is 13 times that mean.
SSLFAST_HD float sharpen_level(float x, float sum, float factor) {
  const float smooth = rintf(sum / 13.0f);
  return floorf(clamp_level((x - smooth) * factor + smooth));
}

// Autocontrast of one level; a flat channel has low 0 and span 255.
SSLFAST_HD float stretch_level(float x, float low, float span) {
  return floorf((x - low) * 255.0f / span);
}

// Steps 0 .. steps - 1 of a picture's jitters.
SSLFAST_HD Rgb apply_jitters(Rgb x, const PictureOps& ops, int steps, float level) {
  SSLFAST_UNROLL
  for (int step = 0; step < 4; ++step) {
    if (step < steps && ops.applies[step]) x = apply_jitter(x, ops.kinds[step], ops.factors[step], level);
  }
  return x;
}

// The per-pixel operations between the photometric set and the blur, in this order. An operation of its own goes before
// grayscale: blur takes a gray picture to have three equal channels.
SSLFAST_HD Rgb apply_colour(Rgb x, const PictureOps& ops) {
  if (ops.grayscale) x.r = x.g = x.b = luminance(x.r, x.g, x.b);
  return x;
}

SSLFAST_HD float solarize_level(float x, float threshold) {
  return x >= threshold ? 255.0f - x : x;
}

// The last operation, behind the blur.
SSLFAST_HD Rgb solarize(Rgb x, float threshold) {
  return {solarize_level(x.r, threshold), solarize_level(x.g, threshold), solarize_level(x.b, threshold)};
}

// Position of a picture in a plane of its crop: pixel (y, x) is at base + y * down + x * right.
struct PixelMap {
  int64_t base;
  int64_t down, right;
};

// (x / 255 - mean) / std as x * scale + shift, per channel.
struct Normalisation {
  float scale[3], shift[3];

  Normalisation() = default;
  Normalisation(const double (&mean)[3], const float (&std_of)[3]) {
    for (int c = 0; c < 3; ++c) {
      scale[c] = 1.0f / (255.0f * std_of[c]);
      shift[c] = static_cast<float>(-mean[c]) / std_of[c];
    }
  }
};

struct ViewShape {
  int64_t batch, size, grid, side;  // grid 0: whole crops, side = size

  SSLFAST_HD int64_t pictures() const { return grid == 0 ? 1 : grid * grid; }
  SSLFAST_HD int64_t cell() const { return size / grid; }
  SSLFAST_HD bool has_cell(int64_t c) const { return c >= 0 && c < grid * grid; }
  SSLFAST_HD bool has_offset(int64_t y, int64_t x) const {
    return y >= 0 && x >= 0 && y <= cell() - side && x <= cell() - side;
  }

  // `turns` counter-clockwise, then the side x side square at (top, left) of the rotated crop, then a mirror.
  SSLFAST_HD PixelMap map(int turns, int64_t top, int64_t left, bool flip) const {
    const int64_t last = size - 1;
    // Pixel (y, x) of the rotated crop is crop pixel (y, x), (x, last - y), (last - y, last - x), (last - x, y).
    PixelMap m{};
    switch (turns & 3) {
      case 0:
        m = {0, size, 1};
        break;
      case 1:
        m = {last, -1, size};
        break;
      case 2:
        m = {last * size + last, -size, -1};
        break;
      default:
        m = {last * size, 1, -size};
        break;
    }
    m.base += top * m.down + left * m.right;
    if (flip) {
      m.base += (side - 1) * m.right;
      m.right = -m.right;
    }
    return m;
  }
};

inline ViewShape check_render_views(const Tensor& crops,                         // [B, 3, S, S] uint8
                                    const Tensor& parameters,                    // [B, M, kViewParameters] fp32
                                    const std::optional<Tensor>& quarter_turns,  // [B] int64
                                    const std::optional<Tensor>& permutation,    // [B, M] int64
                                    const std::optional<Tensor>& offsets,        // [B, M, 2] int64
                                    int64_t grid, int64_t patch_size, const double* mean, const float* std_of) {
  constexpr const char* op = "render_views";
  SSLFAST_CHECK(crops.scalar_type() == ScalarType::Byte, op, ": crops must be uint8, got ",
                torch::headeronly::toString(crops.scalar_type()));
  SSLFAST_CHECK(crops.dim() == 4 && crops.size(1) == 3 && crops.size(2) == crops.size(3), op,
                ": crops must have shape [B, 3, S, S], got ", shape_string(crops));
  SSLFAST_CHECK(crops.size(2) >= 1 && crops.size(2) <= 16384, op, ": crops must have a side in [1, 16384], got ",
                crops.size(2));
  ViewShape shape{crops.size(0), crops.size(2), grid, grid == 0 ? crops.size(2) : patch_size};
  SSLFAST_CHECK(grid >= 0 && grid <= shape.size, op, ": grid must be in [0, ", shape.size, "], got ", grid);
  if (grid > 0) {
    SSLFAST_CHECK(patch_size >= 1 && patch_size <= shape.cell(), op, ": patch_size must be in [1, ", shape.cell(),
                  "], the cell side of ", shape.size, "-pixel crops in a grid of ", grid, ", got ", patch_size);
    SSLFAST_CHECK(permutation && offsets, op, ": a jigsaw needs permutation and offsets");
    check_int64(op, "permutation", *permutation);
    check_int64(op, "offsets", *offsets);
    SSLFAST_CHECK(permutation->dim() == 2 && permutation->size(0) == shape.batch && permutation->size(1) == grid * grid,
                  op, ": permutation must be int64 [B, grid**2] = [", shape.batch, ", ", grid * grid, "], got ",
                  shape_string(*permutation), "; crops are ", shape_string(crops));
    SSLFAST_CHECK(offsets->dim() == 3 && offsets->size(0) == shape.batch && offsets->size(1) == grid * grid &&
                      offsets->size(2) == 2,
                  op, ": offsets must be int64 [B, grid**2, 2] = [", shape.batch, ", ", grid * grid, ", 2], got ",
                  shape_string(*offsets), "; crops are ", shape_string(crops));
    check_same_device(op, "permutation", *permutation, "crops", crops);
    check_same_device(op, "offsets", *offsets, "crops", crops);
  }
  if (quarter_turns) {
    check_index(op, "quarter_turns", *quarter_turns);
    SSLFAST_CHECK(quarter_turns->size(0) == shape.batch, op, ": quarter_turns must have shape [B] = [", shape.batch,
                  "], got ", shape_string(*quarter_turns), "; crops are ", shape_string(crops));
    check_same_device(op, "quarter_turns", *quarter_turns, "crops", crops);
  }
  SSLFAST_CHECK(parameters.scalar_type() == ScalarType::Float && parameters.dim() == 3 &&
                    parameters.size(0) == shape.batch && parameters.size(1) == shape.pictures() &&
                    parameters.size(2) == kViewParameters,
                op, ": parameters must be fp32 [B, M, ", kViewParameters, "] = [", shape.batch, ", ", shape.pictures(),
                ", ", kViewParameters, "], got ", shape_string(parameters), " ",
                torch::headeronly::toString(parameters.scalar_type()), "; crops are ", shape_string(crops));
  check_same_device(op, "parameters", parameters, "crops", crops);
  for (int c = 0; c < 3; ++c) {
    SSLFAST_CHECK(mean[c] >= -1e6 && mean[c] <= 1e6, op, ": mean must be in [-1e+06, 1e+06], got ", mean[c]);
    SSLFAST_CHECK(std_of[c] >= 1e-6f && std_of[c] <= 1e6f, op, ": std must be positive, in [1e-06, 1e+06], got ",
                  std_of[c]);
  }
  return shape;
}

// fp32, bf16 and fp16: calls body with a value of the type.
template <typename Body>
void dispatch_view_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float(0));
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16(0));
    case ScalarType::Half:
      return body(torch::headeronly::Half(0));
    default:
      SSLFAST_CHECK(false, "render_views: dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace sslfast
