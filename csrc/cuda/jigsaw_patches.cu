#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/element.h"
#include "common/launch.cuh"
#include "jigsaw_patches.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 4;  // target; amortises reading permutation and offsets
constexpr int kPackBytes = 8;

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T e[V];
};

// Blocks along y take patches (slots), along x the packs of one patch. A pack is V elements of one line of a patch:
// its source starts anywhere in a line and is read element by element (the warp's reads share their sectors), its
// target is aligned and written at once.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) jigsaw_patches_kernel(const T* __restrict__ images,  // [N, C, H, W]
                                                                  const int64_t* __restrict__ permutation,  // [N, P]
                                                                  const int64_t* __restrict__ offsets,      // [N, P, 2]
                                                                  JigsawShape shape,
                                                                  T* __restrict__ patches) {  // [N, P, C, p, p]
  const int64_t cells = shape.cells(), slots = shape.batch * cells, plane = shape.height * shape.width;
  const int line_packs = static_cast<int>(shape.patch / V), plane_packs = line_packs * static_cast<int>(shape.patch);
  const int patch_packs = plane_packs * static_cast<int>(shape.channels);
  for (int64_t slot = blockIdx.y; slot < slots; slot += gridDim.y) {
    const int64_t sample = slot / cells, cell = permutation[slot];
    if (!shape.has_cell(cell)) __trap();
    const int64_t y = offsets[(sample * cells + cell) * 2], x = offsets[(sample * cells + cell) * 2 + 1];
    if (!shape.has_offset(y, x)) __trap();
    const T* source = images + sample * shape.channels * plane + shape.start(cell, y, x);
    Pack<T, V>* target = reinterpret_cast<Pack<T, V>*>(patches) + slot * patch_packs;
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < patch_packs; i += gridDim.x * kThreads) {
      const int channel = i / plane_packs, in_plane = i % plane_packs;
      const T* line = source + channel * plane + (in_plane / line_packs) * shape.width + (in_plane % line_packs) * V;
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.e[v] = line[v];
      target[i] = pack;
    }
  }
}

template <typename T, int V>
void launch(const Tensor& images, const Tensor& permutation, const Tensor& offsets, const JigsawShape& shape,
            const Tensor& patches) {
  const int64_t packs = shape.channels * shape.patch * shape.patch / V;
  constexpr int64_t kPacksPerBlock = kThreads * kPacksPerThread;
  const dim3 blocks(static_cast<unsigned>((packs + kPacksPerBlock - 1) / kPacksPerBlock),
                    static_cast<unsigned>(std::min<int64_t>(shape.batch * shape.cells(), 65535)));
  launch_kernel(
      "jigsaw_patches", jigsaw_patches_kernel<T, V>, blocks, kThreads, 0, current_stream(images.get_device_index()),
      static_cast<const T*>(images.const_data_ptr()), static_cast<const int64_t*>(permutation.const_data_ptr()),
      static_cast<const int64_t*>(offsets.const_data_ptr()), shape, static_cast<T*>(patches.mutable_data_ptr()));
}

Tensor jigsaw_patches_cuda(const Tensor& images_,       // [N, C, H, W]
                           const Tensor& permutation_,  // [N, P] int64
                           const Tensor& offsets_,      // [N, P, 2] int64
                           int64_t grid, int64_t patch_size) {
  const JigsawShape shape = check_jigsaw_patches(images_, permutation_, offsets_, grid, patch_size);
  SSLFAST_CHECK(shape.channels * patch_size * patch_size < (int64_t(1) << 30),
                "jigsaw_patches: a patch must have fewer than 2**30 elements, got C * p * p = ",
                shape.channels * patch_size * patch_size);
  const DeviceGuard guard(images_.get_device_index());
  const Tensor images = readable("jigsaw_patches", "images", images_),
               offsets = readable("jigsaw_patches", "offsets", offsets_);
  const Tensor permutation = readable("jigsaw_patches", "permutation", permutation_);
  Tensor patches =
      allocate("jigsaw_patches", images, {shape.batch, shape.cells(), shape.channels, patch_size, patch_size});
  if (patches.numel() == 0) return patches;
  SSLFAST_DISPATCH_ELEMENT(images, [&] {
    constexpr int kPack = kPackBytes / sizeof(element_t);
    if (patch_size % kPack == 0) {
      launch<element_t, kPack>(images, permutation, offsets, shape, patches);
    } else {
      launch<element_t, 1>(images, permutation, offsets, shape, patches);
    }
  });
  return patches;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("jigsaw_patches", TORCH_BOX(&sslfast::jigsaw_patches_cuda));
}
