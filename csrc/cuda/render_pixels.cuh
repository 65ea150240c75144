// render_views: the pixels of a picture on their way through a block, four neighbours of a row at a time.
#pragma once

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "render_views.h"

namespace sslfast {
namespace render {

constexpr int kMaxThreads = 640, kMaxWarps = kMaxThreads / kWarpSize;
// Upper bound of the kernel's static shared memory.
constexpr int64_t kStaticShared = 1024;

template <typename Out>
struct Problem {
  const uint8_t* __restrict__ crops;        // [B, 3, S, S]
  const float* __restrict__ parameters;     // [B, M, kViewParameters]
  const int64_t* __restrict__ turns;        // [B] or null
  const int64_t* __restrict__ permutation;  // [B, M] or null
  const int64_t* __restrict__ offsets;      // [B, M, 2] or null
  ViewShape shape;
  Normalisation normal;
  bool channels_last, photometric;
  bool quads;             // rows of the result are whole quads of pixels, at addresses for vector stores
  uint8_t* scratch;       // [B * M, 3, side, side] levels, or null: in shared memory
  float* unblurred;       // [B * M, 3, side, side] levels of the pictures that have a sigma, or null
  Out* __restrict__ out;  // [B * M, 3, side, side], or [B * M, side, side, 3]
};

struct Extremes {
  float low, high;
};

// Returns the result to all threads of the block; `shared` holds kMaxWarps values and may be reused afterwards.
template <typename T, typename Merge>
__device__ __forceinline__ T block_reduce(T x, T* shared, T neutral, const Merge& merge) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = merge(x, offset);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = lane < warps ? shared[lane] : neutral;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = merge(x, offset);
  __syncthreads();
  return x;
}

template <typename Out>
__device__ __forceinline__ void write_pixel(const Problem<Out>& p, Rgb x, int64_t picture, int pixel, int pixels) {
  x = solarize(x, p.parameters[picture * kViewParameters + kLastSolarizeThreshold]);
  Out* out = p.out + picture * 3 * pixels + (p.channels_last ? 3 * pixel : pixel);
  const int step = p.channels_last ? 1 : pixels;
  out[0] = static_cast<Out>(x.r * p.normal.scale[0] + p.normal.shift[0]);
  out[step] = static_cast<Out>(x.g * p.normal.scale[1] + p.normal.shift[1]);
  out[2 * step] = static_cast<Out>(x.b * p.normal.scale[2] + p.normal.shift[2]);
}

// Neighbouring pixels of a row that a thread works on at a time.
constexpr int kPixels = 4;

// The quads of a picture in the order of a block's threads, without a division for each.
struct QuadWalk {
  int x, y;  // of the first pixel
  int side, step_x, step_y;

  __device__ __forceinline__ explicit QuadWalk(int side) : side(side) {
    const int quads = (side + kPixels - 1) / kPixels;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    x = thread % quads * kPixels, y = thread / quads;
    step_x = threads % quads * kPixels, step_y = threads / quads;
  }
  __device__ __forceinline__ bool more() const { return y < side; }
  __device__ __forceinline__ int pixel() const { return y * side + x; }
  __device__ __forceinline__ int count() const { return min(kPixels, side - x); }
  __device__ __forceinline__ void advance() {
    x += step_x, y += step_y;
    if (x >= side) x -= (side + kPixels - 1) / kPixels * kPixels, ++y;
  }
};

// Pixels of a crop on the way from left to right and down in the picture; offsets fit 32 bits, a crop's side is
// limited.
struct CropWalk {
  const uint8_t* crop;  // the picture's first pixel in the first plane
  int down, right, plane;

  // A quad's levels: words where the pixels are neighbours in memory too, else bytes; those past `count` repeat the
  // last.
  __device__ __forceinline__ void read(const QuadWalk& at, Rgb (&x)[kPixels]) const {
    const int offset = at.y * down + at.x * right, count = at.count();
    const uint8_t* lowest = crop + (offset + (right == -1 ? right * (kPixels - 1) : 0));
    if (count == kPixels && (right == 1 || right == -1) && (reinterpret_cast<uintptr_t>(lowest) | plane) % 4 == 0) {
      unsigned words[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        words[c] = __ldg(reinterpret_cast<const unsigned*>(lowest + c * plane));
        if (right == -1) words[c] = __byte_perm(words[c], 0u, 0x0123);
      }
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        x[i] = {static_cast<float>(words[0] >> 8 * i & 255u), static_cast<float>(words[1] >> 8 * i & 255u),
                static_cast<float>(words[2] >> 8 * i & 255u)};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const uint8_t* source = crop + (offset + min(i, count - 1) * right);
      x[i] = {static_cast<float>(__ldg(source)), static_cast<float>(__ldg(source + plane)),
              static_cast<float>(__ldg(source + 2 * plane))};
    }
  }
};

template <typename Out>
__device__ __forceinline__ void write_pixels(const Problem<Out>& p, const Rgb (&x)[kPixels], int64_t picture, int pixel,
                                             int count, int pixels) {
  if (!p.quads) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i < count) write_pixel(p, x[i], picture, pixel + i, pixels);
    }
    return;
  }
  const float threshold = p.parameters[picture * kViewParameters + kLastSolarizeThreshold];
  Out values[kPixels][3];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const Rgb last = solarize(x[i], threshold);
    values[i][0] = static_cast<Out>(last.r * p.normal.scale[0] + p.normal.shift[0]);
    values[i][1] = static_cast<Out>(last.g * p.normal.scale[1] + p.normal.shift[1]);
    values[i][2] = static_cast<Out>(last.b * p.normal.scale[2] + p.normal.shift[2]);
  }
  Out* out = p.out + picture * 3 * pixels + (p.channels_last ? 3 * pixel : pixel);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    Quad<Out> quad;
    if (p.channels_last) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) quad.x[i] = values[(kPixels * c + i) / 3][(kPixels * c + i) % 3];
      store_quad(out + kPixels * c, quad);
    } else {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) quad.x[i] = values[i][c];
      store_quad(out + c * pixels, quad);
    }
  }
}

