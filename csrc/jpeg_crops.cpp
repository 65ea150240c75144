#include "jpeg_crops.h"

#include <algorithm>
#include <csetjmp>

#include "libjpeg.h"

namespace sslfast {
namespace {

using libjpeg::Decompress;
using libjpeg::Errors;

constexpr int64_t kRows = 16;      // handed to the library at once, which fills one or two
constexpr int64_t kMargin = 4;     // columns beside the boxes: what chroma upsampling looks at, and more
constexpr int64_t kLeastGap = 48;  // rows between boxes that are worth skipping: three rows of blocks of 4:2:0

libjpeg::Functions library;
int library_version = 0;
size_t library_size = 0;

struct Guard {
  Errors errors;  // first: the library's handlers are given its address
  std::jmp_buf leave;
};

void leave(Decompress* decompress) {
  std::longjmp(reinterpret_cast<Guard*>(decompress->err)->leave, 1);
}

void leave_at_warning(Decompress* decompress, int level) {
  if (level < 0) leave(decompress);
}

void ignore(Decompress*) {}

void guard(Guard& guard, Decompress& decompress) {
  decompress.err = library.std_error(&guard.errors);
  guard.errors.error_exit = leave;
  guard.errors.emit_message = leave_at_warning;
  guard.errors.output_message = ignore;
}

// What the library names, in its message of a version or size that is not its own.
int asked(Guard& errors, Decompress& decompress, int version) {
  guard(errors, decompress);
  if (setjmp(errors.leave) == 0) {
    library.create_decompress(&decompress, version, 0);
    return 0;  // it never agrees to a size of 0
  }
  return errors.errors.msg_parm.i[0];
}

// Only trivial objects live here: errors leave it by longjmp.
class Job {
 public:
  const uint8_t* data;
  int64_t bytes, width, height;
  int channels, factor;
  std::vector<CropResizer>* crops;
  int64_t first_column, end_column, end_row;  // union of the boxes
  uint8_t* rows[kRows];

  void run(Decompress& d) {
    library.mem_src(&d, data, static_cast<unsigned long>(bytes));
    library.read_header(&d, 1);
    const int space = channels == 1 ? libjpeg::kGrayscale : libjpeg::kYcbcr;
    if (d.num_components != channels || d.jpeg_color_space != space) leave(&d);
    if (d.image_width != width || d.image_height != height) leave(&d);
    d.out_color_space = channels == 1 ? libjpeg::kGrayscale : libjpeg::kRgb;
    d.scale_num = 1;
    d.scale_denom = static_cast<unsigned>(factor);
    library.start_decompress(&d);
    if (d.output_components != channels || d.output_width < end_column || d.output_height < end_row) leave(&d);
    const bool partial = !is_smoothed(d);
    unsigned left = 0;
    if (partial) {
      left = static_cast<unsigned>(std::max(first_column - kMargin, int64_t{0}));
      const int64_t end = std::min(end_column + kMargin, static_cast<int64_t>(d.output_width));
      unsigned columns = static_cast<unsigned>(end) - left;
      library.crop_scanline(&d, &left, &columns);
    }
    while (d.output_scanline < end_row) {
      const int64_t y = d.output_scanline, gap = next_row(y) - y;
      if (partial && gap >= kLeastGap) {
        library.skip_scanlines(&d, static_cast<unsigned>(gap));
        continue;
      }
      const unsigned count = library.read_scanlines(&d, rows, kRows);
      if (count == 0) leave(&d);
      for (unsigned i = 0; i < count; ++i) {
        for (CropResizer& crop : *crops) crop.take(y + i, left, rows[i]);
      }
    }
  }

 private:
  // Whether blocks are smoothed by their neighbours: in progressive files that end before all coefficients are known.
  static bool is_smoothed(const Decompress& d) {
    if (d.coef_bits == nullptr) return false;
    for (int c = 0; c < d.num_components; ++c) {
      for (int i = 0; i < 64; ++i) {
        if (d.coef_bits[c][i] != 0) return true;
      }
    }
    return false;
  }

  // The first row at or below y that a box holds.
  int64_t next_row(int64_t y) const {
    int64_t next = end_row;
    for (const CropResizer& crop : *crops) {
      if (crop.box().bottom > y) next = std::min(next, std::max(y, crop.box().top));
    }
    return next;
  }
};

bool run_guarded(Guard& errors, Decompress& decompress, Job& job) {
  guard(errors, decompress);
  if (setjmp(errors.leave) != 0) {
    library.destroy_decompress(&decompress);
    return false;
  }
  library.create_decompress(&decompress, library_version, library_size);
  job.run(decompress);
  library.destroy_decompress(&decompress);
  return true;
}

}  // namespace

bool bind_libjpeg(void* const* functions) {
  static_assert(sizeof(library) % sizeof(void*) == 0, "functions alone");
  if (sizeof(void*) != 8) return false;
  std::copy(functions, functions + sizeof(library) / sizeof(void*), reinterpret_cast<void**>(&library));
  Guard errors;
  Decompress decompress{};
  library_version = asked(errors, decompress, 0);
  library_size = static_cast<size_t>(asked(errors, decompress, library_version));
  const bool known = library_version == 62 || library_version == 70 || library_version == 80;
  return known && library_size > offsetof(Decompress, rest) && library_size <= sizeof(Decompress);
}

bool crop_jpeg(const uint8_t* data, int64_t bytes, int64_t width, int64_t height, int channels, int factor,
               std::vector<CropResizer>& crops) {
  Job job{data, bytes, width, height, channels, factor, &crops, width, 0, 0, {}};
  int64_t taps = 0;
  for (const CropResizer& crop : crops) {
    job.first_column = std::min(job.first_column, crop.box().left);
    job.end_column = std::max(job.end_column, crop.box().right);
    job.end_row = std::max(job.end_row, crop.box().bottom);
    taps = std::max(taps, crop.taps());
  }
  // 64: the library's SIMD code may write a whole register at the end of a row.
  const int64_t stride = 3 * ((width + factor - 1) / factor + taps) + kRowPadding + 64;
  std::vector<uint8_t> buffer(static_cast<size_t>(kRows * stride));
  for (int64_t i = 0; i < kRows; ++i) job.rows[i] = buffer.data() + i * stride;
  Guard errors;
  Decompress decompress{};
  return run_guarded(errors, decompress, job);
}

}  // namespace sslfast
