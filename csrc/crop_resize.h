// Antialiased bilinear resize of boxes of an 8-bit image that arrives row by row, for sslfast/ops/crops.py.
//
// The arithmetic of torch's `interpolate(mode="bilinear", antialias=True)` for uint8
// (ATen/native/cpu/UpSampleKernel.cpp): weights in float64, normalised, rounded to int16 with as many fractional bits
// as the largest of them allows; columns first, rounded to 8 bits, then rows. Sums are integers, so results are equal
// to the last bit.
#pragma once

#include <cstdint>
#include <vector>

namespace sslfast {

// The weights of one axis: output i is sum_k weights[i * stride + k] * input[first[i] + k], shifted by `bits`.
struct ResizeAxis {
  ResizeAxis(int64_t input, int64_t output);

  // Fill `repeated`, and round the outputs up to a multiple of eight by repeating the last one.
  void repeat_weights();

  int64_t taps = 0;              // most weights of an output
  int64_t stride = 0;            // taps, rounded up to 4: the rest is zeros
  std::vector<int32_t> first;    // [output]
  std::vector<int32_t> count;    // [output], 1 .. taps
  std::vector<int16_t> weights;  // [output, stride]
  int bits = 0;
  // Weights as resize_rgb_row_avx2 multiplies them: of outputs i and i + 4 of every eight, by pairs, four times each.
  std::vector<int16_t> repeated;  // [output / 8, 4, stride / 2, 2, 4, 2]
};

// One box of an image, in pixels as decoded.
struct CropBox {
  int64_t left, top, right, bottom;
};

// A square crop [3, size, size], written while its rows arrive.
class CropResizer {
 public:
  // orientation: EXIF's, 1 .. 8, of the image as decoded. channels: of the rows, 1 (copied to all three) or 3.
  CropResizer(const CropBox& box, int64_t size, int orientation, int channels, uint8_t* out);

  // Row y of the image; rows come in order, those outside of the box are ignored. `row` begins at column `left`, and
  // kRowPadding + 3 * taps() bytes behind its end can be read.
  void take(int64_t y, int64_t left, const uint8_t* row);

  int64_t taps() const { return columns_.stride; }
  const CropBox& box() const { return box_; }

 private:
  void emit(int64_t i);

  CropBox box_;
  int64_t size_;
  int channels_;
  uint8_t* out_;
  int64_t origin_, down_, right_;  // place of output (0, 0), and steps to the next row and column of the decoded image
  ResizeAxis columns_, rows_;
  int64_t next_ = 0;             // first output row that is not complete
  int64_t plane_;                // bytes of one channel of a kept row
  std::vector<uint8_t> kept_;    // [rows_.taps, channels, plane_]
  std::vector<uint8_t> result_;  // [channels, plane_]
  std::vector<const uint8_t*> sources_;
};

constexpr int64_t kRowPadding = 32;

// The crops of an image in memory, [height, width, channels], channels 1 or 3.
void crop_pixels(const uint8_t* pixels, int64_t width, int channels, std::vector<CropResizer>& crops);

}  // namespace sslfast
