// Crops of a JPEG, decoded by the libjpeg-turbo that Pillow is linked with, for sslfast/ops/crops.py.
#pragma once

#include <cstdint>
#include <vector>

#include "crop_resize.h"

namespace sslfast {

// Take the library's functions, in the order of libjpeg::Functions. False where its structures are not those of
// libjpeg.h: then nothing may be decoded.
bool bind_libjpeg(void* const* functions);

// A JPEG of width x height pixels and 1 (grayscale) or 3 channels, decoded at 1 / factor of its size, into the crops,
// whose boxes are in decoded pixels.
//
// Pixels are those of a whole decode, but only what the crops need is computed: no IDCT for columns left and right of
// all boxes and for rows above and between them, and a file of a single scan is not read below the last one.
//
// False where the library reports an error or a warning, or the file is not one of 8-bit grayscale or YCbCr of that
// size: the crops are then undefined, and the caller has Pillow decode the file.
bool crop_jpeg(const uint8_t* data, int64_t bytes, int64_t width, int64_t height, int channels, int factor,
               std::vector<CropResizer>& crops);

}  // namespace sslfast
