#include "render_views.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "common/simd.h"

namespace sslfast {
namespace {

constexpr int64_t kStrip = 512;  // pixels, few enough to stay in the L1 cache across all operations

template <typename Out>
struct Problem {
  const uint8_t* crops;        // [B, 3, S, S]
  const float* parameters;     // [B, M, kViewParameters]
  const int64_t* turns;        // [B] or null
  const int64_t* permutation;  // [B, M] or null
  const int64_t* offsets;      // [B, M, 2] or null
  ViewShape shape;
  Normalisation normal;
  bool channels_last;
  Out* out;            // [B * M, 3, side, side], or [B * M, side, side, 3]
  int64_t begin, end;  // pictures of this call
};

struct Strip {
  alignas(64) float r[kStrip], g[kStrip], b[kStrip];
};

// Buffers for operations that need a pixel's neighbourhood; they grow to the largest picture.
struct Buffers {
  std::vector<uint8_t> levels;  // [2, 3, n] of the photometric set
  std::vector<float> planes;    // [3, n] before the blur
};

// Pixels first .. first + count - 1 of a picture, row by row.
SSLFAST_INLINE void gather(const uint8_t* crop, int64_t plane, const PixelMap& map, int64_t side, int64_t first,
                           int64_t count, Strip& strip) {
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / side, x = (first + done) % side, run = std::min(side - x, count - done);
    const uint8_t* source = crop + map.base + y * map.down + x * map.right;
    float* targets[3] = {strip.r + done, strip.g + done, strip.b + done};
    for (int c = 0; c < 3; ++c, source += plane) {
      float* __restrict__ target = targets[c];
      if (map.right == 1) {
#pragma omp simd
        for (int64_t i = 0; i < run; ++i) target[i] = source[i];
      } else if (map.right == -1) {
#pragma omp simd
        for (int64_t i = 0; i < run; ++i) target[i] = source[-i];
      } else {
        for (int64_t i = 0; i < run; ++i) target[i] = source[i * map.right];
      }
    }
    done += run;
  }
}

template <int kKind>
SSLFAST_INLINE void jitter_strip(Strip& s, int64_t count, float factor, float level) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Rgb x = apply_jitter({s.r[i], s.g[i], s.b[i]}, kKind, factor, level);
    s.r[i] = x.r, s.g[i] = x.g, s.b[i] = x.b;
  }
}

SSLFAST_INLINE void jitter_strip(const PictureOps& ops, int steps, float level, Strip& strip, int64_t count) {
  for (int step = 0; step < steps; ++step) {
    if (!ops.applies[step]) continue;
    switch (ops.kinds[step]) {
      case kJitterBrightness:
        jitter_strip<kJitterBrightness>(strip, count, ops.factors[step], 0.0f);
        break;
      case kJitterContrast:
        jitter_strip<kJitterContrast>(strip, count, ops.factors[step], level);
        break;
      case kJitterSaturation:
        jitter_strip<kJitterSaturation>(strip, count, ops.factors[step], 0.0f);
        break;
      default:
        jitter_strip<kJitterHue>(strip, count, ops.factors[step], 0.0f);
        break;
    }
  }
}

// Solarizes and normalises a strip and writes it out.
template <typename Out>
SSLFAST_INLINE void write_strip(const Problem<Out>& p, const PictureOps& ops, const Strip& s, int64_t picture,
                                int64_t first, int64_t count) {
  const float threshold = ops.last_threshold;
  const int64_t pixels = p.shape.side * p.shape.side;
  const float* planes[3] = {s.r, s.g, s.b};
  Out* __restrict__ out = p.out + picture * 3 * pixels;
  if (p.channels_last) {
    out += first * 3;
    for (int64_t i = 0; i < count; ++i) {
      for (int c = 0; c < 3; ++c)
        out[3 * i + c] =
            static_cast<Out>(solarize_level(planes[c][i], threshold) * p.normal.scale[c] + p.normal.shift[c]);
    }
  } else {
    for (int c = 0; c < 3; ++c) {
      Out* __restrict__ target = out + c * pixels + first;
      const float* __restrict__ source = planes[c];
      const float scale = p.normal.scale[c], shift = p.normal.shift[c];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        target[i] = static_cast<Out>(solarize_level(source[i], threshold) * scale + shift);
      }
    }
  }
}

