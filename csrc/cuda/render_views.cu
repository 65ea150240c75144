#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "render_views.h"

namespace sslfast {
namespace {

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
  Out values[kPixels][3];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    values[i][0] = static_cast<Out>(x[i].r * p.normal.scale[0] + p.normal.shift[0]);
    values[i][1] = static_cast<Out>(x[i].g * p.normal.scale[1] + p.normal.shift[1]);
    values[i][2] = static_cast<Out>(x[i].b * p.normal.scale[2] + p.normal.shift[2]);
  }
  Out* out = p.out + picture * 3 * pixels + (p.channels_last ? 3 * pixel : pixel);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    Quad<Out> quad;
    if (p.channels_last) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) quad.x[i] = values[(kPixels * c + i) / 3][(kPixels * c + i) % 3];
      *reinterpret_cast<Quad<Out>*>(out + kPixels * c) = quad;
    } else {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) quad.x[i] = values[i][c];
      *reinterpret_cast<Quad<Out>*>(out + c * pixels) = quad;
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

// One block renders one picture, four pixels of a row at a time for a thread. Its bytes are read once, twice if
// contrast needs the mean: jitters before it clamp levels or turn hues, so that no mean of the source gives theirs. The
// levels of the photometric set, which are integers, are kept in shared memory for neighbours and extremes. kBlur
// false: every sigma is 0, which takes half the registers on 10.0.
template <typename Out, bool kBlur>
__global__ void __launch_bounds__(kMaxThreads, 1) render_kernel(const Problem<Out> p) {
  __shared__ float sums[kMaxWarps];
  __shared__ Extremes extremes[kMaxWarps];
  __shared__ float stretch_low[3], stretch_inverse_span[3];  // autocontrast of each channel
  const int64_t picture = blockIdx.x, pictures = p.shape.pictures(), sample = picture / pictures;
  const int side = static_cast<int>(p.shape.side), pixels = side * side;
  const int64_t plane = p.shape.size * p.shape.size;
  const float* parameters = p.parameters + picture * kViewParameters;
  if (!parameters_in_range(parameters)) __trap();
  const PictureOps ops = PictureOps::read(parameters);
  if ((ops.photometric && !p.photometric) || (ops.sigma != 0 && !kBlur)) __trap();
  int64_t top = 0, left = 0;
  if (p.permutation != nullptr) {
    const int64_t cell = p.permutation[picture];
    if (!p.shape.has_cell(cell)) __trap();
    const int64_t* offset = p.offsets + (sample * pictures + cell) * 2;
    if (!p.shape.has_offset(offset[0], offset[1])) __trap();
    top = cell / p.shape.grid * p.shape.cell() + offset[0];
    left = cell % p.shape.grid * p.shape.cell() + offset[1];
  }
  const int turns = p.turns == nullptr ? 0 : static_cast<int>(p.turns[sample] & 3);
  const PixelMap map = p.shape.map(turns, top, left, ops.flip);
  const CropWalk crop{p.crops + sample * 3 * plane + map.base, static_cast<int>(map.down), static_cast<int>(map.right),
                      static_cast<int>(plane)};
  const JitterSteps jitters(ops, parameters);

  float level = 0.0f;
  if (ops.contrast < 4) {
    float sum = 0.0f;
    for (QuadWalk at(side); at.more(); at.advance()) {
      Rgb x[kPixels];
      crop.read(at, x);
      jitters.apply(x, ops.contrast, 0.0f);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) sum += i < at.count() ? luminance(x[i].r, x[i].g, x[i].b) : 0.0f;
    }
    sum = block_reduce(sum, sums, 0.0f, [](float a, int offset) { return a + __shfl_xor_sync(kFullMask, a, offset); });
    level = (1.0f - jitters.contrast) * (sum / static_cast<float>(pixels));
  }

  uint8_t* levels = nullptr;
  if (ops.photometric) levels = p.scratch != nullptr ? p.scratch + picture * 3 * pixels : dynamic_shared<uint8_t>();
  const int mask = ~(static_cast<int>(ops.level_step) - 1);
  for (QuadWalk at(side); at.more(); at.advance()) {
    Rgb x[kPixels];
    crop.read(at, x);
    jitters.apply(x, 4, level);
    if (!ops.photometric) {
      finish_pixels<kBlur>(p, ops, x, picture, at.pixel(), at.count(), pixels);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      if (i >= at.count()) break;
      uint8_t* level_of = levels + at.pixel() + i;
      level_of[0] = static_cast<uint8_t>(static_cast<int>(rintf(x[i].r)) & mask);
      level_of[pixels] = static_cast<uint8_t>(static_cast<int>(rintf(x[i].g)) & mask);
      level_of[2 * pixels] = static_cast<uint8_t>(static_cast<int>(rintf(x[i].b)) & mask);
    }
  }
  if (!ops.photometric) return;
  __syncthreads();

  // One channel after the other, in loops: three at a time would not fit the registers.
