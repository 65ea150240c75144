// bank_nce_dense on the tensor cores of 8.0 and later (mma.sync), for half types and up to 256 columns.
//
// Attention with K = V = bank. A block holds kWarps * 16 * kRowTiles queries and streams its part of the bank through a
// ring of shared-memory stages; each stage is read twice, as stored for scores = Q M^T and transposed for P M. A
// thread's fragment of the scores is its fragment of the left factor P, so weights never leave the registers.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "cuda/dense_problem.cuh"

namespace sslfast {
namespace mma {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
// How far a score may exceed the running reference before sums are rescaled (powers of two): rescaling becomes rare.
constexpr float kLazyMargin = 8.0f;

template <int kColumns>
constexpr int kRowTiles = kColumns <= 128 ? 2 : 1;  // of 16 queries for a warp: 128 fp32 sums for a thread
template <int kColumns>
constexpr int kTile = kColumns == 128 ? 32 : 64;  // bank rows of a stage, limited by the registers
template <int kColumns>
constexpr int kStages = kColumns == 64    ? 3
                        : kColumns == 128 ? 4
                                          : 2;
template <int kColumns>
constexpr int kQueries = kWarps * 16 * kRowTiles<kColumns>;
template <int kColumns>
constexpr size_t kSharedBytes = (size_t(kQueries<kColumns>) + kStages<kColumns> * kTile<kColumns>)*kColumns * 2;

template <typename T>
struct Instruction;
template <>
struct Instruction<torch::headeronly::BFloat16> {
  using type = Bf16;
  // Weights are stored as 2^kShift times themselves: fp16 would lose small ones.
  static constexpr int kShift = 0, kBinaryShift = 0;
};
template <>
struct Instruction<torch::headeronly::Half> {
  using type = Fp16;
  static constexpr int kShift = 7, kBinaryShift = 14;
};

// A reference as a maximum of natural exponentials; the largest stays the largest, as OnlineLogSumExp expects.
SSLFAST_HD float natural_maximum(float reference) {
  return reference < FLT_MAX ? reference * kLn2 : FLT_MAX;
}

// Offset of 16-byte chunk `chunk` of row `row` in shared memory, in 16-bit elements: eight rows
// of one chunk, which ldmatrix reads together, fall into different banks.
template <int kColumns>
SSLFAST_HD int swizzled(int row, int chunk) {
  return row * kColumns + ((chunk ^ (row & 7)) * 8);
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T values[2] = {static_cast<T>(low), static_cast<T>(high)};
  return uint32_t(values[0].x) | (uint32_t(values[1].x) << 16);
}

// One stage: kRows bank rows from entry `first` on, zeros behind the last.
template <typename T, int kColumns, int kRows>
__device__ __forceinline__ void load_tile(const DenseProblem<T>& p, int64_t first, T* stage) {
  constexpr int kChunks = kColumns / 8;  // of 16 bytes in a row
  for (int c = threadIdx.x; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks, chunk = c % kChunks;
    const bool valid = first + row < p.num_rows && chunk * 8 < p.columns;
    const T* source = valid ? p.bank + p.bank_row(first + row) * p.columns + chunk * 8 : p.bank;
    cp_async_16(stage + swizzled<kColumns>(row, chunk), source, valid);
  }
}

template <typename T, int kColumns, bool kBinary>
__global__ void __launch_bounds__(kThreads, kColumns <= 128 ? 2 : 1) kernel(const DenseProblem<T> p) {
  using I = typename Instruction<T>::type;
  constexpr int kM = kRowTiles<kColumns>, kRing = kStages<kColumns>, kRows = kTile<kColumns>;
  constexpr int kScoreTiles = kRows / 8, kColumnTiles = kColumns / 8;
  T* const queries = dynamic_shared<T>();                     // [kQueries, kColumns], swizzled
  T* const stages = queries + kQueries<kColumns> * kColumns;  // [kRing, kRows, kColumns], swizzled
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = lane / 4,
            member = lane % 4;  // rows group and group + 8, columns 2 * member and the next
  const int matrix = lane / 8,
            matrix_row = lane % 8;  // whose address this lane gives to ldmatrix
  const int64_t first_query = blockIdx.x * int64_t(kQueries<kColumns>);
  const int part = blockIdx.y;
  const int tile_begin = p.first_tile(part, kRows), tile_end = p.first_tile(part + 1, kRows);
  const float scale = static_cast<float>(p.inverse_temperature) * kLog2E;  // scores as powers of two
  const float offset = p.offset_power();

#pragma unroll
  for (int s = 0; s < kRing - 1; ++s) {
    if (tile_begin + s < tile_end)
      load_tile<T, kColumns, kRows>(p, int64_t(tile_begin + s) * kRows, stages + s * kRows * kColumns);
    cp_async_commit();
  }
  for (int i = threadIdx.x; i < kQueries<kColumns> * (kColumns / 2); i += kThreads) {
    const int row = i / (kColumns / 2), d = i % (kColumns / 2) * 2;  // columns d and d + 1
    const int64_t q = first_query + row;
    const bool valid = q < p.queries && d < p.columns;
    const float* source = p.query + q * p.columns + d;
    *reinterpret_cast<uint32_t*>(queries + swizzled<kColumns>(row, d / 8) + d % 8) =
        valid ? pack<T>(source[0], source[1]) : 0u;
  }

  float sums[kM][kColumnTiles][4];  // [row tile][column tile]: rows group (0, 1) and group + 8 (2, 3)
  float reference[kM][2], sum[kM][2], loss[kM][2];
  SmallSums small[kM][2];  // for NCE
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][j][e] = 0.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      reference[m][h] = -FLT_MAX;
      sum[m][h] = loss[m][h] = 0.0f;
    }
  }

  for (int t = tile_begin; t < tile_end; ++t) {
    const int slot = (t - tile_begin) % kRing;
    cp_async_wait<kRing - 2>();
    __syncthreads();  // stage t has arrived for all threads, and all are done with stage t - 1
    if (t + kRing - 1 < tile_end) {
      load_tile<T, kColumns, kRows>(p, int64_t(t + kRing - 1) * kRows,
                                    stages + (slot + kRing - 1) % kRing * kRows * kColumns);
    }
    cp_async_commit();
    const T* const stage = stages + slot * kRows * kColumns;

    float scores[kM][kScoreTiles][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int row = (warp * kM + m) * 16 + (matrix & 1) * 8 + matrix_row;
        ldmatrix_x4(a[m], queries + swizzled<kColumns>(row, 2 * k + (matrix >> 1)));
      }
#pragma unroll
      for (int n = 0; n < kScoreTiles; n += 2) {
        uint32_t b[4];  // row tiles n and n + 1 of the bank, low and high half of the 16 columns each
        const int row = n * 8 + (matrix >> 1) * 8 + matrix_row;
        ldmatrix_x4(b, stage + swizzled<kColumns>(row, 2 * k + (matrix & 1)));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_m16n8k16(I{}, scores[m][n], a[m], b[0], b[1]);
          mma_m16n8k16(I{}, scores[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }

    const int64_t first = int64_t(t) * kRows;
    const bool whole = first + kRows <= p.num_rows && !p.exclude_self;
    uint32_t weights[kM][kScoreTiles][2];  // pairs of weights: row group, row group + 8
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t q = first_query + (warp * kM + m) * 16 + group + 8 * h;
        const int64_t left_out = whole ? -1 : p.left_out(q);
        const auto at = [&](int i) -> float& { return scores[m][i / 2][2 * h + i % 2]; };
        if (!whole) {
#pragma unroll
          for (int i = 0; i < kRows / 4; ++i) {
            const int64_t entry = first + i / 2 * 8 + 2 * member + i % 2;
            if (entry >= p.num_rows || (p.exclude_self && p.negatives[entry] == left_out)) at(i) = -INFINITY;
          }
        }
        constexpr float kWeightScale = float(1 << Instruction<T>::kBinaryShift);
        if (!kBinary || !weigh_small<kRows / 4>(at, scale, offset, kWeightScale, small[m][h])) {
          float highest = -INFINITY;
#pragma unroll
          for (int i = 0; i < kRows / 4; ++i) highest = fmaxf(highest, at(i));
          highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
          highest = fminf(scale * fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2)), FLT_MAX);
          const bool raise = highest > reference[m][h] + (kLazyMargin + Instruction<T>::kShift);
          const float factor = raise ? fast_exp2(reference[m][h] - highest + Instruction<T>::kShift) : 1.0f;
          if (raise) reference[m][h] = highest - Instruction<T>::kShift;
          if (__any_sync(kFullMask, raise)) {
            sum[m][h] *= factor;
            if constexpr (!kBinary) {
#pragma unroll
              for (int j = 0; j < kColumnTiles; ++j) {
                sums[m][j][2 * h] *= factor;
                sums[m][j][2 * h + 1] *= factor;
              }
            }
          }
          if constexpr (kBinary) {
            weigh_any<kRows / 4>(at, scale, offset, reference[m][h], kWeightScale, sum[m][h], loss[m][h]);
          } else {
#pragma unroll
            for (int i = 0; i < kRows / 4; ++i) {
              at(i) = fast_exp2(fmaf(at(i), scale, -reference[m][h]));
              sum[m][h] += at(i);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kScoreTiles; ++n) weights[m][n][h] = pack<T>(at(2 * n), at(2 * n + 1));
      }
    }

#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; j += 2) {
        uint32_t b[4];  // column tiles j and j + 1, low and high half of the 16 bank rows each
        const int row = k * 16 + (matrix & 1) * 8 + matrix_row;
        ldmatrix_x4_trans(b, stage + swizzled<kColumns>(row, j + (matrix >> 1)));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const uint32_t a[4] = {weights[m][2 * k][0], weights[m][2 * k][1], weights[m][2 * k + 1][0],
                                 weights[m][2 * k + 1][1]};
          mma_m16n8k16(I{}, sums[m][j], a, b[0], b[1]);
          mma_m16n8k16(I{}, sums[m][j + 1], a, b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

  const float unshift = kBinary ? 1.0f / float(1 << Instruction<T>::kBinaryShift) : 1.0f;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kBinary) small[m][h].fold(offset, reference[m][h], sum[m][h], loss[m][h]);
      float total = sum[m][h], total_loss = loss[m][h];
      total += __shfl_xor_sync(kFullMask, total, 1);
      total += __shfl_xor_sync(kFullMask, total, 2);
      total_loss += __shfl_xor_sync(kFullMask, total_loss, 1);
      total_loss += __shfl_xor_sync(kFullMask, total_loss, 2);
      const int64_t q = first_query + (warp * kM + m) * 16 + group + 8 * h;
      if (q >= p.queries) continue;
      const int64_t slot = part * p.queries + q;
      if (member == 0) p.states[slot] = {natural_maximum(reference[m][h]), total, total_loss};
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const int d = j * 8 + 2 * member;
        if (d < p.columns) {
          *reinterpret_cast<float2*>(p.weighted + slot * p.columns + d) =
              make_float2(sums[m][j][2 * h] * unshift, sums[m][j][2 * h + 1] * unshift);
        }
      }
    }
  }
}

}  // namespace mma