// Applies apply_colour, then writes the pixels, or stores their levels for blur_kernel: one plane of a gray picture,
// else three.
template <bool kBlur, typename Out>
__device__ __forceinline__ void finish_pixels(const Problem<Out>& p, const PictureOps& ops, Rgb (&x)[kPixels],
                                              int64_t picture, int pixel, int count, int pixels) {
#pragma unroll
  for (int i = 0; i < kPixels; ++i) x[i] = apply_colour(x[i], ops);
  if (!kBlur || ops.sigma == 0) {
    write_pixels(p, x, picture, pixel, count, pixels);
    return;
  }
  float* levels = p.unblurred + picture * 3 * pixels + pixel;
  for (int i = 0; i < kPixels; ++i) {
    if (i >= count) break;
    levels[i] = x[i].r;
    if (ops.grayscale) continue;
    levels[pixels + i] = x[i].g;
    levels[2 * pixels + i] = x[i].b;
  }
}

// The jitters of a picture, in one loop over the steps: the kinds as four bits each, so that nothing is indexed.
struct JitterSteps {
  unsigned kinds = 0, applies = 0;
  float brightness, contrast, saturation, turns6;

  __device__ __forceinline__ JitterSteps(const PictureOps& ops, const float* parameters)
      : brightness(parameters[kBrightness]),
        contrast(parameters[kContrast]),
        saturation(parameters[kSaturation]),
        turns6(hue_sixths(parameters[kHue])) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      kinds |= static_cast<unsigned>(ops.kinds[i]) << 4 * i;
      applies |= (ops.applies[i] ? 1u : 0u) << i;
    }
  }

  // Steps 0 .. steps - 1. `level`: (1 - factor) * mean luminance for contrast.
  __device__ __forceinline__ void apply(Rgb (&x)[kPixels], int steps, float level) const {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (!(applies >> step & 1u)) continue;
      const unsigned kind = kinds >> 4 * step & 15u;
      if (kind == kJitterHue) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) x[i] = shift_hue(x[i], turns6);
      } else if (kind == kJitterSaturation) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) x[i] = saturate_levels(x[i], saturation);
      } else {
        const bool is_contrast = kind == kJitterContrast;
        const float factor = is_contrast ? contrast : brightness, constant = is_contrast ? level : 0.0f;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) x[i] = scale_levels(x[i], factor, constant);
      }
    }
  }
};

// Posterized levels of a quad of one plane, sharpened and solarized; those past `count` repeat the last.
__device__ __forceinline__ void sharpened_levels(const uint8_t* plane, const QuadWalk& at, const PictureOps& ops,
                                                 float (&levels)[kPixels]) {
  const int side = at.side, count = at.count();
  const uint8_t* row = plane + at.pixel();
  const bool inner_row = at.y > 0 && at.y < side - 1;
  // Sums of the three pixels of a column, from the column left of the quad on.
  int columns[kPixels + 2];
#pragma unroll
  for (int j = 0; j < kPixels + 2; ++j) {
    const int x = at.x + j - 1;
    const bool inside = inner_row && x >= 0 && x < side;
    columns[j] = inside ? row[j - 1 - side] + row[j - 1] + row[j - 1 + side] : 0;
  }
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int x = at.x + i;
    float level = row[min(i, count - 1)];
    if (inner_row && x > 0 && x < side - 1) {
      const float sum = static_cast<float>(columns[i] + columns[i + 1] + columns[i + 2]) + 4.0f * level;
      // sum / 13 is never halfway between two integers: the product rounds to the same one.
      const float smooth = rintf(sum * (1.0f / 13));
      level = floorf(clamp_level((level - smooth) * ops.sharpness + smooth));
    }
    levels[i] = level >= ops.threshold ? 255.0f - level : level;
    if (i > 0 && i >= count) levels[i] = levels[i - 1];
  }
}

// stretch_level of integers: half a unit keeps the product with the rounded inverse on the right side of each integer.
__device__ __forceinline__ float stretched(float level, float low, float inverse_span) {
  return floorf(((level - low) * 255.0f + 0.5f) * inverse_span);
}

}  // namespace render
}  // namespace sslfast
