// jigsaw_patches: checks, and the source pixels of a patch.
#pragma once

#include "common/check.h"
#include "common/element.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Sizes of one call. A cell is height / grid x width / grid pixels; the remainder at the lower right is never shown.
struct JigsawShape {
  int64_t batch, channels, height, width, grid, patch;

  SSLFAST_HD int64_t cells() const { return grid * grid; }
  SSLFAST_HD int64_t cell_height() const { return height / grid; }
  SSLFAST_HD int64_t cell_width() const { return width / grid; }
  SSLFAST_HD bool has_cell(int64_t cell) const { return cell >= 0 && cell < cells(); }
  SSLFAST_HD bool has_offset(int64_t y, int64_t x) const {
    return y >= 0 && y <= cell_height() - patch && x >= 0 && x <= cell_width() - patch;
  }
  // First pixel of a patch inside its [H, W] plane.
  SSLFAST_HD int64_t start(int64_t cell, int64_t y, int64_t x) const {
    return ((cell / grid) * cell_height() + y) * width + (cell % grid) * cell_width() + x;
  }
};

inline JigsawShape check_jigsaw_patches(const Tensor& images,       // [N, C, H, W]
                                        const Tensor& permutation,  // [N, grid^2] int64
                                        const Tensor& offsets,      // [N, grid^2, 2] int64
                                        int64_t grid, int64_t patch_size) {
  constexpr const char* op = "jigsaw_patches";
  SSLFAST_CHECK(images.dim() == 4, op, ": images must have shape [N, C, H, W], got ", shape_string(images));
  check_element(op, images);
  SSLFAST_CHECK(grid >= 1 && grid <= 1024, op, ": grid must be in [1, 1024], got ", grid);
  const JigsawShape shape{images.size(0), images.size(1), images.size(2), images.size(3), grid, patch_size};
  const int64_t side = shape.cell_height() < shape.cell_width() ? shape.cell_height() : shape.cell_width();
  SSLFAST_CHECK(patch_size >= 1 && patch_size <= side, op, ": patch_size must be in [1, ", side,
                "], the cell side of images ", shape_string(images), " in a grid of ", grid, ", got ", patch_size);
  check_int64(op, "permutation", permutation);
  check_int64(op, "offsets", offsets);
  SSLFAST_CHECK(permutation.dim() == 2 && permutation.size(0) == shape.batch && permutation.size(1) == shape.cells(),
                op, ": permutation must have shape [N, grid**2] = [", shape.batch, ", ", shape.cells(), "], got ",
                shape_string(permutation), "; images are ", shape_string(images));
  SSLFAST_CHECK(
      offsets.dim() == 3 && offsets.size(0) == shape.batch && offsets.size(1) == shape.cells() && offsets.size(2) == 2,
      op, ": offsets must have shape [N, grid**2, 2] = [", shape.batch, ", ", shape.cells(), ", 2], got ",
      shape_string(offsets), "; images are ", shape_string(images));
  check_same_device(op, "permutation", permutation, "images", images);
  check_same_device(op, "offsets", offsets, "images", images);
  return shape;
}

}  // namespace sslfast