template <typename T>
DenseShape mma_shape(const DenseProblem<T>& p) {
  if (p.columns <= 64) return {mma::kQueries<64>, mma::kTile<64>, 2};
  if (p.columns <= 128) return {mma::kQueries<128>, mma::kTile<128>, 2};
  return {mma::kQueries<256>, mma::kTile<256>, 1};
}

template <typename T, int kColumns>
void launch_mma_columns(const DenseProblem<T>& p, dim3 grid, cudaStream_t stream) {
  const dim3 block(mma::kThreads);
  constexpr const char* op = "bank_nce_dense";
  if (p.binary) {
    launch_kernel(op, mma::kernel<T, kColumns, true>, grid, block, mma::kSharedBytes<kColumns>, stream, p);
  } else {
    launch_kernel(op, mma::kernel<T, kColumns, false>, grid, block, mma::kSharedBytes<kColumns>, stream, p);
  }
}

template <typename T>
void launch_mma(const DenseProblem<T>& p, dim3 grid, cudaStream_t stream) {
  if (p.columns <= 64) {
    launch_mma_columns<T, 64>(p, grid, stream);
  } else if (p.columns <= 128) {
    launch_mma_columns<T, 128>(p, grid, stream);
  } else {
    launch_mma_columns<T, 256>(p, grid, stream);
  }
}

}  // namespace sslfast