#pragma unroll 1
  for (int c = 0; c < 3; ++c) {
    Extremes found{255.0f, 0.0f};
    for (QuadWalk at(side); at.more(); at.advance()) {
      float x[kPixels];
      sharpened_levels(levels + c * pixels, at, ops, x);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) found = {fminf(found.low, x[i]), fmaxf(found.high, x[i])};
    }
    found = block_reduce(found, extremes, Extremes{255.0f, 0.0f}, [](Extremes a, int offset) {
      return Extremes{fminf(a.low, __shfl_xor_sync(kFullMask, a.low, offset)),
                      fmaxf(a.high, __shfl_xor_sync(kFullMask, a.high, offset))};
    });
    const bool flat = found.low == found.high;
    if (threadIdx.x == 0) {
      stretch_low[c] = flat ? 0.0f : found.low;
      stretch_inverse_span[c] = 1.0f / (flat ? 255.0f : found.high - found.low);
    }
  }
  __syncthreads();
  for (QuadWalk at(side); at.more(); at.advance()) {
    Rgb x[kPixels] = {};
#pragma unroll 1
    for (int c = 0; c < 3; ++c) {
      float channel[kPixels];
      sharpened_levels(levels + c * pixels, at, ops, channel);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const float value = stretched(channel[i], stretch_low[c], stretch_inverse_span[c]);
        x[i] = {c == 0 ? value : x[i].r, c == 1 ? value : x[i].g, value};
      }
    }
    finish_pixels<kBlur>(p, ops, x, picture, at.pixel(), at.count(), pixels);
  }
}

constexpr int kTile = 32, kTileRows = 8;  // a block of kTile x kTileRows threads blurs a square of side kTile
constexpr int kHalo = kTile + 2 * kMaxBlurRadius;

