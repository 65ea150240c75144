#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/waves.h"
#include "cuda/bank_nce_tile.cuh"

namespace sslfast {
namespace {

using namespace sampled;

// Block (sample b, split s): every warp scores tiles of kTileRows rows for kViews views, keeping query, running softmax
// state and weighted row sum in registers; the warps then merge through shared memory into one partial result.
// Reads each row once: K * D * sizeof(T) bytes per sample, the rows of the next tile while a tile is worked on.
// kShard: the rows that the shard holds are queued until they fill tiles.
template <typename T, int kChunks, int kViews, Loads kLoads, bool kShard>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && kLoads != Loads::kScalar && kChunks == 1 ? 4 : 1)
    score_kernel(const Problem<T> p, int64_t first_view) {
  using A = accumulate_t<T>;
  using L = Layout<T, kChunks, kLoads>;
  constexpr int kColumns = L::kColumns, kRowLanes = L::kRowLanes, kOwn = L::kOwn, kTileRows = L::kTileRows;
  constexpr int kValues = kOwn * kViews;
  constexpr int kLanesPerValue = kRowLanes / kValues;
  static_assert(kDraw % kTileRows == 0 && kOwn >= 1 && kValues <= kRowLanes && (kValues & (kValues - 1)) == 0);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int group = lane / kRowLanes, row_lane = lane % kRowLanes;
  const int64_t b = blockIdx.x;
  const int split = blockIdx.y;
  const int64_t self = p.index[b], num_rows = p.shard.num_rows;
  if (self < 0 || self >= num_rows) __trap();
  NegativeSampler sampler = p.sampler;
  if (p.step_tensor != nullptr) sampler.step = *p.step_tensor;
  const int64_t* given = p.negatives == nullptr ? nullptr : p.negatives + b * p.num_negatives;
  const A offset = static_cast<A>(p.offset());
  const uint32_t columns = static_cast<uint32_t>(p.columns);
  const uint32_t row_bytes = (kLoads == Loads::kFull ? 128u * kChunks : columns) * static_cast<uint32_t>(sizeof(T));

  A query[kViews][kColumns], sums[kViews][kColumns], maximum[kViews];
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    const A* source = p.query + ((first_view + v) * p.batch + b) * p.columns;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t d = L::kWidth * row_lane + 128 * (j / L::kWidth) + j % L::kWidth;
      query[v][j] = d < p.columns ? source[d] * static_cast<A>(p.inverse_temperature) : A(0);
      sums[v][j] = A(0);
    }
    maximum[v] = -kLargest<A>;
  }
  // A lane's own value: view my_view of row my_row of the tile (shared by kLanesPerValue lanes).
  const int my_value = row_lane / kLanesPerValue, my_view = my_value / kOwn;
  const int my_row = my_value % kOwn * L::kGroups + group;
  A my_sum = A(0), my_loss = A(0);
  __shared__ uint32_t queues[kShard ? kWarps : 1][kDraw + kTileRows];
  uint32_t* const queue = queues[kShard ? warp : 0];
  int waiting = 0;  // rows in the queue

  const int64_t draws = (p.num_negatives + kDraw - 1) / kDraw;
  int64_t draw = int64_t(split) * kWarps + warp;
  int count = 0;               // of rows that the last draw gave
  uint32_t low = 0, high = 0;  // those rows: negatives 0 .. 31 and 32 .. 63, or even and odd ones (kGroups == 1)
  // Draws until there are rows to score; count is 0 at the end.
  const auto take = [&]() {
    bool more = draw < draws;
    if constexpr (kShard) {
      waiting -= count;
      const uint32_t kept = lane < waiting ? queue[count + lane] : 0;
      __syncwarp();
      if (lane < waiting) queue[lane] = kept;
      __syncwarp();
    }
    count = 0;
    while (more && count == 0) {
      const int64_t base = draw * kDraw;
      int64_t first, second;  // negatives base + 2 * lane and base + 2 * lane + 1
      if (given == nullptr) {
        sampler.draw(static_cast<uint32_t>(base / 2 + lane), self, &first, &second);
      } else {
        const int64_t k = base + 2 * lane;
        first = k < p.num_negatives ? given[k] : self;
        second = k + 1 < p.num_negatives ? given[k + 1] : self;
        if (first < 0 || first >= num_rows || second < 0 || second >= num_rows) __trap();
      }
      draw += int64_t(p.splits) * kWarps;
      more = draw < draws;
      count = static_cast<int>(min(int64_t(kDraw), p.num_negatives - base));
      if constexpr (kShard) {
        waiting = collect(p.shard, first, second, 2 * lane < count, 2 * lane + 1 < count, lane, queue, waiting);
        count = more ? waiting / kTileRows * kTileRows : waiting;
      } else {
        // Rows past the end repeat the first: a weight of 0 would turn a NaN of any other row into a NaN of the sum.
        const uint32_t filler = __shfl_sync(kFullMask, static_cast<uint32_t>(first), 0);
        low = 2 * lane < count ? static_cast<uint32_t>(first) : filler;
        high = 2 * lane + 1 < count ? static_cast<uint32_t>(second) : filler;
        if constexpr (L::kGroups == 2) {
          // The first half of the warp holds the even ones, the second half the odd ones.
          const uint32_t other_low = __shfl_xor_sync(kFullMask, low, 16);
          const uint32_t other_high = __shfl_xor_sync(kFullMask, high, 16);
          low = lane < 16 ? low : other_high;
          high = lane < 16 ? other_low : high;
        }
      }
    }
  };
  RawRow<T, kChunks, kLoads> next[kOwn];
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int entry = tile + i * L::kGroups + group;
      uint32_t row;
      if constexpr (kShard) {
        row = queue[entry < count ? entry : tile];
      } else if constexpr (L::kGroups == 2) {
        row = __shfl_sync(kFullMask, tile < 32 ? low : high, tile / 2 % 16 + i, 16);
      } else {
        row = __shfl_sync(kFullMask, i % 2 == 0 ? low : high, (tile + i) / 2);
      }
      const char* source = reinterpret_cast<const char*>(p.bank) + size_t(row) * row_bytes;
      next[i].load(reinterpret_cast<const T*>(source), columns, row_lane);
    }
  };

  take();
  if (count > 0) fetch(0);
  for (int tile = 0; count > 0;) {
    A rows[kOwn][kColumns], values[kValues];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) next[i].unpack(rows[i]);
    const bool valid = tile + my_row < count;
    tile += kTileRows;
    if (tile >= count) {
      take();
      tile = 0;
    }
    if (count > 0) fetch(tile);
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        A dot = A(0);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) dot += query[v][j] * rows[i][j];
        values[v * kOwn + i] = dot;
      }
    }
    A score = transpose_sum<kValues, kRowLanes / 2>(values, lane);
    if (!valid) score = A(-INFINITY);

    A my_maximum = maximum[0];