// Applies apply_colour, then writes the strip out, or into `planes` if the picture is blurred.
template <typename Out>
SSLFAST_INLINE void finish_strip(const Problem<Out>& p, const PictureOps& ops, Strip& s, int64_t picture, int64_t first,
                                 int64_t count, float* planes) {
  if (ops.recolours) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const Rgb x = apply_colour({s.r[i], s.g[i], s.b[i]}, ops);
      s.r[i] = x.r, s.g[i] = x.g, s.b[i] = x.b;
    }
  }
  if (ops.sigma == 0) {
    write_strip(p, ops, s, picture, first, count);
    return;
  }
  const int64_t pixels = p.shape.side * p.shape.side;
  std::copy_n(s.r, count, planes + first);
  if (ops.grayscale) return;
  std::copy_n(s.g, count, planes + pixels + first);
  std::copy_n(s.b, count, planes + 2 * pixels + first);
}

// Blurs planes [3, n] ([n] of a gray picture) row by row: down the columns into a line, then along it.
template <typename Out>
SSLFAST_INLINE void blur_picture(const Problem<Out>& p, const PictureOps& ops, const float* planes, int64_t picture,
                                 Strip& strip) {
  constexpr int64_t kPiece = 16;  // sums kept in registers across the taps
  const int64_t side = p.shape.side;
  const int radius = blur_radius(ops.sigma, side);
  float weights[kMaxBlurRadius + 1];
  blur_weights(ops.sigma, radius, weights);
  alignas(64) float line[kStrip + 2 * kMaxBlurRadius + kPiece] = {};
  float* targets[3] = {strip.r, strip.g, strip.b};
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t x0 = 0; x0 < side; x0 += kStrip) {
      const int64_t count = std::min(kStrip, side - x0);
      // line[i] is column x0 - radius + i, from the first to the last one inside the picture.
      const int64_t begin = std::max<int64_t>(x0 - radius, 0), end = std::min(x0 + count + radius, side);
      float* inside = line + begin - (x0 - radius);
      for (int c = 0; c < (ops.grayscale ? 1 : 3); ++c) {
        const float* plane = planes + c * side * side + begin;
        const float* rows[2 * kMaxBlurRadius + 1];
        for (int k = -radius; k <= radius; ++k) rows[k + radius] = plane + reflect(y + k, side) * side;
        const auto sum_rows = [&](int64_t x, int64_t width) __attribute__((always_inline)) {
          float sum[kPiece];
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) sum[i] = weights[0] * rows[radius][x + i];
          for (int k = 1; k <= radius; ++k) {
            const float* above = rows[radius - k] + x;
            const float* below = rows[radius + k] + x;
            const float weight = weights[k];
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) sum[i] += weight * (above[i] + below[i]);
          }
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) inside[x + i] = sum[i];
        };
        const int64_t width = end - begin, whole = width - width % kPiece;
        for (int64_t x = 0; x < whole; x += kPiece) sum_rows(x, kPiece);
        sum_rows(whole, width - whole);
        for (int64_t x = x0 - radius; x < begin; ++x) line[x - (x0 - radius)] = inside[-x - begin];
        for (int64_t x = end; x < x0 + count + radius; ++x) inside[x - begin] = inside[2 * side - 2 - x - begin];
        for (int64_t x = 0; x < count; x += kPiece) {  // columns past the end are not used
          const float* __restrict__ centre = line + radius + x;
          float sum[kPiece];
#pragma omp simd
          for (int64_t i = 0; i < kPiece; ++i) sum[i] = weights[0] * centre[i];
          for (int k = 1; k <= radius; ++k) {
            const float weight = weights[k];
#pragma omp simd
            for (int64_t i = 0; i < kPiece; ++i) sum[i] += weight * (centre[i - k] + centre[i + k]);
          }
#pragma omp simd
          for (int64_t i = 0; i < kPiece; ++i) targets[c][x + i] = sum[i];
        }
      }
      if (ops.grayscale) {
        std::copy_n(strip.r, count, strip.g);
        std::copy_n(strip.r, count, strip.b);
      }
      write_strip(p, ops, strip, picture, y * side + x0, count);
    }
  }
}

// Levels [3, n] posterized -> sharpened and solarized.
SSLFAST_INLINE void sharpen_solarize(const uint8_t* levels, int64_t side, const PictureOps& ops, uint8_t* out) {
  const float sharpness = ops.sharpness, threshold = ops.threshold;
  for (int64_t line = 0; line < 3 * side; ++line) {
    const int64_t y = line % side;
    const uint8_t* __restrict__ row = levels + line * side;
    uint8_t* __restrict__ target = out + line * side;
    const bool border = side < 3 || y == 0 || y == side - 1;
    const uint8_t* __restrict__ above = border ? row : row - side;
    const uint8_t* __restrict__ below = border ? row : row + side;
    const auto finish = [&](float x) __attribute__((always_inline)) {
      return static_cast<uint8_t>(static_cast<int>(x >= threshold ? 255.0f - x : x));
    };
    if (border) {
      for (int64_t x = 0; x < side; ++x) target[x] = finish(row[x]);
      continue;
    }
    target[0] = finish(row[0]);
    target[side - 1] = finish(row[side - 1]);
#pragma omp simd
    for (int64_t x = 1; x < side - 1; ++x) {
      const int sum = above[x - 1] + above[x] + above[x + 1] + row[x - 1] + row[x + 1] + below[x - 1] + below[x] +
                      below[x + 1] + 5 * row[x];
      target[x] = finish(sharpen_level(static_cast<float>(row[x]), static_cast<float>(sum), sharpness));
    }
  }
}