// One block blurs one square of one picture, a channel at a time, along the rows and then down the columns.
template <typename Out>
__global__ void __launch_bounds__(kTile* kTileRows) blur_kernel(const Problem<Out> p, int tiles) {
  __shared__ float weights[kMaxBlurRadius + 1];
  __shared__ float levels[kHalo][kHalo];
  __shared__ float blurred_rows[kHalo][kTile];
  constexpr int kEach = kTile / kTileRows;
  const int64_t picture = blockIdx.x / (tiles * tiles);
  const float* parameters = p.parameters + picture * kViewParameters;
  const float sigma = parameters[kBlurSigma];
  if (sigma == 0) return;
  const bool grayscale = parameters[kGrayscale] != 0;
  const int tile = static_cast<int>(blockIdx.x % (tiles * tiles)), side = static_cast<int>(p.shape.side);
  const int top = tile / tiles * kTile, left = tile % tiles * kTile, pixels = side * side;
  const int radius = blur_radius(sigma, side), halo = kTile + 2 * radius;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  if (threadIdx.x == 0) blur_weights(sigma, radius, weights);
  float results[kEach][3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    if (c > 0 && grayscale) {
      for (int i = 0; i < kEach; ++i) results[i][c] = results[i][0];
      continue;
    }
    const float* plane = p.unblurred + (picture * 3 + c) * pixels;
    __syncthreads();
    for (int y = row; y < halo; y += kTileRows) {
      // Pixels beyond the mirrored border are not used: any level will do.
      const int64_t source_y = reflect(min(top + y - radius, side - 1 + radius), side);
      for (int x = column; x < halo; x += kTile) {
        const int64_t source_x = reflect(min(left + x - radius, side - 1 + radius), side);
        levels[y][x] = plane[source_y * side + source_x];
      }
    }
    __syncthreads();
    for (int y = row; y < halo; y += kTileRows) {
      const float* centre = &levels[y][column + radius];
      float sum = weights[0] * centre[0];
      for (int k = 1; k <= radius; ++k) sum += weights[k] * (centre[-k] + centre[k]);
      blurred_rows[y][column] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float* centre = &blurred_rows[row + i * kTileRows + radius][column];
      float sum = weights[0] * centre[0];
      for (int k = 1; k <= radius; ++k) sum += weights[k] * (centre[-k * kTile] + centre[k * kTile]);
      results[i][c] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int y = top + row + i * kTileRows, x = left + column;
    if (y < side && x < side) {
      write_pixel(p, Rgb{results[i][0], results[i][1], results[i][2]}, picture, y * side + x, pixels);
    }
  }
}

Tensor render_views_cuda(const Tensor& crops_, const Tensor& parameters_, std::optional<Tensor> turns_,
                         std::optional<Tensor> permutation_, std::optional<Tensor> offsets_, int64_t grid,
                         int64_t patch_size, double mean_r, double mean_g, double mean_b, double std_r, double std_g,
                         double std_b, ScalarType dtype, bool channels_last, bool photometric, bool blur) {
  const float std_of[3] = {float(std_r), float(std_g), float(std_b)};
  const ViewShape shape =
      check_render_views(crops_, parameters_, turns_, permutation_, offsets_, grid, patch_size, std_of);
  const DeviceGuard guard(crops_.get_device_index());
  const Tensor crops = readable("render_views", "crops", crops_),
               parameters = readable("render_views", "parameters", parameters_);
  const std::optional<Tensor> turns = readable("render_views", "quarter_turns", turns_);
  std::optional<Tensor> permutation, offsets;
  if (grid > 0) {
    permutation = readable("render_views", "permutation", permutation_);
    offsets = readable("render_views", "offsets", offsets_);
  }
  const int64_t pictures = shape.batch * shape.pictures(), side = shape.side;
  const std::vector<int64_t> sizes =
      channels_last ? std::vector<int64_t>{pictures, side, side, 3} : std::vector<int64_t>{pictures, 3, side, side};
  Tensor out = allocate("render_views", crops, sizes, dtype);
  if (pictures == 0) return out;
  const int64_t level_bytes = photometric ? 3 * side * side : 0;
  // The levels of a 224-pixel crop fit on 8.0 and 9.0, those of patches everywhere.
  const bool shared = level_bytes + kStaticShared <= shared_memory_limit();
  const std::vector<int64_t> scratch_sizes = {shared ? 0 : pictures * level_bytes};
  Tensor scratch = allocate("render_views", crops, scratch_sizes);
  const std::vector<int64_t> unblurred_sizes = {blur ? pictures * 3 * side * side : 0};
  Tensor unblurred = allocate("render_views", crops, unblurred_sizes, ScalarType::Float);
  const auto values = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
  };
  dispatch_view_dtype(dtype, [&](auto zero) {
    using Out = decltype(zero);
    Problem<Out> p{};
    p.crops = static_cast<const uint8_t*>(crops.const_data_ptr());
    p.parameters = static_cast<const float*>(parameters.const_data_ptr());
    p.turns = values(turns);
    p.permutation = values(permutation);
    p.offsets = values(offsets);
    p.shape = shape;
    p.normal = Normalisation({mean_r, mean_g, mean_b}, std_of);
    p.channels_last = channels_last;
    p.photometric = photometric;
    p.unblurred = blur ? static_cast<float*>(unblurred.mutable_data_ptr()) : nullptr;
    p.scratch = shared ? nullptr : static_cast<uint8_t*>(scratch.mutable_data_ptr());
    p.out = static_cast<Out*>(out.mutable_data_ptr());
    p.quads = side % kPixels == 0 && reinterpret_cast<uintptr_t>(p.out) % alignof(Quad<Out>) == 0;
    // About 16 pixels for a thread.
    const int64_t warps = std::clamp<int64_t>(side * side / (16 * kWarpSize), 1, kMaxWarps);
    launch_kernel("render_views", blur ? render_kernel<Out, true> : render_kernel<Out, false>,
                  dim3(static_cast<unsigned>(pictures)), dim3(static_cast<unsigned>(warps * kWarpSize)),
                  static_cast<size_t>(shared ? level_bytes : 0), current_stream(crops.get_device_index()), p);
    if (!blur) return;
    const int64_t tiles = (side + kTile - 1) / kTile;
    SSLFAST_CHECK(pictures * tiles * tiles < int64_t(1) << 31, "render_views: ", pictures, " pictures of ", side, " x ",
                  side, " pixels are too many to blur in one call; split the batch");
    launch_kernel("render_views", blur_kernel<Out>, dim3(static_cast<unsigned>(pictures * tiles * tiles)),
                  dim3(kTile * kTileRows), 0, current_stream(crops.get_device_index()), p, static_cast<int>(tiles));
  });
  return out;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("render_views", TORCH_BOX(&sslfast::render_views_cuda));
}
