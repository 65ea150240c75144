// Shared by the kernels of bank_nce_dense: the problem, and the state after a part of the bank.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bank_nce_dense.h"
#include "common/launch.cuh"
#include "cuda/nce_term.cuh"

namespace sslfast {

// kSimt: fp32 and fp64 banks, and everything that the others do not support. kMma: half types, up to 256 columns,
// tensor cores of 8.0 and later. kWgmma: those of 9.0a.
enum class DenseKernel { kSimt, kMma, kWgmma };

// Tile sizes of a kernel.
struct DenseShape {
  int queries, tile_rows, blocks_per_multiprocessor;
};

template <typename T>
struct DenseProblem {
  using A = accumulate_t<T>;
  const A* __restrict__ query;            // [Q, D], Q = V * B
  const T* __restrict__ bank;             // [N, D]
  const int64_t* __restrict__ index;      // [B]
  const int64_t* __restrict__ negatives;  // [K] or null: the whole bank
  const double* __restrict__ z_tensor;    // [] or null
  int64_t queries, batch, columns, bank_rows /* N */, num_rows /* N or K */, num_negatives;
  double inverse_temperature, z;
  bool binary, exclude_self;
  bool rounds;  // the kernel takes queries in the bank's type
  int parts;    // of the bank: grid y
  // Of every part and query, with exponentials exp(s - maximum): maximum is any number near the largest score.
  StreamState<A>* __restrict__ states;  // [parts, Q]
  A* __restrict__ weighted;             // [parts, Q, D]
  A* __restrict__ loss;                 // [Q]
  A* __restrict__ lse;                  // [Q]
  A* __restrict__ grad;                 // [Q, D]

  // The positive's score must equal its score in the stream.
  __device__ __forceinline__ A rounded(A x) const { return rounds ? static_cast<A>(static_cast<T>(x)) : x; }
  __device__ __forceinline__ A offset() const {
    return static_cast<A>(binary ? nce_offset(z_tensor != nullptr ? *z_tensor : z, num_negatives, bank_rows) : 0.0);
  }
  // The same as a power of two.
  __device__ __forceinline__ float offset_power() const {
    return static_cast<float>(
        binary ? nce_offset(z_tensor != nullptr ? *z_tensor : z, num_negatives, bank_rows) * 1.4426950408889634 : 0.0);
  }
  // Part `part` has the tiles first_tile(part) .. first_tile(part + 1) - 1.
  __device__ __forceinline__ int first_tile(int part, int tile_rows) const {
    const int64_t tiles = (num_rows + tile_rows - 1) / tile_rows;
    return static_cast<int>(tiles * part / parts);
  }
  // The bank row behind entry `entry` < num_rows of the stream.
  __device__ __forceinline__ int64_t bank_row(int64_t entry) const {
    if (negatives == nullptr) return entry;
    const int64_t row = negatives[entry];
    if (row < 0 || row >= bank_rows) __trap();
    return row;
  }
  // The row of the list excluded for query q; -1: none.
  __device__ __forceinline__ int64_t left_out(int64_t q) const {
    return exclude_self && q < queries ? index[q % batch] : -1;
  }
};

}  // namespace sslfast
