// What the library offers beside its ops, as plain C functions for ctypes (sslfast/ops/_core.py): facts about the
// build, and computations without tensors. Neither needs a header of Python, so that one library serves every Python.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "crop_resize.h"
#include "jpeg_crops.h"
#include "permutations.h"

#define SSLFAST_EXPORT extern "C" __attribute__((visibility("default")))

// Lines of "name=value", in UTF-8.
SSLFAST_EXPORT const char* sslfast_build_info() {
  return "version=" SSLFAST_VERSION "\nnote=" SSLFAST_BUILD_NOTE "\ncuda_architectures=" SSLFAST_CUDA_ARCHS
         "\ncompiler=g++ " __VERSION__;
}

// Fills rows [count, cells]; arguments as permutations.h asks. Returns 0, or 1 where memory is short.
SSLFAST_EXPORT int sslfast_max_hamming_permutations(int64_t count, int64_t cells, int64_t seed, uint8_t* rows) {
  try {
    const std::vector<uint8_t> found = sslfast::max_hamming_permutations(count, cells, seed);
    std::copy(found.begin(), found.end(), rows);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Take libjpeg's functions (libjpeg.h); 0: crops of JPEGs can be made, 1: this library cannot be used.
SSLFAST_EXPORT int sslfast_bind_libjpeg(void* const* functions) {
  return sslfast::bind_libjpeg(functions) ? 0 : 1;
}

namespace {

// boxes: left, top, right, bottom of every crop; outs: uint8 [3, size, size] of every crop.
std::vector<sslfast::CropResizer> make_crops(int64_t count, const int64_t* boxes, const int64_t* sizes,
                                             uint8_t* const* outs, int orientation, int channels) {
  std::vector<sslfast::CropResizer> crops;
  crops.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i, boxes += 4) {
    crops.emplace_back(sslfast::CropBox{boxes[0], boxes[1], boxes[2], boxes[3]}, sizes[i], orientation, channels,
                       outs[i]);
  }
  return crops;
}

}  // namespace

// 0, 1 where Pillow must decode the file, or 2 where memory is short. channels: of the file's header, 1 or 3.
SSLFAST_EXPORT int sslfast_crop_jpeg(const uint8_t* data, int64_t bytes, int64_t width, int64_t height, int channels,
                                     int factor, int orientation, int64_t count, const int64_t* boxes,
                                     const int64_t* sizes, uint8_t* const* outs) {
  try {
    std::vector<sslfast::CropResizer> crops = make_crops(count, boxes, sizes, outs, orientation, channels);
    return sslfast::crop_jpeg(data, bytes, width, height, channels, factor, crops) ? 0 : 1;
  } catch (const std::exception&) {
    return 2;
  }
}

// The same for pixels [height, width, channels], channels 1 or 3.
SSLFAST_EXPORT int sslfast_crop_pixels(const uint8_t* pixels, int64_t width, int channels, int orientation,
                                       int64_t count, const int64_t* boxes, const int64_t* sizes,
                                       uint8_t* const* outs) {
  try {
    std::vector<sslfast::CropResizer> crops = make_crops(count, boxes, sizes, outs, orientation, channels);
    sslfast::crop_pixels(pixels, width, channels, crops);
    return 0;
  } catch (const std::exception&) {
    return 2;
  }
}

// Positions in a JPEG where 0xFF is followed by neither 0 nor 0xFF, and what follows: the first `room` of them are
// written. Returns how many there are.
SSLFAST_EXPORT int64_t sslfast_find_markers(const uint8_t* data, int64_t bytes, int64_t* positions, uint8_t* kinds,
                                            int64_t room) {
  int64_t count = 0;
  const uint8_t* end = data + bytes;
  for (const uint8_t* at = data; at < end; ++at) {
    at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, static_cast<size_t>(end - at)));
    if (at == nullptr || at + 1 == end) break;
    if (at[1] == 0 || at[1] == 0xFF) continue;
    if (count < room) positions[count] = at - data, kinds[count] = at[1];
    ++count;
  }
  return count;
}
