#include "rotate90.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/element.h"

namespace sslfast {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "element 0 of a word must be its lowest byte");

constexpr int64_t kStrip = 256;      // lines read together: their cache lines stay in L1
constexpr int64_t kGrain = 1 << 16;  // smallest work of a thread in bytes

// V elements are moved together as one 64-bit word.
template <typename T>
constexpr int kWord = 8 / sizeof(T);

template <typename T>
uint64_t load(const T* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

template <typename T>
void store(T* to, uint64_t word) {
  std::memcpy(to, &word, sizeof word);
}

// The low `bits` of every 2 * bits.
constexpr uint64_t alternating(int bits) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += 2 * bits) mask |= ((uint64_t(1) << bits) - 1) << at;
  return mask;
}

// V words of V elements: element v of word u becomes element u of word v. Swaps the off-diagonal halves, then quarters.
template <typename T, int kHalf = kWord<T> / 2>
inline void transpose_words(uint64_t (&words)[kWord<T>]) {
  if constexpr (kHalf >= 1) {
    constexpr int kBits = kHalf * 8 * static_cast<int>(sizeof(T));
    constexpr uint64_t kMask = alternating(kBits);
#pragma GCC unroll 8
    for (int u = 0; u < kWord<T>; ++u) {
      if (u & kHalf) continue;
      const uint64_t swap = ((words[u] >> kBits) ^ words[u + kHalf]) & kMask;
      words[u + kHalf] ^= swap;
      words[u] ^= swap << kBits;
    }
    transpose_words<T, kHalf / 2>(words);
  }
}

template <typename T>
inline uint64_t reverse_word(uint64_t word) {
  word = __builtin_bswap64(word);
  if (sizeof(T) == 2) word = ((word & alternating(8)) << 8) | ((word >> 8) & alternating(8));
  if (sizeof(T) == 4) {
    word = ((word & alternating(8)) << 8) | ((word >> 8) & alternating(8));
    word = ((word & alternating(16)) << 16) | ((word >> 16) & alternating(16));
  }
  return sizeof(T) == 8 ? __builtin_bswap64(word) : word;
}

// out[i, j] = in[j, S-1-i] (one turn) or in[S-1-j, i] (three turns).
template <bool kThree, typename T>
void rotate_odd(const T* __restrict__ in, T* __restrict__ out, int64_t side) {
  constexpr int V = kWord<T>;
  const auto place = [&](int64_t r, int64_t c) -> T& {  // where in[r, c] goes
    return kThree ? out[c * side + side - 1 - r] : out[(side - 1 - c) * side + r];
  };
  const int64_t whole = side - side % V;
  for (int64_t strip = 0; strip < whole; strip += kStrip) {
    const int64_t end = std::min(strip + kStrip, whole);
    for (int64_t c = 0; c < whole; c += V) {
      for (int64_t r = strip; r < end; r += V) {
        uint64_t words[V];
#pragma GCC unroll 8
        for (int u = 0; u < V; ++u) words[u] = load(in + (kThree ? r + V - 1 - u : r + u) * side + c);
        transpose_words<T>(words);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(&place(kThree ? r + V - 1 : r, c + v), words[v]);
      }
    }
  }
  for (int64_t r = 0; r < whole; ++r) {
    for (int64_t c = whole; c < side; ++c) place(r, c) = in[r * side + c];
  }
  for (int64_t c = 0; c < side; ++c) {
    for (int64_t r = whole; r < side; ++r) place(r, c) = in[r * side + c];
  }
}

template <typename T>
void rotate_plane(const T* __restrict__ in,  // [S, S]
                  T* __restrict__ out,       // [S, S]
                  int64_t side, int turns) {
  constexpr int V = kWord<T>;
  const int64_t count = side * side;
  int64_t i = 0;
  switch (turns) {
    case 0:
      std::memcpy(out, in, count * sizeof(T));
      break;
    case 1:
      rotate_odd<false>(in, out, side);
      break;
    case 2:
      for (; i + V <= count; i += V) store(out + i, reverse_word<T>(load(in + count - V - i)));
      for (; i < count; ++i) out[i] = in[count - 1 - i];
      break;
    default:
      rotate_odd<true>(in, out, side);
  }
}

Tensor rotate90_cpu(const Tensor& images_,           // [N, C, S, S]
                    const Tensor& quarter_turns_) {  // [N] int64
  check_rotate90(images_, quarter_turns_);
  const Tensor images = readable("rotate90", "images", images_);
  const Tensor quarter_turns = readable("rotate90", "quarter_turns", quarter_turns_);
  const int64_t channels = images.size(1), side = images.size(2);
  Tensor rotated = allocate("rotate90", images, {images.size(0), channels, side, side});
  if (images.numel() == 0) return rotated;
  const int64_t* turns = static_cast<const int64_t*>(quarter_turns.const_data_ptr());
  SSLFAST_DISPATCH_ELEMENT(images, [&] {
    const element_t* in = static_cast<const element_t*>(images.const_data_ptr());
    element_t* out = static_cast<element_t*>(rotated.mutable_data_ptr());
    const int64_t plane = side * side;
    const int64_t grain = std::max<int64_t>(1, kGrain / static_cast<int64_t>(plane * sizeof(element_t)));
    torch::stable::parallel_for(0, images.size(0) * channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        rotate_plane(in + p * plane, out + p * plane, side, turns_mod_4(turns[p / channels]));
      }
    });
  });
  return rotated;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("rotate90", TORCH_BOX(&sslfast::rotate90_cpu));
}
