#include "crop_resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sslfast {
namespace {

constexpr int64_t kBlock = 32;  // pixels of a plane are a multiple of it

int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}

uint8_t clamp_to_byte(int32_t value) {
  return static_cast<uint8_t>(std::min(std::max(value, 0), 255));
}

// ---- columns: a row of pixels [input, kChannels] to planes [kChannels, plane]

template <int kChannels>
void resize_row_base(const uint8_t* row, const ResizeAxis& axis, int64_t size, int64_t plane, uint8_t* out) {
  const int32_t half = 1 << (axis.bits - 1);
  for (int64_t i = 0; i < size; ++i) {
    const int16_t* weights = axis.weights.data() + i * axis.stride;
    const uint8_t* pixels = row + kChannels * axis.first[i];
    int32_t sums[kChannels];
    for (int c = 0; c < kChannels; ++c) sums[c] = half;
    for (int64_t k = 0; k < axis.count[i]; ++k) {
      for (int c = 0; c < kChannels; ++c) sums[c] += weights[k] * pixels[kChannels * k + c];
    }
    for (int c = 0; c < kChannels; ++c) out[c * plane + i] = clamp_to_byte(sums[c] >> axis.bits);
  }
}

#if defined(__x86_64__)

// Pixels i and i + 4 of every eight share a register, a half each: red, green, blue and nothing, as 32 bits.
template <int64_t kTaps>  // 0: axis.stride
SSLFAST_TARGET_AVX2 void resize_rgb_row_avx2(const uint8_t* row, const ResizeAxis& axis, int64_t size, int64_t plane,
                                             uint8_t* out) {
  const int64_t pairs = (kTaps ? kTaps : axis.stride) / 2;
  const __m256i half = _mm256_set1_epi32(1 << (axis.bits - 1));
  const __m128i bits = _mm_cvtsi32_si128(axis.bits);
  const __m256i even = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
  const __m256i odd = _mm256_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,  //
                                       6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m256i planar = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i* weights = reinterpret_cast<const __m256i*>(axis.repeated.data());
  const int32_t* first = axis.first.data();
  for (int64_t i = 0; i < size; i += 8) {
    __m256i levels[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, weights += pairs) {
      const uint8_t *a = row + 3 * first[i + j], *b = row + 3 * first[i + j + 4];
      __m256i sums = half;
      for (int64_t k = 0; k < pairs; k += 2) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 6 * k));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 6 * k));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        const __m256i first_pair = _mm256_madd_epi16(_mm256_shuffle_epi8(both, even), _mm256_loadu_si256(weights + k));
        const __m256i second_pair =
            _mm256_madd_epi16(_mm256_shuffle_epi8(both, odd), _mm256_loadu_si256(weights + k + 1));
        sums = _mm256_add_epi32(sums, _mm256_add_epi32(first_pair, second_pair));
      }
      levels[j] = _mm256_sra_epi32(sums, bits);
    }
    const __m256i words01 = _mm256_packs_epi32(levels[0], levels[1]);
    const __m256i words23 = _mm256_packs_epi32(levels[2], levels[3]);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(words01, words23), planar);
    const __m256i planes = _mm256_permutevar8x32_epi32(bytes, together);
    const __m128i red_green = _mm256_castsi256_si128(planes);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), red_green);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + plane + i), _mm_unpackhi_epi64(red_green, red_green));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 2 * plane + i), _mm256_extracti128_si256(planes, 1));
  }
}

#elif defined(__aarch64__)

void resize_rgb_row_neon(const uint8_t* row, const ResizeAxis& axis, int64_t size, int64_t plane, uint8_t* out) {
  static const uint8_t kTaps01[16] = {0, 255, 1, 255, 2, 255, 255, 255, 3, 255, 4, 255, 5, 255, 255, 255};
  static const uint8_t kTaps23[16] = {6, 255, 7, 255, 8, 255, 255, 255, 9, 255, 10, 255, 11, 255, 255, 255};
  const uint8x16_t taps01 = vld1q_u8(kTaps01), taps23 = vld1q_u8(kTaps23);
  const int32x4_t half = vdupq_n_s32(1 << (axis.bits - 1)), down = vdupq_n_s32(-axis.bits);
  for (int64_t i = 0; i < size; ++i) {
    const uint8_t* pixels = row + 3 * axis.first[i];
    const int16_t* weights = axis.weights.data() + i * axis.stride;
    int32x4_t sums = half;
    for (int64_t k = 0; k < axis.stride; k += 4) {
      const uint8x16_t loaded = vld1q_u8(pixels + 3 * k);
      const int16x4_t factors = vld1_s16(weights + k);
      const int16x8_t a = vreinterpretq_s16_u8(vqtbl1q_u8(loaded, taps01));
      const int16x8_t b = vreinterpretq_s16_u8(vqtbl1q_u8(loaded, taps23));
      sums = vmlal_lane_s16(sums, vget_low_s16(a), factors, 0);
      sums = vmlal_lane_s16(sums, vget_high_s16(a), factors, 1);
      sums = vmlal_lane_s16(sums, vget_low_s16(b), factors, 2);
      sums = vmlal_lane_s16(sums, vget_high_s16(b), factors, 3);
    }
    const uint16x4_t levels = vqmovun_s32(vshlq_s32(sums, down));
    const uint8x8_t bytes = vqmovn_u16(vcombine_u16(levels, levels));
    out[i] = vget_lane_u8(bytes, 0);
    out[plane + i] = vget_lane_u8(bytes, 1);
    out[2 * plane + i] = vget_lane_u8(bytes, 2);
  }
}

