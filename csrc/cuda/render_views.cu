#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/render_pixels.cuh"

namespace sslfast {
namespace {

using namespace render;

// Naming the one block that fits moves where ptxas stops: without it registers spill on 10.0, with it on 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SSLFAST_RENDER_BOUNDS __launch_bounds__(kMaxThreads, 1)
#else
#define SSLFAST_RENDER_BOUNDS __launch_bounds__(kMaxThreads)
#endif

// One block renders one picture, four pixels of a row at a time for a thread. Its bytes are read once, twice if
// contrast needs the mean: jitters before it clamp levels or turn hues, so that no mean of the source gives theirs. The
// levels of the photometric set, which are integers, are kept in shared memory for neighbours and extremes. kBlur
// false: every sigma is 0, which takes half the registers on 10.0.
template <typename Out, bool kBlur>
__global__ void SSLFAST_RENDER_BOUNDS render_kernel(const Problem<Out> p) {
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
  const double mean[3] = {mean_r, mean_g, mean_b};
  const float std_of[3] = {float(std_r), float(std_g), float(std_b)};
  const ViewShape shape =
      check_render_views(crops_, parameters_, turns_, permutation_, offsets_, grid, patch_size, mean, std_of);
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
    p.normal = Normalisation(mean, std_of);
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
