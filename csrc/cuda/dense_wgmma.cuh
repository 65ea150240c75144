// bank_nce_dense on the warpgroup tensor cores of 9.0a, for half types, 64 or 128 columns, the whole bank.
//
// As dense_mma.cuh, with the copy engine filling the stages: one thread of the producer warpgroup keeps the ring full,
// two consumer warpgroups take 64 queries each. A consumer has the next tile's scores and this tile's P M in flight
// together, so that exponentials overlap with products.
#pragma once

#include "common/launch.cuh"
#include "common/wgmma.cuh"
#include "cuda/dense_mma.cuh"
#include "cuda/dense_problem.cuh"

namespace sslfast {
namespace wgmma {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kGroup;
constexpr int kQueries = kConsumers * 64;
constexpr int kTile = 128;      // bank rows of a stage
constexpr int kRowBytes = 128;  // of a panel: 64 columns
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <int kColumns>
constexpr int kPanels = kColumns / 64;
template <int kColumns>
constexpr int kStageBytes = kTile * kColumns * 2;
template <int kColumns>
constexpr int kStages = kColumns == 128 ? 6 : 12;  // 192 KiB
template <int kColumns>
constexpr size_t kSharedBytes =
    1024 + size_t(kQueries) * kColumns * 2 + size_t(kStages<kColumns>) * kStageBytes<kColumns> + 16 * kStages<kColumns>;

template <int kColumns>
struct Shared {
  unsigned char* queries;  // [kPanels, kQueries, 128 bytes], swizzled
  unsigned char* stages;   // [kStages, kPanels, kTile, 128 bytes], swizzled
  uint64_t* full;          // [kStages]: the copy engine has filled the stage
  uint64_t* empty;         // [kStages]: every consumer is done with it

  __device__ __forceinline__ explicit Shared(unsigned char* raw)
      : queries(raw + ((1024 - (shared_address(raw) & 1023)) & 1023)),
        stages(queries + kQueries * kColumns * 2),
        full(reinterpret_cast<uint64_t*>(stages + kStages<kColumns> * kStageBytes<kColumns>)),
        empty(full + kStages<kColumns>) {}
};

// Stage of a tile, and the parity of its barriers' phase.
template <int kRing>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kRing) slot = 0, parity ^= 1;
  }
};

// Byte of column `column` of row `row` in a panel: as the copy engine stores a box.
SSLFAST_HD int swizzled_byte(int row, int column /* of 64 */) {
  return row * kRowBytes + (((column / 8) ^ (row & 7)) * 16) + column % 8 * 2;
}

// Score `i` of kTile / 4 that a thread holds of its row `half`, and the entry of the tile that it belongs to.
SSLFAST_HD int entry(int half, int i) {
  return i / 2 * 4 + 2 * half + i % 2;
}
SSLFAST_HD int row_of_tile(int i, int member) {
  return i / 2 * 8 + 2 * member + i % 2;
}

// Entries past the last row of the bank get a weight of 0.
__device__ __forceinline__ void mask_tail(float (&scores)[kTile / 2], int valid, int member) {
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) {
    if (row_of_tile(i, member) >= valid) scores[entry(0, i)] = scores[entry(1, i)] = -INFINITY;
  }
}

// The running state of the two query rows that a thread shares with the three others of its quad.
template <typename T>
struct Rows {
  float reference[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {0.0f, 0.0f}, loss[2] = {0.0f, 0.0f};

  SmallSums small[2];  // for NCE

  // Turns scores [64, kTile] into weights, in place; factor: rescales earlier sums. Returns whether any row rescales.
  // `offset` as a power of two.
  template <bool kBinary>
  __device__ __forceinline__ bool weigh(float (&scores)[kTile / 2], float scale, float offset, float (&factor)[2]) {
    constexpr int kShift = mma::Instruction<T>::kShift;
    constexpr float kWeightScale = float(1 << mma::Instruction<T>::kBinaryShift);
    bool any = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto at = [&](int i) -> float& { return scores[entry(h, i)]; };
      if (kBinary && weigh_small<kTile / 4>(at, scale, offset, kWeightScale, small[h])) continue;
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kTile / 4; ++i) highest = fmaxf(highest, at(i));
      highest = fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 1));
      highest = fminf(scale * fmaxf(highest, __shfl_xor_sync(kFullMask, highest, 2)), FLT_MAX);
      const bool raise = highest > reference[h] + (mma::kLazyMargin + kShift);
      factor[h] = raise ? fast_exp2(reference[h] - highest + kShift) : 1.0f;
      if (raise) reference[h] = highest - kShift;
      any |= raise;
      sum[h] *= factor[h];
      if constexpr (kBinary) {
        weigh_any<kTile / 4>(at, scale, offset, reference[h], kWeightScale, sum[h], loss[h]);
      } else {
#pragma unroll
        for (int i = 0; i < kTile / 4; ++i) {
          at(i) = fast_exp2(fmaf(at(i), scale, -reference[h]));
          sum[h] += at(i);
        }
      }
    }
    return !kBinary && __any_sync(kFullMask, any);
  }
};