#endif

void resize_rgb_row(const uint8_t* row, const ResizeAxis& axis, int64_t size, int64_t plane, uint8_t* out) {
#if defined(__x86_64__)
  if (cpu_isa() != Isa::kBase) {
    if (axis.stride == 4) return resize_rgb_row_avx2<4>(row, axis, size, plane, out);
    if (axis.stride == 8) return resize_rgb_row_avx2<8>(row, axis, size, plane, out);
    return resize_rgb_row_avx2<0>(row, axis, size, plane, out);
  }
#elif defined(__aarch64__)
  return resize_rgb_row_neon(row, axis, size, plane, out);
#endif
  resize_row_base<3>(row, axis, size, plane, out);
}

// ---- rows: `count` rows of `length` bytes to one, length a multiple of kBlock

void blend_rows_base(const uint8_t* const* rows, const int16_t* weights, int64_t count, int bits, int64_t length,
                     uint8_t* out) {
  for (int64_t start = 0; start < length; start += kBlock) {
    int32_t sums[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) sums[i] = 1 << (bits - 1);
    for (int64_t k = 0; k < count; ++k) {
      const uint8_t* __restrict__ row = rows[k] + start;
      const int16_t weight = weights[k];
#pragma omp simd
      for (int64_t i = 0; i < kBlock; ++i) sums[i] += weight * static_cast<int16_t>(row[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) out[start + i] = clamp_to_byte(sums[i] >> bits);
  }
}

#if defined(__x86_64__)

SSLFAST_TARGET_AVX2 void blend_rows_avx2(const uint8_t* const* rows, const int16_t* weights, int64_t count, int bits,
                                         int64_t length, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (bits - 1));
  const __m128i shift = _mm_cvtsi32_si128(bits);
  for (int64_t start = 0; start < length; start += kBlock) {
    __m256i sums[4] = {half, half, half, half};
    for (int64_t k = 0; k < count; k += 2) {  // an odd count: the last row again, with the zero behind the weights
      int32_t two;
      std::memcpy(&two, weights + k, sizeof two);
      const __m256i pair = _mm256_set1_epi32(two);
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k] + start));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[k + 1 < count ? k + 1 : k] + start));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
      sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
      sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
      sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
    }
    for (int j = 0; j < 4; ++j) sums[j] = _mm256_sra_epi32(sums[j], shift);
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + start), bytes);
  }
}

#endif

void blend_rows(const uint8_t* const* rows, const int16_t* weights, int64_t count, int bits, int64_t length,
                uint8_t* out) {
#if defined(__x86_64__)
  if (cpu_isa() != Isa::kBase) return blend_rows_avx2(rows, weights, count, bits, length, out);
#endif
  blend_rows_base(rows, weights, count, bits, length, out);
}

}  // namespace

ResizeAxis::ResizeAxis(int64_t input, int64_t output) {
  const double scale = static_cast<double>(input) / static_cast<double>(output);
  const double support = scale >= 1.0 ? scale : 1.0;
  const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
  const int64_t most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  std::vector<double> exact(static_cast<size_t>(output * most), 0.0);
  first.resize(output);
  count.resize(output);
  double largest = 0.0;
  for (int64_t i = 0; i < output; ++i) {
    const double centre = scale * (static_cast<double>(i) + 0.5);
    const int64_t begin = std::max(static_cast<int64_t>(centre - support + 0.5), int64_t{0});
    const int64_t end = std::min(static_cast<int64_t>(centre + support + 0.5), input);
    const int64_t number = std::min(std::max(end - begin, int64_t{0}), most);
    double* row = exact.data() + i * most;
    double total = 0.0;
    for (int64_t k = 0; k < number; ++k) {
      const double distance = std::abs((static_cast<double>(k + begin) - centre + 0.5) * inverse);
      row[k] = distance < 1.0 ? 1.0 - distance : 0.0;
      total += row[k];
    }
    for (int64_t k = 0; k < number && total != 0.0; ++k) {
      row[k] /= total;
      largest = std::max(largest, row[k]);
    }
    first[i] = static_cast<int32_t>(begin);
    count[i] = static_cast<int32_t>(number);
    taps = std::max(taps, number);
  }
  while (bits < 22 && static_cast<int>(0.5 + largest * (1 << (bits + 1))) < (1 << 15)) ++bits;
  stride = round_up(taps, 4);
  weights.assign(static_cast<size_t>(output * stride), 0);
  for (int64_t i = 0; i < output; ++i) {
    for (int64_t k = 0; k < count[i]; ++k) {
      weights[i * stride + k] = static_cast<int16_t>(0.5 + exact[i * most + k] * (1 << bits));
    }
  }
}

