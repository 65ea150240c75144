// bank_nce_dense without tensor cores: any type, up to 512 columns.
#pragma once

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/dense_problem.cuh"

namespace sslfast {
namespace simt {

constexpr int kWarps = 8;
constexpr int kTile = kWarpSize;  // rows: a lane scores one

// Columns of a query that a lane sums, times the queries of its warp: 32 fp32 or 16 fp64 sums in registers.
template <typename T, int kChunks>
constexpr int kQueries = (std::is_same_v<T, double> ? 4 : 8) / kChunks;

template <typename T, int kChunks>
constexpr size_t kSharedBytes =
    (size_t(kWarps) * kQueries<T, kChunks> * 128 * kChunks + size_t(kTile) * (128 * kChunks + 4)) *
    sizeof(accumulate_t<T>);

template <typename A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kFullMask, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Block (query block x, part y). A warp owns kQueries queries: a lane scores them against its row of the tile, then
// adds all the tile's rows in the columns 4 * lane + 128 * c .. + 3.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kWarps* kWarpSize, 1) kernel(const DenseProblem<T> p) {
  using A = accumulate_t<T>;
  constexpr int kOwn = kQueries<T, kChunks>;
  constexpr int kPadded = 128 * kChunks, kStride = kPadded + 4;  // of a tile's row: no bank conflicts
  A* const queries = dynamic_shared<A>();                        // [kWarps * kOwn, kPadded], q / tau
  A* const tile = queries + kWarps * kOwn * kPadded;             // [kTile, kStride]
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first_query = (blockIdx.x * int64_t(kWarps) + warp) * kOwn;
  const int part = blockIdx.y;
  const A offset = p.offset();
  A* const own = queries + warp * kOwn * kPadded;

  A sums[kOwn][4 * kChunks], maximum[kOwn], sum[kOwn], loss[kOwn];
  int64_t left_out[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t q = first_query + i;
    for (int d = lane; d < kPadded; d += kWarpSize) {
      own[i * kPadded + d] =
          q < p.queries && d < p.columns ? p.query[q * p.columns + d] * static_cast<A>(p.inverse_temperature) : A(0);
    }
    left_out[i] = p.left_out(q);
    maximum[i] = -kLargest<A>;
    sum[i] = loss[i] = A(0);
#pragma unroll
    for (int j = 0; j < 4 * kChunks; ++j) sums[i][j] = A(0);
  }

  const int tile_end = p.first_tile(part + 1, kTile);
  for (int t = p.first_tile(part, kTile); t < tile_end; ++t) {
    const int64_t first = int64_t(t) * kTile;
    __syncthreads();  // every warp is done with the previous tile
    for (int r = warp; r < kTile; r += kWarps) {
      const T* source = first + r < p.num_rows ? p.bank + p.bank_row(first + r) * p.columns : nullptr;
      for (int d = lane; d < kPadded; d += kWarpSize) {
        tile[r * kStride + d] = source != nullptr && d < p.columns ? static_cast<A>(source[d]) : A(0);
      }
    }
    __syncthreads();

    A weights[kOwn];  // first the scores
#pragma unroll
    for (int i = 0; i < kOwn; ++i) weights[i] = A(0);
    for (int d = 0; d < kPadded; d += 4) {
      const Quad<A> row = *reinterpret_cast<const Quad<A>*>(tile + lane * kStride + d);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Quad<A> query = *reinterpret_cast<const Quad<A>*>(own + i * kPadded + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) weights[i] += query.x[e] * row.x[e];
      }
    }
    const bool valid = first + lane < p.num_rows;
    const int64_t id = valid && p.exclude_self ? p.negatives[first + lane] : -2;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const bool counts = valid && id != left_out[i];
      const A score = weights[i];
      const A highest = min(warp_max(counts && score > -kLargest<A> ? score : -kLargest<A>), kLargest<A>);
      if (highest > maximum[i]) {
        const A factor = exp(maximum[i] - highest);
        maximum[i] = highest;
        sum[i] *= factor;
        if (!p.binary) {
#pragma unroll
          for (int j = 0; j < 4 * kChunks; ++j) sums[i][j] *= factor;
        }
      }
      weights[i] = counts ? exp(score - maximum[i]) : A(0);
      sum[i] += weights[i];  // of this lane's rows
      if (p.binary && counts) {
        const NceTerm<A> term = nce_term(score - offset);
        loss[i] += term.softplus;
        weights[i] = term.sigmoid;
      }
    }
    for (int r = 0; r < kTile; ++r) {
      A row[4 * kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const Quad<A> quad = *reinterpret_cast<const Quad<A>*>(tile + r * kStride + 128 * c + 4 * lane);
#pragma unroll
        for (int e = 0; e < 4; ++e) row[4 * c + e] = quad.x[e];
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const A weight = __shfl_sync(kFullMask, weights[i], r);
#pragma unroll
        for (int j = 0; j < 4 * kChunks; ++j) sums[i][j] += weight * row[j];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int64_t q = first_query + i;
    const A total = warp_sum(sum[i]), total_loss = warp_sum(loss[i]);
    if (q >= p.queries) continue;
    const int64_t slot = part * p.queries + q;
    if (lane == 0) p.states[slot] = {maximum[i], total, total_loss};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = 128 * c + 4 * lane + e;
        if (d < p.columns) p.weighted[slot * p.columns + d] = sums[i][4 * c + e];
      }
    }
  }
}

}  // namespace simt

template <typename T>
DenseShape simt_shape(const DenseProblem<T>& p) {
  const int chunks = p.columns <= 128 ? 1 : p.columns <= 256 ? 2 : 4;
  return {simt::kWarps * (std::is_same_v<T, double> ? 4 : 8) / chunks, simt::kTile, 2};
}

template <typename T>
void launch_simt(const DenseProblem<T>& p, dim3 grid, cudaStream_t stream) {
  const dim3 block(simt::kWarps * kWarpSize);
  constexpr const char* op = "bank_nce_dense";
  if (p.columns <= 128) {
    launch_kernel(op, simt::kernel<T, 1>, grid, block, simt::kSharedBytes<T, 1>, stream, p);
  } else if (p.columns <= 256) {
    launch_kernel(op, simt::kernel<T, 2>, grid, block, simt::kSharedBytes<T, 2>, stream, p);
  } else {
    launch_kernel(op, simt::kernel<T, 4>, grid, block, simt::kSharedBytes<T, 4>, stream, p);
  }
}

}  // namespace sslfast