#pragma unroll
    for (int v = 1; v < kViews; ++v) my_maximum = my_view == v ? maximum[v] : my_maximum;
    if (__any_sync(kFullMask, score > my_maximum + A(kLazyMargin))) {
      A highest = score;  // over the rows of my view
      const auto raise = [&](int flip) {
        const A other = __shfl_xor_sync(kFullMask, highest, flip);
        highest = other > highest ? other : highest;
      };
#pragma unroll
      for (int o = kLanesPerValue; o < kLanesPerValue * kOwn; o *= 2) raise(o);
      if constexpr (L::kGroups == 2) raise(kRowLanes);
      highest = highest > my_maximum ? min(highest, kLargest<A>) : my_maximum;
#pragma unroll
      for (int v = 0; v < kViews; ++v) {
        const A raised = __shfl_sync(kFullMask, highest, v * kOwn * kLanesPerValue);
        const A factor = raised > maximum[v] ? exponential(maximum[v] - raised) : A(1);
        maximum[v] = raised;
        if (my_view == v) my_sum *= factor, my_maximum = raised;
        if (!p.binary) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[v][j] *= factor;
        }
      }
    }
    A weight = valid ? exponential(score - my_maximum) : A(0);
    my_sum += weight;
    if (p.binary) {
      const NceTerm<A> term = nce_term(score - offset);
      my_loss += valid ? term.softplus : A(0);
      weight = valid ? term.sigmoid : A(0);
    }
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const A w = __shfl_sync(kFullMask, weight, (v * kOwn + i) * kLanesPerValue, kRowLanes);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[v][j] += w * rows[i][j];
      }
    }
  }

  // Merge the warps, one view at a time. A value was counted by each of its kLanesPerValue lanes.
  __shared__ A shared_sums[kWarps][128 * kChunks];
  __shared__ A shared_state[kWarps][3];
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    const A sum = warp_sum(my_view == v ? my_sum : A(0)) / A(kLanesPerValue);
    const A loss = warp_sum(my_view == v ? my_loss : A(0)) / A(kLanesPerValue);
    if (lane == 0) {
      shared_state[warp][0] = maximum[v];
      shared_state[warp][1] = sum;
      shared_state[warp][2] = loss;
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      A column = sums[v][j];
      if constexpr (L::kGroups == 2) column += __shfl_xor_sync(kFullMask, column, kRowLanes);
      const int d = L::kWidth * row_lane + 128 * (j / L::kWidth) + j % L::kWidth;
      if (group == 0) shared_sums[warp][d] = column;
    }
    __syncthreads();
    A highest = -kLargest<A>, total = A(0), total_loss = A(0);
    A factor[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) highest = shared_state[w][0] > highest ? shared_state[w][0] : highest;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp(shared_state[w][0] - highest);
      total += factor[w] * shared_state[w][1];
      total_loss += shared_state[w][2];
    }
    A* out = p.partial + (((first_view + v) * p.batch + b) * p.splits + split) * (p.columns + 3);
    for (int64_t d = threadIdx.x; d < p.columns; d += kThreads) {
      A column = A(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) column += (p.binary ? A(1) : factor[w]) * shared_sums[w][d];
      out[d] = column;
    }
    if (threadIdx.x == 0) {
      out[p.columns] = highest;
      out[p.columns + 1] = total;
      out[p.columns + 2] = total_loss;
    }
    __syncthreads();
  }
}