// Sharpness, solarize and autocontrast of the posterized levels, then the remaining operations.
template <typename Out>
SSLFAST_INLINE void finish_photometric(const Problem<Out>& p, const PictureOps& ops, int64_t picture, Buffers& buffers,
                                       Strip& strip) {
  const int64_t side = p.shape.side, pixels = side * side;
  uint8_t* solarized = buffers.levels.data() + 3 * pixels;
  sharpen_solarize(buffers.levels.data(), side, ops, solarized);
  float low[3], span[3];
  for (int c = 0; c < 3; ++c) {
    const auto [smallest, largest] = std::minmax_element(solarized + c * pixels, solarized + (c + 1) * pixels);
    const bool flat = *smallest == *largest;
    low[c] = flat ? 0.0f : *smallest;
    span[c] = flat ? 255.0f : static_cast<float>(*largest - *smallest);
  }
  for (int64_t first = 0; first < pixels; first += kStrip) {
    const int64_t count = std::min(kStrip, pixels - first);
    float* planes[3] = {strip.r, strip.g, strip.b};
    for (int c = 0; c < 3; ++c) {
      const uint8_t* __restrict__ source = solarized + c * pixels + first;
      float* __restrict__ target = planes[c];
      const float lowest = low[c], width = span[c];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) target[i] = stretch_level(source[i], lowest, width);
    }
    finish_strip(p, ops, strip, picture, first, count, buffers.planes.data());
  }
}

template <typename Out>
SSLFAST_INLINE void render_picture(const Problem<Out>& p, int64_t picture, Buffers& buffers) {
  const int64_t pictures = p.shape.pictures(), sample = picture / pictures, side = p.shape.side;
  const int64_t plane = p.shape.size * p.shape.size, pixels = side * side;
  const PictureOps ops = PictureOps::read(p.parameters + picture * kViewParameters);
  int64_t top = 0, left = 0;
  if (p.permutation != nullptr) {
    const int64_t cell = p.permutation[picture];
    const int64_t* offset = p.offsets + (sample * pictures + cell) * 2;
    top = cell / p.shape.grid * p.shape.cell() + offset[0];
    left = cell % p.shape.grid * p.shape.cell() + offset[1];
  }
  const int turns = p.turns == nullptr ? 0 : static_cast<int>(p.turns[sample] & 3);
  const PixelMap map = p.shape.map(turns, top, left, ops.flip);
  const uint8_t* crop = p.crops + sample * 3 * plane;
  Strip strip;

  float level = 0.0f;
  if (ops.contrast < 4) {
    double total = 0;
    for (int64_t first = 0; first < pixels; first += kStrip) {
      const int64_t count = std::min(kStrip, pixels - first);
      gather(crop, plane, map, side, first, count, strip);
      jitter_strip(ops, ops.contrast, 0.0f, strip, count);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += luminance(strip.r[i], strip.g[i], strip.b[i]);
      total += static_cast<double>(sum);
    }
    level = (1.0f - ops.factors[ops.contrast]) * static_cast<float>(total / static_cast<double>(pixels));
  }

  if (ops.photometric) buffers.levels.resize(6 * pixels);
  if (ops.sigma > 0) buffers.planes.resize(3 * pixels);
  for (int64_t first = 0; first < pixels; first += kStrip) {
    const int64_t count = std::min(kStrip, pixels - first);
    gather(crop, plane, map, side, first, count, strip);
    jitter_strip(ops, 4, level, strip, count);
    if (!ops.photometric) {
      finish_strip(p, ops, strip, picture, first, count, buffers.planes.data());
      continue;
    }
    const float* planes[3] = {strip.r, strip.g, strip.b};
    for (int c = 0; c < 3; ++c) {
      uint8_t* __restrict__ target = buffers.levels.data() + c * pixels + first;
      const float* __restrict__ source = planes[c];
      const int mask = ~(static_cast<int>(ops.level_step) - 1);  // posterize keeps the upper bits
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<uint8_t>(static_cast<int>(rintf(source[i])) & mask);
    }
  }
  if (ops.photometric) finish_photometric(p, ops, picture, buffers, strip);
  if (ops.sigma > 0) blur_picture(p, ops, buffers.planes.data(), picture, strip);
}