// scores = queries * tile^T. Both matrices by the low words of their descriptors.
template <typename T, int kColumns>
__device__ __forceinline__ void score_tile(float (&scores)[kTile / 2], uint32_t queries, uint32_t tile) {
  using I = typename mma::Instruction<T>::type;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const int panel = k / 4, byte = k % 4 * 32;
    wgmma_m64n128k16(I{}, scores, matrix_descriptor(queries + (panel * kQueries * kRowBytes + byte) / 16),
                     matrix_descriptor(tile + (panel * kTile * kRowBytes + byte) / 16), k > 0);
  }
}

// sums += weights * tile.
template <typename T, int kColumns>
__device__ __forceinline__ void add_tile(float (&sums)[kColumns / 2], const uint32_t (&weights)[kTile / 16][4],
                                         uint32_t tile) {
  using I = typename mma::Instruction<T>::type;
  constexpr uint32_t kPanelStep = uint32_t(kTile * kRowBytes / 16) << 16;
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
    const uint64_t rows = matrix_descriptor(tile + kPanelStep + k * 16 * kRowBytes / 16);
    if constexpr (kColumns == 128) {
      wgmma_m64n128k16_transposed(I{}, sums, weights[k], rows);
    } else {
      wgmma_m64n64k16_transposed(I{}, sums, weights[k], rows);
    }
  }
}

template <typename T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kTile / 16][4], const float (&scores)[kTile / 2]) {
#pragma unroll
  for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) weights[k][r] = mma::pack<T>(scores[8 * k + 2 * r], scores[8 * k + 2 * r + 1]);
  }
}

template <typename T, int kColumns, bool kBinary>
__device__ __forceinline__ void consume(const DenseProblem<T>& p, const Shared<kColumns>& shared, int tile_begin,
                                        int tile_end) {
  // The shuffle shows the compiler that the number is the same in all lanes: addresses go to uniform registers.
  const int consumer = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kGroup - 1, 0);
  const int thread = threadIdx.x % kGroup;
  const int warp = thread / kWarpSize, group = thread % kWarpSize / 4, member = thread % 4;
  const int64_t first_query = blockIdx.x * int64_t(kQueries) + consumer * 64;
  const int part = blockIdx.y;
  const float scale = static_cast<float>(p.inverse_temperature) * kLog2E, offset = p.offset_power();

  for (int i = thread; i < 64 * (kColumns / 2); i += kGroup) {
    const int row = i / (kColumns / 2), d = i % (kColumns / 2) * 2;
    const int64_t q = first_query + row;
    const float* source = p.query + q * kColumns + d;
    *reinterpret_cast<uint32_t*>(shared.queries + d / 64 * kQueries * kRowBytes +
                                 swizzled_byte(consumer * 64 + row, d % 64)) =
        q < p.queries ? mma::pack<T>(source[0], source[1]) : 0u;
  }
  async_proxy_fence();
  named_barrier_sync(1 + consumer, kGroup);  // the warpgroup's queries have arrived

  float sums[kColumns / 2], scores[kTile / 2], factor[2];
  uint32_t weights[kTile / 16][4];
  Rows<T> rows;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0.0f;
  const uint32_t own = descriptor_word(shared.queries + consumer * 64 * kRowBytes, 0);
  const uint32_t stages = descriptor_word(shared.stages, 0);
  const auto tile_in = [&](int slot) { return stages + slot * (kStageBytes<kColumns> / 16); };
  const int last_tile = static_cast<int>((p.num_rows - 1) / kTile);
  const int last_rows = static_cast<int>((p.num_rows - 1) % kTile) + 1;
  // The sums are as large as the previous tile's references; its weights are in `scores`.
  const auto finish_weights = [&](bool rescale) {
    if (!kBinary && rescale) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] *= factor[i % 4 / 2];
    }
    pack_weights<T>(weights, scores);
  };

  RingPosition<kStages<kColumns>> current;  // of tile t
  int previous = 0, released = -1;          // slots of tile t - 1, and of tile t - 2 once there is one
  barrier_wait(shared.full, 0);
  wgmma_hold(scores);
  wgmma_fence();
  score_tile<T, kColumns>(scores, own, tile_in(0));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(scores);
  if (tile_begin == last_tile) mask_tail(scores, last_rows, member);
  bool rescale = rows.template weigh<kBinary>(scores, scale, offset, factor);
  // The consumers issue their products in turn, so that one takes exponentials while the tensor cores work for the
  // other (FlashAttention-3, section 3.1): a consumer waits for its turn and then hands it on.
  constexpr int kTurn = 1 + kConsumers;  // barrier of the first consumer
  if (consumer == 1 && tile_begin + 1 < tile_end) named_barrier_arrive(kTurn, kConsumers * kGroup);
  for (int t = tile_begin + 1; t < tile_end; ++t) {
    current.advance();
    // Behind a branch, that of the wait, so that the compiler does not wait for the products before the exponentials.
    barrier_wait(shared.full + current.slot, current.parity);
    wgmma_wait<0>();
    wgmma_hold(sums);
    if (thread == 0 && released >= 0) barrier_arrive(shared.empty + released);
    finish_weights(rescale);
    wgmma_hold(scores);
    wgmma_hold(sums);
    named_barrier_sync(kTurn + consumer, kConsumers * kGroup);
    wgmma_fence();
    score_tile<T, kColumns>(scores, own, tile_in(current.slot));
    wgmma_commit();
    add_tile<T, kColumns>(sums, weights, tile_in(previous));
    wgmma_commit();
    if (consumer == 0 || t + 1 < tile_end) named_barrier_arrive(kTurn + 1 - consumer, kConsumers * kGroup);
    released = previous;
    previous = current.slot;
    wgmma_wait<1>();
    wgmma_hold(scores);
    if (t == last_tile) mask_tail(scores, last_rows, member);
    rescale = rows.template weigh<kBinary>(scores, scale, offset, factor);
  }
  wgmma_wait<0>();
  wgmma_hold(sums);
  finish_weights(rescale);
  wgmma_hold(sums);
  wgmma_fence();
  add_tile<T, kColumns>(sums, weights, tile_in(previous));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(sums);

  const float unshift = kBinary ? 1.0f / float(1 << mma::Instruction<T>::kBinaryShift) : 1.0f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if constexpr (kBinary) rows.small[h].fold(offset, rows.reference[h], rows.sum[h], rows.loss[h]);
    float total = rows.sum[h], total_loss = rows.loss[h];
    total += __shfl_xor_sync(kFullMask, total, 1);
    total += __shfl_xor_sync(kFullMask, total, 2);
    total_loss += __shfl_xor_sync(kFullMask, total_loss, 1);
    total_loss += __shfl_xor_sync(kFullMask, total_loss, 2);
    const int64_t q = first_query + warp * 16 + group + 8 * h;
    if (q >= p.queries) continue;
    const int64_t slot = part * p.queries + q;
    if (member == 0) p.states[slot] = {mma::natural_maximum(rows.reference[h]), total, total_loss};
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      *reinterpret_cast<float2*>(p.weighted + slot * kColumns + 8 * i + 2 * member) =
          make_float2(sums[4 * i + 2 * h] * unshift, sums[4 * i + 2 * h + 1] * unshift);
    }
  }
}