// One warp per query: adds the splits in order, then the positive, and writes loss, log-sum-exp and gradient.
template <typename T>
__global__ void finish_kernel(const Problem<T> p) {
  using A = accumulate_t<T>;
  const int64_t vb = blockIdx.x * int64_t(kWarps) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (vb >= p.views * p.batch) return;
  const A* query = p.query + vb * p.columns;
  const int64_t self = p.index[vb % p.batch];
  const bool has_positive = p.shard.holds(self);
  const T* positive = p.bank + (has_positive ? self - p.shard.first : 0) * p.columns;
  const A* partial = p.partial + vb * p.splits * (p.columns + 3);
  const A inverse_temperature = static_cast<A>(p.inverse_temperature);

  A score = A(0);
  for (int64_t d = lane; d < p.columns; d += kWarpSize) score += query[d] * static_cast<A>(positive[d]);
  score = warp_sum(score) * inverse_temperature;

  OnlineLogSumExp<A> state = OnlineLogSumExp<A>::empty();
  if (has_positive) {
    state.raise(score);
    state.sum = exp(score - state.maximum);
  }
  A loss = A(0);
  for (int s = 0; s < p.splits; ++s) {
    const A* part = partial + s * (p.columns + 3);
    const A maximum = part[p.columns];
    state.raise(maximum);
    state.sum += exp(maximum - state.maximum) * part[p.columns + 1];
    loss += part[p.columns + 2];
  }
  const A lse = state.value();  // -inf where the shard holds none of the rows
  A positive_weight = A(0);
  if (!has_positive) {
    if (!p.binary) loss = lse;
  } else if (p.binary) {
    const NceTerm<A> term = nce_term(static_cast<A>(p.offset()) - score);  // -log h(s_0) = softplus(-u_0)
    loss += term.softplus;
    positive_weight = -term.sigmoid;
  } else {
    loss = lse - score;
    positive_weight = exp(score - lse) - A(1);
  }
  if (lane == 0) {
    p.loss[vb] = loss;
    p.lse[vb] = lse;
  }
  for (int64_t d = lane; d < p.columns; d += kWarpSize) {
    A column = positive_weight * static_cast<A>(positive[d]);
    for (int s = 0; s < p.splits; ++s) {
      const A* part = partial + s * (p.columns + 3);
      const bool is_empty = part[p.columns + 1] == A(0);  // then lse may be -inf
      const A weight = p.binary ? A(1) : is_empty ? A(0) : exp(part[p.columns] - lse);
      column += weight * part[d];
    }
    p.grad[vb * p.columns + d] = column * inverse_temperature;
  }
}

