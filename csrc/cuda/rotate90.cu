#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/element.h"
#include "common/launch.cuh"
#include "rotate90.h"

namespace sslfast {
namespace {

constexpr int kTile = 32;  // packs of a tile along x, micro-rows along y
constexpr int kRows = 8;   // threads of a block along y
constexpr int kPackBytes = 4;

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T e[V];
};

// A block rotates one tile of one plane. The unit of work is a micro-tile of V x V elements: V packs of V elements, so
// that one-byte pixels are moved as 4-byte words. Odd turns transpose inside the micro-tile in registers and exchange
// micro-tiles through shared memory, so that reads and writes both run along lines. side is a multiple of V.
template <typename T, int V>
__global__ void __launch_bounds__(kTile* kRows, 4)
    rotate90_kernel(const T* __restrict__ images,               // [N, C, S, S]
                    const int64_t* __restrict__ quarter_turns,  // [N]
                    unsigned planes, unsigned channels, int side, int tiles_per_side,
                    T* __restrict__ rotated) {  // [N, C, S, S]
  __shared__ Pack<T, V> tile[V][kTile][kTile + 1];
  const int micros = side / V;
  const int x0 = static_cast<int>(blockIdx.x) % tiles_per_side * kTile;
  const int y0 = static_cast<int>(blockIdx.x) / tiles_per_side * kTile;
  const int lane = threadIdx.x, x = x0 + lane;

  for (unsigned plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const int turns = turns_mod_4(quarter_turns[plane / channels]);
    const int64_t base = int64_t(plane) * micros * side;  // in packs: side * side / V
    const Pack<T, V>* in = reinterpret_cast<const Pack<T, V>*>(images) + base;
    Pack<T, V>* out = reinterpret_cast<Pack<T, V>*>(rotated) + base;

    if (turns % 2 == 0) {
      for (int row = threadIdx.y; row < kTile * V; row += kRows) {
        const int r = y0 * V + row;
        if (x >= micros || r >= side) continue;
        const Pack<T, V> pack = in[int64_t(r) * micros + x];
        if (turns == 0) {
          out[int64_t(r) * micros + x] = pack;
        } else {
          Pack<T, V> reversed;
#pragma unroll
          for (int v = 0; v < V; ++v) reversed.e[v] = pack.e[V - 1 - v];
          out[int64_t(side - 1 - r) * micros + micros - 1 - x] = reversed;
        }
      }
      continue;
    }

    for (int row = threadIdx.y; row < kTile; row += kRows) {
      const int y = y0 + row;
      if (x >= micros || y >= micros) continue;
      Pack<T, V> packs[V];
#pragma unroll
      for (int u = 0; u < V; ++u) packs[u] = in[int64_t(y * V + u) * micros + x];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        Pack<T, V> column;
#pragma unroll
        for (int u = 0; u < V; ++u) column.e[u] = turns == 1 ? packs[u].e[v] : packs[V - 1 - u].e[v];
        tile[v][lane][row] = column;
      }
    }
    __syncthreads();
    // Lanes now run along the rows of the source tile.
    const int y = y0 + lane;
    for (int row = threadIdx.y; row < kTile * V; row += kRows) {
      const int v = row % V, column = row / V;
      if (x0 + column >= micros || y >= micros) continue;
      const int source = (x0 + column) * V + v;  // the column of the plane that these packs come from
      const int64_t line = turns == 1 ? side - 1 - source : source;
      out[line * micros + (turns == 1 ? y : micros - 1 - y)] = tile[v][column][lane];
    }
    __syncthreads();
  }
}

template <typename T, int V>
void launch(const Tensor& images, const Tensor& quarter_turns, const Tensor& rotated) {
  const int64_t planes = images.size(0) * images.size(1), side = images.size(2);
  const int64_t tiles = (side / V + kTile - 1) / kTile;
  const dim3 blocks(static_cast<unsigned>(tiles * tiles), static_cast<unsigned>(std::min<int64_t>(planes, 65535)));
  launch_kernel("rotate90", rotate90_kernel<T, V>, blocks, dim3(kTile, kRows), 0,
                current_stream(images.get_device_index()), static_cast<const T*>(images.const_data_ptr()),
                static_cast<const int64_t*>(quarter_turns.const_data_ptr()), static_cast<unsigned>(planes),
                static_cast<unsigned>(images.size(1)), static_cast<int>(side), static_cast<int>(tiles),
                static_cast<T*>(rotated.mutable_data_ptr()));
}

Tensor rotate90_cuda(const Tensor& images_,           // [N, C, S, S]
                     const Tensor& quarter_turns_) {  // [N] int64
  check_rotate90(images_, quarter_turns_);
  SSLFAST_CHECK(images_.size(2) <= (int64_t(1) << 20), "rotate90: images must have a side of at most 2**20, got ",
                images_.size(2));
  SSLFAST_CHECK(images_.size(0) * images_.size(1) < (int64_t(1) << 31),
                "rotate90: images must have fewer than 2**31 planes, got N * C = ", images_.size(0) * images_.size(1));
  const DeviceGuard guard(images_.get_device_index());
  const Tensor images = readable("rotate90", "images", images_);
  const Tensor quarter_turns = readable("rotate90", "quarter_turns", quarter_turns_);
  const int64_t side = images.size(2);
  Tensor rotated = allocate("rotate90", images, {images.size(0), images.size(1), side, side});
  if (images.numel() == 0) return rotated;
  SSLFAST_DISPATCH_ELEMENT(images, [&] {
    constexpr int kPack = std::max<int>(1, kPackBytes / sizeof(element_t));
    // A contiguous view may start inside a pack: reshape(-1)[1:] of a byte tensor does.
    if (side % kPack == 0 && reinterpret_cast<uintptr_t>(images.const_data_ptr()) % kPackBytes == 0) {
      launch<element_t, kPack>(images, quarter_turns, rotated);
    } else {
      launch<element_t, 1>(images, quarter_turns, rotated);
    }
  });
  return rotated;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("rotate90", TORCH_BOX(&sslfast::rotate90_cuda));
}