// Block (query block x, part y).
template <typename T, int kColumns, bool kBinary>
__global__ void __launch_bounds__(kThreads, 1) kernel(const DenseProblem<T> p, const __grid_constant__ RowMap map) {
#if defined(SSLFAST_EMULATE_CUDA) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kRing = kStages<kColumns>;
  const Shared<kColumns> shared(dynamic_shared<unsigned char>());
  const int part = blockIdx.y;
  const int tile_begin = p.first_tile(part, kTile), tile_end = p.first_tile(part + 1, kTile);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kRing; ++s) {
      barrier_init(shared.full + s, 1);
      barrier_init(shared.empty + s, kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < kGroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    RingPosition<kRing> at;
    for (int t = tile_begin; t < tile_end; ++t, at.advance()) {
      const int slot = at.slot;
      // The first round finds the stages empty: parity 1 of a fresh barrier.
      barrier_wait(shared.empty + slot, at.parity ^ 1);
      barrier_arrive_expecting(shared.full + slot, kStageBytes<kColumns>);
      for (int panel = 0; panel < kPanels<kColumns>; ++panel) {
        load_box(shared.stages + slot * kStageBytes<kColumns> + panel * kTile * kRowBytes, &map, panel * 64, t * kTile,
                 shared.full + slot);
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    consume<T, kColumns, kBinary>(p, shared, tile_begin, tile_end);
  }
#endif
}

}  // namespace wgmma

// Whether this build and this GPU support the kernel for the problem.
template <typename T>
bool wgmma_takes(const DenseProblem<T>& p) {
#if defined(SSLFAST_EMULATE_CUDA) || defined(SSLFAST_SM90A)
  return compute_capability() == 90 && p.negatives == nullptr && (p.columns == 64 || p.columns == 128) &&
         p.bank_rows < (int64_t(1) << 31);
#else
  (void)p;
  return false;
#endif
}

template <typename T>
DenseShape wgmma_shape(const DenseProblem<T>&) {
  return {wgmma::kQueries, wgmma::kTile, 1};
}

template <typename T, int kColumns>
void launch_wgmma_columns(const DenseProblem<T>& p, dim3 grid, cudaStream_t stream) {
  const RowMap map = make_row_map(typename mma::Instruction<T>::type{}, p.bank, p.bank_rows, p.columns, wgmma::kTile);
  launch_kernel("bank_nce_dense", p.binary ? wgmma::kernel<T, kColumns, true> : wgmma::kernel<T, kColumns, false>, grid,
                dim3(wgmma::kThreads), wgmma::kSharedBytes<kColumns>, stream, p, map);
}

template <typename T>
void launch_wgmma(const DenseProblem<T>& p, dim3 grid, cudaStream_t stream) {
  if (p.columns == 64) {
    launch_wgmma_columns<T, 64>(p, grid, stream);
  } else {
    launch_wgmma_columns<T, 128>(p, grid, stream);
  }
}

}  // namespace sslfast