template <typename T>
using Kernel = void (*)(Problem<T>, int64_t);

template <typename T, int kChunks, int kViews>
Kernel<T> pick_kernel(const Problem<T>& p, bool vector) {
  if (!p.shard.is_whole()) {
    return vector ? score_kernel<T, kChunks, kViews, Loads::kVector, true>
                  : score_kernel<T, kChunks, kViews, Loads::kScalar, true>;
  }
  if (!vector) return score_kernel<T, kChunks, kViews, Loads::kScalar, false>;
  return p.columns == 128 * kChunks ? score_kernel<T, kChunks, kViews, Loads::kFull, false>
                                    : score_kernel<T, kChunks, kViews, Loads::kVector, false>;
}

// One or two views (PIRL) take one pass, more views are processed in pairs. fp64, meant for verification, is processed
// one view at a time: two would not fit the registers.
template <typename T, int kChunks>
void launch_chunks(Problem<T> p, bool vector, const Tensor& query, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const Kernel<T> one = pick_kernel<T, kChunks, 1>(p, vector);
  Kernel<T> two = nullptr;
  if constexpr (!std::is_same_v<T, double>) two = pick_kernel<T, kChunks, 2>(p, vector);
  const int64_t at_once = two != nullptr && p.views >= 2 ? 2 : 1;

  const int64_t draws = (p.num_negatives + kDraw - 1) / kDraw, steps = (draws + kWarps - 1) / kWarps;
  const int64_t slots = int64_t(multiprocessors()) * blocks_per_multiprocessor(at_once == 2 ? two : one, kThreads, 0);
  p.splits = static_cast<int>(whole_wave_parts(p.batch, steps, slots, kFixedDraws, std::min<int64_t>(steps, 1024)));
  const std::vector<int64_t> partial_shape = {p.views, p.batch, int64_t(p.splits), p.columns + 3};
  Tensor partial = allocate("bank_nce", query, partial_shape);
  p.partial = static_cast<A*>(partial.mutable_data_ptr());

  const dim3 grid(static_cast<unsigned>(p.batch), static_cast<unsigned>(p.splits));
  for (int64_t view = 0; view < p.views;) {
    const bool pair = at_once == 2 && view + 2 <= p.views;
    launch_kernel("bank_nce", pair ? two : one, grid, dim3(kThreads), 0, stream, p, view);
    view += pair ? 2 : 1;
  }
  const unsigned blocks = static_cast<unsigned>((p.views * p.batch + kWarps - 1) / kWarps);
  launch_kernel("bank_nce", finish_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, p);
}

