// bank_nce: how a warp reads and scores a tile of rows.
#pragma once

#include "bank_nce.h"
#include "common/launch.cuh"
#include "cuda/nce_term.cuh"

namespace sslfast {
namespace sampled {

constexpr int kWarps = 4;  // per block; a block owns one sample and one part of its negatives
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kDraw = 64;         // negatives that a warp draws at once: two for each lane
constexpr int kMaxColumns = 512;  // 32 lanes x 16 columns in registers
// What a block costs beside its draws, in draws of a warp: the first loads, and merging the warps.
constexpr int kFixedDraws = 1;

// How far a score may exceed the query's running maximum before sums are rescaled: exp(8) times K is far inside the
// range of fp32, and rescaling becomes rare.
constexpr float kLazyMargin = 8.0f;

__device__ __forceinline__ float exponential(float x) {
  return fast_exp2(x * kLog2E);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

template <typename T>
struct Problem {
  using A = accumulate_t<T>;
  const A* __restrict__ query;              // [V, B, D]
  const T* __restrict__ bank;               // [N, D]
  const int64_t* __restrict__ index;        // [B]
  const int64_t* __restrict__ negatives;    // [B, K] or null: drawn
  const int64_t* __restrict__ step_tensor;  // [] or null
  const double* __restrict__ z_tensor;      // [] or null
  NegativeSampler sampler;
  Shard shard;
  int64_t views, batch, columns, num_negatives;
  double inverse_temperature, z;
  bool binary;
  int splits;               // parts of the negatives
  A* __restrict__ partial;  // [V, B, splits, D + 3]: weighted rows, maximum, sum of exponentials, binary loss
  A* __restrict__ loss;     // [V, B]
  A* __restrict__ lse;      // [V, B]
  A* __restrict__ grad;     // [V, B, D]

  __device__ double offset() const {
    return binary ? nce_offset(z_tensor != nullptr ? *z_tensor : z, num_negatives, shard.num_rows) : 0.0;
  }
};

// Sums M values over the warp; afterwards a lane holds the total of value lane / (32 / M). M is a power of two.
// Every step halves the values by exchanging halves between lanes: M + log2(32 / M) shuffles instead of 5 M.
template <int M, int kOffset = kWarpSize / 2, typename A>
__device__ __forceinline__ A transpose_sum(const A (&x)[M], int lane) {
  if constexpr (M == 1) {
    A total = x[0];
#pragma unroll
    for (int offset = kOffset; offset > 0; offset /= 2) total += __shfl_xor_sync(kFullMask, total, offset);
    return total;
  } else {
    A half[M / 2];
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < M / 2; ++i) {
      const A send = upper ? x[i] : x[i + M / 2], keep = upper ? x[i + M / 2] : x[i];
      half[i] = keep + __shfl_xor_sync(kFullMask, send, kOffset);
    }
    return transpose_sum<M / 2, kOffset / 2>(half, lane);
  }
}

// How rows are read: element by element, by 16-byte loads, or by those where every lane has columns (D = 128, 256,
// 512).
enum class Loads { kScalar, kVector, kFull };

// How the lanes of a warp share a tile of rows: 16 bytes of a half type are 8 columns, so that half a warp has a row.
template <typename T, int kChunks, Loads kLoads>
struct Layout {
  static constexpr int kWidth = kLoads != Loads::kScalar && sizeof(T) == 2 ? 8 : 4;  // neighbouring columns of a lane
  static constexpr int kRowLanes = 128 / kWidth, kGroups = kWarpSize / kRowLanes;    // rows side by side
  static constexpr int kColumns = kWidth * kChunks;                                  // of a lane
  static constexpr int kTileRows = 8 / kChunks, kOwn = kTileRows / kGroups;          // rows of a tile; of a lane
};

// A lane's columns of one row as they are stored: kWidth * lane + 128 * c .. + kWidth - 1.
template <typename T, int kChunks, Loads kLoads>
struct RawRow {
  using L = Layout<T, kChunks, kLoads>;
  alignas(16) T x[L::kColumns];

  __device__ __forceinline__ void load(const T* __restrict__ row, uint32_t columns, int lane) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t first = L::kWidth * lane + 128 * c;
      if constexpr (kLoads == Loads::kScalar) {
#pragma unroll
        for (int e = 0; e < L::kWidth; ++e) {
          x[L::kWidth * c + e] = first + e < columns ? row[first + e] : static_cast<T>(0.0f);
        }
      } else {
        constexpr int kVectors = L::kWidth * static_cast<int>(sizeof(T)) / 16;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          uint4 value = make_uint4(0, 0, 0, 0);
          if (kLoads == Loads::kFull || first < columns) value = __ldg(reinterpret_cast<const uint4*>(row + first) + v);
          *(reinterpret_cast<uint4*>(x + L::kWidth * c) + v) = value;
        }
      }
    }
  }
  __device__ __forceinline__ void unpack(accumulate_t<T> (&values)[L::kColumns]) const {
#pragma unroll
    for (int j = 0; j < L::kColumns; ++j) values[j] = static_cast<accumulate_t<T>>(x[j]);
  }
};

// Appends the rows of a draw that the shard holds, as rows of the shard, to a warp's queue, in the order of the draw.
__device__ __forceinline__ int collect(const Shard& shard, int64_t first, int64_t second, bool has_first,
                                       bool has_second, int lane, uint32_t* queue, int waiting) {
  has_first = has_first && shard.holds(first);
  has_second = has_second && shard.holds(second);
  const unsigned firsts = __ballot_sync(kFullMask, has_first), seconds = __ballot_sync(kFullMask, has_second);
  const unsigned before = (1u << lane) - 1;
  int slot = waiting + __popc(firsts & before) + __popc(seconds & before);
  if (has_first) queue[slot++] = static_cast<uint32_t>(first - shard.first);
  if (has_second) queue[slot] = static_cast<uint32_t>(second - shard.first);
  __syncwarp();
  return waiting + __popc(firsts) + __popc(seconds);
}

}  // namespace sampled
}  // namespace sslfast