void ResizeAxis::repeat_weights() {
  const int64_t pairs = stride / 2, outputs = round_up(static_cast<int64_t>(first.size()), 8);
  first.resize(outputs, first.back());
  weights.resize(static_cast<size_t>(outputs * stride), 0);
  repeated.resize(static_cast<size_t>(outputs * pairs * 8));
  int16_t* to = repeated.data();
  for (int64_t i = 0; i < outputs; i += 8) {
    for (int64_t j = 0; j < 4; ++j) {
      for (int64_t k = 0; k < pairs; ++k) {
        for (const int64_t pixel : {i + j, i + j + 4}) {
          int32_t pair;
          std::memcpy(&pair, weights.data() + pixel * stride + 2 * k, sizeof pair);
          for (int copy = 0; copy < 4; ++copy, to += 2) std::memcpy(to, &pair, sizeof pair);
        }
      }
    }
  }
}

CropResizer::CropResizer(const CropBox& box, int64_t size, int orientation, int channels, uint8_t* out)
    : box_(box),
      size_(size),
      channels_(channels),
      out_(out),
      columns_(box.right - box.left, size),
      rows_(box.bottom - box.top, size),
      plane_(round_up(size, kBlock)),
      kept_(static_cast<size_t>(rows_.taps * channels * plane_)),
      result_(static_cast<size_t>(channels * plane_)),
      sources_(static_cast<size_t>(rows_.taps)) {
  // Stored row and column -> upright: transpose (5 .. 8), then flip vertically, then horizontally.
  const bool transpose = orientation >= 5;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8;
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7;
  const int64_t step_y = flip_y ? -size : size, step_x = flip_x ? -1 : 1;
  origin_ = (flip_y ? size * (size - 1) : 0) + (flip_x ? size - 1 : 0);
#if defined(__x86_64__)
  if (channels == 3 && cpu_isa() != Isa::kBase) columns_.repeat_weights();
#endif
  down_ = transpose ? step_x : step_y;
  right_ = transpose ? step_y : step_x;
}

void CropResizer::take(int64_t y, int64_t left, const uint8_t* row) {
  if (y < box_.top || y >= box_.bottom) return;
  const int64_t at = y - box_.top, bytes = channels_ * plane_;
  const uint8_t* pixels = row + channels_ * (box_.left - left);
  uint8_t* kept = kept_.data() + at % rows_.taps * bytes;
  if (channels_ == 3) {
    resize_rgb_row(pixels, columns_, size_, plane_, kept);
  } else {
    resize_row_base<1>(pixels, columns_, size_, plane_, kept);
  }
  for (; next_ < size_ && rows_.first[next_] + rows_.count[next_] - 1 <= at; ++next_) {
    for (int64_t k = 0; k < rows_.count[next_]; ++k) {
      sources_[k] = kept_.data() + (rows_.first[next_] + k) % rows_.taps * bytes;
    }
    const int16_t* weights = rows_.weights.data() + next_ * rows_.stride;
    blend_rows(sources_.data(), weights, rows_.count[next_], rows_.bits, bytes, result_.data());
    emit(next_);
  }
}

void CropResizer::emit(int64_t i) {
  for (int c = 0; c < 3; ++c) {
    const uint8_t* from = result_.data() + (channels_ == 3 ? c : 0) * plane_;
    uint8_t* to = out_ + c * size_ * size_ + origin_ + i * down_;
    if (right_ == 1) {
      std::memcpy(to, from, static_cast<size_t>(size_));
    } else {
      for (int64_t x = 0; x < size_; ++x) to[x * right_] = from[x];
    }
  }
}

void crop_pixels(const uint8_t* pixels, int64_t width, int channels, std::vector<CropResizer>& crops) {
  int64_t taps = 0, top = INT64_MAX, bottom = 0;
  for (const CropResizer& crop : crops) {
    taps = std::max(taps, crop.taps());
    top = std::min(top, crop.box().top);
    bottom = std::max(bottom, crop.box().bottom);
  }
  const int64_t bytes = width * channels;
  std::vector<uint8_t> row(static_cast<size_t>(bytes + 3 * taps + kRowPadding));
  for (int64_t y = top; y < bottom; ++y) {
    std::memcpy(row.data(), pixels + y * bytes, static_cast<size_t>(bytes));
    for (CropResizer& crop : crops) crop.take(y, 0, row.data());
  }
}

}  // namespace sslfast