template <typename T>
void launch(Problem<T> p, const Tensor& query, const Tensor& bank, const Tensor& index,
            const std::optional<Tensor>& negatives, const Tensor& loss, const Tensor& lse, const Tensor& grad) {
  using A = accumulate_t<T>;
  p.query = static_cast<const A*>(query.const_data_ptr());
  p.bank = static_cast<const T*>(bank.const_data_ptr());
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.negatives = negatives ? static_cast<const int64_t*>(negatives->const_data_ptr()) : nullptr;
  p.views = query.size(0);
  p.batch = query.size(1);
  p.columns = query.size(2);
  p.loss = static_cast<A*>(loss.mutable_data_ptr());
  p.lse = static_cast<A*>(lse.mutable_data_ptr());
  p.grad = static_cast<A*>(grad.mutable_data_ptr());

  const cudaStream_t stream = current_stream(query.get_device_index());
  const bool vector = p.columns % 8 == 0 && reinterpret_cast<uintptr_t>(p.bank) % 16 == 0;
  if (p.columns <= 128) {
    launch_chunks<T, 1>(p, vector, query, stream);
  } else if (p.columns <= 256) {
    launch_chunks<T, 2>(p, vector, query, stream);
  } else {
    launch_chunks<T, 4>(p, vector, query, stream);
  }
}

std::tuple<Tensor, Tensor, Tensor> bank_nce_cuda(const Tensor& query_,  // [V, B, D]
                                                 const Tensor& bank_,   // [N, D]
                                                 const Tensor& index_,  // [B]
                                                 std::optional<Tensor> negatives_, std::optional<Tensor> step_tensor,
                                                 int64_t step, std::optional<Tensor> z_tensor, double z,
                                                 int64_t num_negatives, double temperature, bool binary,
                                                 bool exclude_self, int64_t seed, int64_t first_row, int64_t num_rows) {
  const Shard shard = make_shard(bank_, first_row, num_rows);
  check_bank_nce(query_, bank_, index_, negatives_, step_tensor, z_tensor, num_negatives, temperature, exclude_self,
                 seed, shard);
  check_z("bank_nce", binary, z_tensor, z);
  SSLFAST_CHECK(bank_.size(1) <= kMaxColumns, "bank_nce: bank has ", bank_.size(1), " columns, CUDA takes up to ",
                kMaxColumns);
  SSLFAST_CHECK(shard.num_rows <= (int64_t(1) << 32), "bank_nce: bank has ", shard.num_rows,
                " rows, CUDA takes up to 2**32");
  const DeviceGuard guard(query_.get_device_index());
  const Tensor query = readable("bank_nce", "query", query_), bank = readable("bank_nce", "bank", bank_);
  const Tensor index = readable("bank_nce", "index", index_);
  const std::optional<Tensor> negatives = readable("bank_nce", "negatives", negatives_);
  const int64_t views = query.size(0), batch = query.size(1);
  Tensor loss = allocate("bank_nce", query, {views, batch});
  Tensor lse = allocate("bank_nce", query, {views, batch});
  Tensor grad = allocate("bank_nce", query, {views, batch, query.size(2)});
  if (views == 0 || batch == 0) return {loss, lse, grad};

  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_nce", [&] {
    Problem<scalar_t> problem{};
    problem.step_tensor = step_tensor ? static_cast<const int64_t*>(step_tensor->const_data_ptr()) : nullptr;
    problem.z_tensor = z_tensor ? static_cast<const double*>(z_tensor->const_data_ptr()) : nullptr;
    problem.sampler = make_sampler(seed, step, shard.num_rows, exclude_self);
    problem.shard = shard;
    problem.num_negatives = num_negatives;
    problem.inverse_temperature = 1.0 / temperature;
    problem.z = z;
    problem.binary = binary;
    launch<scalar_t>(problem, query, bank, index, negatives, loss, lse, grad);
  });
  return {loss, lse, grad};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("bank_nce", TORCH_BOX(&sslfast::bank_nce_cuda));
}
