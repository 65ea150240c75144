#include "jigsaw_patches.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace sslfast {
namespace {

constexpr int64_t kGrain = 1 << 15;  // smallest work of a thread in bytes

void check_values(const JigsawShape& shape,
                  const int64_t* permutation,  // [N, P]
                  const int64_t* offsets) {    // [N, P, 2]
  const int64_t cells = shape.cells();
  for (int64_t i = 0; i < shape.batch * cells; ++i) {
    SSLFAST_CHECK(shape.has_cell(permutation[i]), "jigsaw_patches: permutation must be in [0, ", cells, "), got ",
                  permutation[i], " at sample ", i / cells, ", slot ", i % cells);
    SSLFAST_CHECK(shape.has_offset(offsets[2 * i], offsets[2 * i + 1]), "jigsaw_patches: offsets must be in [0, ",
                  shape.cell_height() - shape.patch, "] (y) and [0, ", shape.cell_width() - shape.patch, "] (x), got (",
                  offsets[2 * i], ", ", offsets[2 * i + 1], ") at sample ", i / cells, ", cell ", i % cells,
                  "; images are ", shape.height, " x ", shape.width);
  }
}

Tensor jigsaw_patches_cpu(const Tensor& images_,       // [N, C, H, W]
                          const Tensor& permutation_,  // [N, P] int64
                          const Tensor& offsets_,      // [N, P, 2] int64
                          int64_t grid, int64_t patch_size) {
  const JigsawShape shape = check_jigsaw_patches(images_, permutation_, offsets_, grid, patch_size);
  const Tensor images = readable("jigsaw_patches", "images", images_),
               offsets = readable("jigsaw_patches", "offsets", offsets_);
  const Tensor permutation = readable("jigsaw_patches", "permutation", permutation_);
  const int64_t* cell_of = static_cast<const int64_t*>(permutation.const_data_ptr());
  const int64_t* offset_of = static_cast<const int64_t*>(offsets.const_data_ptr());
  check_values(shape, cell_of, offset_of);
  const int64_t cells = shape.cells(), side = shape.patch;
  Tensor patches = allocate("jigsaw_patches", images, {shape.batch, cells, shape.channels, side, side});
  if (patches.numel() == 0) return patches;

  const int64_t element = static_cast<int64_t>(images.element_size());
  const char* in = static_cast<const char*>(images.const_data_ptr());
  char* out = static_cast<char*>(patches.mutable_data_ptr());
  const int64_t plane = shape.height * shape.width * element, pitch = shape.width * element, line = side * element;
  const int64_t patch_bytes = shape.channels * side * line;
  const int64_t grain = std::max<int64_t>(1, kGrain / patch_bytes);
  torch::stable::parallel_for(0, shape.batch * cells, grain, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t sample = slot / cells, cell = cell_of[slot];
      const int64_t* offset = offset_of + (sample * cells + cell) * 2;
      const char* source = in + sample * shape.channels * plane + shape.start(cell, offset[0], offset[1]) * element;
      char* target = out + slot * patch_bytes;
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t y = 0; y < side; ++y) {
          std::memcpy(target, source + c * plane + y * pitch, line);
          target += line;
        }
      }
    }
  });
  return patches;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("jigsaw_patches", TORCH_BOX(&sslfast::jigsaw_patches_cpu));
}