template <typename Out>
SSLFAST_INLINE void render_pictures(const Problem<Out>& p) {
  Buffers buffers;
  for (int64_t picture = p.begin; picture < p.end; ++picture) render_picture<Out>(p, picture, buffers);
}

SSLFAST_MULTIVERSION(render_pictures_best, render_pictures, const Problem<T>&)

std::string range_text(const ViewParameterInfo& info) {
  if (info.lowest == -FLT_MAX && info.highest == FLT_MAX) return "finite";
  std::ostringstream out;
  out << "in [" << info.lowest << ", " << info.highest << "]";
  return out.str();
}

void check_values(const ViewShape& shape, bool photometric, bool blur, const float* parameters,
                  const int64_t* permutation, const int64_t* offsets) {
  for (int64_t i = 0; i < shape.batch * shape.pictures(); ++i) {
    const float* p = parameters + i * kViewParameters;
    for (int index = 0; index < kViewParameters; ++index) {
      const ViewParameterInfo info = view_parameter(index);
      SSLFAST_CHECK(parameter_in_range(index, p[index]), "render_views: ", info.name, " must be ", range_text(info),
                    ", got ", p[index], " at sample ", i / shape.pictures(), ", picture ", i % shape.pictures(),
                    " of parameters");
    }
    SSLFAST_CHECK(photometric || p[kPhotometric] == 0, "render_views: photometric is False, but the gate of sample ",
                  i / shape.pictures(), ", picture ", i % shape.pictures(), " is open; pass photometric=True");
    SSLFAST_CHECK(blur || p[kBlurSigma] == 0, "render_views: blur is False, but sample ", i / shape.pictures(),
                  ", picture ", i % shape.pictures(), " has a sigma; pass blur=True");
    if (permutation == nullptr) continue;
    SSLFAST_CHECK(shape.has_cell(permutation[i]), "render_views: permutation must be in [0, ", shape.pictures(),
                  "), got ", permutation[i], " at sample ", i / shape.pictures(), ", slot ", i % shape.pictures());
    SSLFAST_CHECK(shape.has_offset(offsets[2 * i], offsets[2 * i + 1]), "render_views: offsets must be in [0, ",
                  shape.cell() - shape.side, "], got (", offsets[2 * i], ", ", offsets[2 * i + 1], ") at sample ",
                  i / shape.pictures(), ", cell ", i % shape.pictures(), "; crops have a side of ", shape.size);
  }
}

Tensor render_views_cpu(const Tensor& crops_, const Tensor& parameters_, std::optional<Tensor> turns_,
                        std::optional<Tensor> permutation_, std::optional<Tensor> offsets_, int64_t grid,
                        int64_t patch_size, double mean_r, double mean_g, double mean_b, double std_r, double std_g,
                        double std_b, ScalarType dtype, bool channels_last, bool photometric, bool blur) {
  const double mean[3] = {mean_r, mean_g, mean_b};
  const float std_of[3] = {float(std_r), float(std_g), float(std_b)};
  const ViewShape shape =
      check_render_views(crops_, parameters_, turns_, permutation_, offsets_, grid, patch_size, mean, std_of);
  const Tensor crops = readable("render_views", "crops", crops_),
               parameters = readable("render_views", "parameters", parameters_);
  const std::optional<Tensor> turns = readable("render_views", "quarter_turns", turns_);
  std::optional<Tensor> permutation, offsets;
  if (grid > 0) {
    permutation = readable("render_views", "permutation", permutation_);
    offsets = readable("render_views", "offsets", offsets_);
  }
  const auto values = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
  };
  const float* numbers = static_cast<const float*>(parameters.const_data_ptr());
  check_values(shape, photometric, blur, numbers, values(permutation), values(offsets));
  const int64_t pictures = shape.batch * shape.pictures(), side = shape.side;
  const std::vector<int64_t> sizes =
      channels_last ? std::vector<int64_t>{pictures, side, side, 3} : std::vector<int64_t>{pictures, 3, side, side};
  Tensor out = allocate("render_views", crops, sizes, dtype);
  if (pictures == 0) return out;
  dispatch_view_dtype(dtype, [&](auto zero) {
    using Out = decltype(zero);
    Problem<Out> p{};
    p.crops = static_cast<const uint8_t*>(crops.const_data_ptr());
    p.parameters = numbers;
    p.turns = values(turns);
    p.permutation = values(permutation);
    p.offsets = values(offsets);
    p.shape = shape;
    p.normal = Normalisation(mean, std_of);
    p.channels_last = channels_last;
    p.out = static_cast<Out*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, pictures, 1, [&](int64_t begin, int64_t end) {
      Problem<Out> some = p;
      some.begin = begin;
      some.end = end;
      render_pictures_best<Out>(some);
    });
  });
  return out;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("render_views", TORCH_BOX(&sslfast::render_views_cpu));
}
