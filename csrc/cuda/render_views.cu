#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/launch.cuh"
#include "render_views.h"

namespace sslfast {
namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kWarpSize;
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

// Applies apply_colour, then writes the pixel, or stores its levels for blur_kernel: one plane of a gray picture, else
// three.
template <bool kBlur, typename Out>
__device__ __forceinline__ void finish_pixel(const Problem<Out>& p, const PictureOps& ops, Rgb x, int64_t picture,
                                             int pixel, int pixels) {
  x = apply_colour(x, ops);
  if (!kBlur || ops.sigma == 0) {
    write_pixel(p, x, picture, pixel, pixels);
    return;
  }
  float* levels = p.unblurred + picture * 3 * pixels + pixel;
  levels[0] = x.r;
  if (ops.grayscale) return;
  levels[pixels] = x.g;
  levels[2 * pixels] = x.b;
}

// A posterized level, sharpened and solarized.
__device__ __forceinline__ float sharpened_level(const uint8_t* plane, int side, int pixel, const PictureOps& ops) {
  const int y = pixel / side, x = pixel % side;
  float level = plane[pixel];
  if (y > 0 && y < side - 1 && x > 0 && x < side - 1) {
    const uint8_t* above = plane + pixel - side;
    const uint8_t* row = plane + pixel;
    const uint8_t* below = plane + pixel + side;
    const int sum = above[-1] + above[0] + above[1] + row[-1] + row[1] + below[-1] + below[0] + below[1] + 5 * row[0];
    level = sharpen_level(level, static_cast<float>(sum), ops.sharpness);
  }
  return level >= ops.threshold ? 255.0f - level : level;
}

// One block renders one picture. Its bytes are read once, twice if contrast needs the mean. The levels of the
// photometric set, which are integers, are kept in shared memory for neighbours and extremes.
// kBlur false: every sigma is 0, which takes half the registers on 10.0.
template <typename Out, bool kBlur>
__global__ void __launch_bounds__(kMaxThreads) render_kernel(const Problem<Out> p) {
  __shared__ float sums[kMaxWarps];
  __shared__ Extremes extremes[kMaxWarps];
  const int64_t picture = blockIdx.x, pictures = p.shape.pictures(), sample = picture / pictures;
  const int side = static_cast<int>(p.shape.side), pixels = side * side, threads = static_cast<int>(blockDim.x);
  const int64_t plane = p.shape.size * p.shape.size;
  if (!parameters_in_range(p.parameters + picture * kViewParameters)) __trap();
  const PictureOps ops = PictureOps::read(p.parameters + picture * kViewParameters);
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
  const uint8_t* crop = p.crops + sample * 3 * plane + map.base;
  const auto read = [&](int pixel) {
    const uint8_t* source = crop + pixel / side * map.down + pixel % side * map.right;
    return Rgb{float(__ldg(source)), float(__ldg(source + plane)), float(__ldg(source + 2 * plane))};
  };

  float level = 0.0f;
  if (ops.contrast < 4) {
    float sum = 0.0f;
    for (int pixel = threadIdx.x; pixel < pixels; pixel += threads) {
      const Rgb x = apply_jitters(read(pixel), ops, ops.contrast, 0.0f);
      sum += luminance(x.r, x.g, x.b);
    }
    sum = block_reduce(sum, sums, 0.0f, [](float a, int offset) { return a + __shfl_xor_sync(kFullMask, a, offset); });
    level = (1.0f - p.parameters[picture * kViewParameters + kContrast]) * (sum / static_cast<float>(pixels));
  }

  uint8_t* levels = nullptr;
  if (ops.photometric) levels = p.scratch != nullptr ? p.scratch + picture * 3 * pixels : dynamic_shared<uint8_t>();
  const int mask = ~(static_cast<int>(ops.level_step) - 1);
  for (int pixel = threadIdx.x; pixel < pixels; pixel += threads) {
    const Rgb x = apply_jitters(read(pixel), ops, 4, level);
    if (!ops.photometric) {
      finish_pixel<kBlur>(p, ops, x, picture, pixel, pixels);
      continue;
    }
    levels[pixel] = static_cast<uint8_t>(static_cast<int>(rintf(x.r)) & mask);
    levels[pixels + pixel] = static_cast<uint8_t>(static_cast<int>(rintf(x.g)) & mask);
    levels[2 * pixels + pixel] = static_cast<uint8_t>(static_cast<int>(rintf(x.b)) & mask);
  }
  if (!ops.photometric) return;
  __syncthreads();

  float low[3], span[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    Extremes found{255.0f, 0.0f};
    for (int pixel = threadIdx.x; pixel < pixels; pixel += threads) {
      const float x = sharpened_level(levels + c * pixels, side, pixel, ops);
      found = {fminf(found.low, x), fmaxf(found.high, x)};
    }
    found = block_reduce(found, extremes, Extremes{255.0f, 0.0f}, [](Extremes a, int offset) {
      return Extremes{fminf(a.low, __shfl_xor_sync(kFullMask, a.low, offset)),
                      fmaxf(a.high, __shfl_xor_sync(kFullMask, a.high, offset))};
    });
    const bool flat = found.low == found.high;
    low[c] = flat ? 0.0f : found.low;
    span[c] = flat ? 255.0f : found.high - found.low;
  }
  for (int pixel = threadIdx.x; pixel < pixels; pixel += threads) {
    const Rgb x{stretch_level(sharpened_level(levels, side, pixel, ops), low[0], span[0]),
                stretch_level(sharpened_level(levels + pixels, side, pixel, ops), low[1], span[1]),
                stretch_level(sharpened_level(levels + 2 * pixels, side, pixel, ops), low[2], span[2])};
    finish_pixel<kBlur>(p, ops, x, picture, pixel, pixels);
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
