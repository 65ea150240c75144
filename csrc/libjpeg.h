// The part of libjpeg's binary interface that jpeg_crops.cpp uses: its own declarations, since neither libjpeg's
// headers nor its library are there when this file is compiled. The functions are those of the library that Pillow is
// linked with, whose addresses sslfast/ops/crops.py hands over.
//
// The fields up to `coef_bits` have the same places in libjpeg-turbo's interfaces of version 6.2, 7 and 8
// (src/jpeglib.h there); version and size of the whole structure are asked of the library itself (jpeg_crops.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace sslfast::libjpeg {

struct Decompress;

struct Errors {
  void (*error_exit)(Decompress*);
  void (*emit_message)(Decompress*, int level);  // level -1: a warning, others: traces
  void (*output_message)(Decompress*);
  void (*format_message)(Decompress*, char*);
  void (*reset_error_mgr)(Decompress*);
  int msg_code;
  union {
    int i[8];
    char s[80];
  } msg_parm;
  int trace_level;
  long num_warnings;
  const char* const* jpeg_message_table;
  int last_jpeg_message;
  const char* const* addon_message_table;
  int first_addon_message, last_addon_message;
};

struct Decompress {
  Errors* err;
  void *mem, *progress, *client_data;
  int is_decompressor, global_state;
  void* src;
  unsigned image_width, image_height;
  int num_components, jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
  uint8_t** colormap;
  unsigned output_scanline;
  int input_scan_number;
  unsigned input_imcu_row;
  int output_scan_number;
  unsigned output_imcu_row;
  int (*coef_bits)[64];      // null but for progressive files
  uint8_t rest[2048 - 200];  // the library's alone
};

static_assert(sizeof(void*) != 8 || offsetof(Decompress, rest) == 200, "the layout of libjpeg for 64 bits");

constexpr int kGrayscale = 1, kRgb = 2, kYcbcr = 3;

// In the order of FUNCTIONS in sslfast/ops/crops.py.
struct Functions {
  Errors* (*std_error)(Errors*);
  void (*create_decompress)(Decompress*, int version, size_t size);
  void (*mem_src)(Decompress*, const uint8_t*, unsigned long);
  int (*read_header)(Decompress*, int require_image);
  int (*start_decompress)(Decompress*);
  void (*crop_scanline)(Decompress*, unsigned* left, unsigned* width);
  unsigned (*skip_scanlines)(Decompress*, unsigned);
  unsigned (*read_scanlines)(Decompress*, uint8_t** rows, unsigned);
  void (*destroy_decompress)(Decompress*);
};

}  // namespace sslfast::libjpeg
