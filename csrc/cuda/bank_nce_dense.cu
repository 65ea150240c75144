#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bank_nce_dense.h"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "common/waves.h"
#include "cuda/dense_mma.cuh"
#include "cuda/dense_problem.cuh"
#include "cuda/dense_simt.cuh"
#include "cuda/dense_wgmma.cuh"

namespace sslfast {
namespace {

constexpr int kMaxColumns = 512;
constexpr int kFinishThreads = 128;
// What a block costs beside its tiles, in tiles: filling the ring, and writing its weighted sums.
constexpr int kFixedTiles = 3;

// One block per query: merges the parts, adds the positive, writes loss, log-sum-exp and gradient. A thread adds the
// parts of one column (of D / kFinishThreads columns), whose loads do not wait for each other.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const DenseProblem<T> p) {
  using A = accumulate_t<T>;
  __shared__ A factors[kFinishThreads];  // of the parts being added
  const int64_t q = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t self = p.index[q % p.batch];
  if (self < -1 || self >= p.bank_rows) __trap();
  const T* positive = p.bank + (self < 0 ? 0 : self) * p.columns;
  const A inverse_temperature = static_cast<A>(p.inverse_temperature);

  const auto score_of = [&](const T* row) {
    A sum = A(0);
    for (int64_t d = lane; d < p.columns; d += kWarpSize) {
      sum += p.rounded(p.query[q * p.columns + d]) * static_cast<A>(row[d]);
    }
    return warp_sum(sum) * inverse_temperature;
  };
  const A score = self >= 0 ? score_of(positive) : A(0);

  // Every warp merges the states for itself.
  OnlineLogSumExp<A> softmax = OnlineLogSumExp<A>::empty();
  A binary = A(0);
  for (int part = lane; part < p.parts; part += kWarpSize) {
    const StreamState<A> state = p.states[part * p.queries + q];
    softmax.raise(state.maximum);
    softmax.sum += exp(state.maximum - softmax.maximum) * state.sum;
    binary += state.binary;
  }
  A highest = softmax.maximum;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kFullMask, highest, offset);
    highest = other > highest ? other : highest;
  }
  softmax.raise(highest);
  softmax.sum = warp_sum(softmax.sum);
  binary = warp_sum(binary);
  if (p.binary && p.negatives == nullptr && score > kLargest<A>) {  // rare: see finish_dense
    binary = A(0);
    for (int64_t row = 0; row < p.bank_rows; ++row) {
      if (row != self) binary += nce_term(score_of(p.bank + row * p.columns) - p.offset()).softplus;
    }
  }
  const DenseResult<A> result = finish_dense<A>({softmax.maximum, softmax.sum, binary}, self >= 0, score,
                                                p.negatives == nullptr, p.binary, p.offset());
  if (threadIdx.x == 0) {
    p.loss[q] = result.loss;
    p.lse[q] = result.lse;
  }

  constexpr int kEach = kMaxColumns / kFinishThreads;
  A columns[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t d = threadIdx.x + j * kFinishThreads;
    columns[j] = self < 0 || d >= p.columns ? A(0) : result.positive_weight * static_cast<A>(positive[d]);
  }
  for (int first = 0; first < p.parts; first += kFinishThreads) {
    const int count = min(kFinishThreads, p.parts - first);
    __syncthreads();
    if (threadIdx.x < count) {
      const A maximum = p.states[(first + threadIdx.x) * p.queries + q].maximum;
      factors[threadIdx.x] = p.binary ? A(1) : exp(maximum - result.lse);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t d = threadIdx.x + j * kFinishThreads;
      if (d >= p.columns) break;
      const A* weighted = p.weighted + (first * p.queries + q) * p.columns + d;
#pragma unroll 8
      for (int i = 0; i < count; ++i) columns[j] += factors[i] * weighted[i * p.queries * p.columns];
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t d = threadIdx.x + j * kFinishThreads;
    if (d < p.columns) p.grad[q * p.columns + d] = columns[j] * inverse_temperature;
  }
}

template <typename T>
void launch(DenseProblem<T> p, const Tensor& query, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const bool aligned = p.columns % 8 == 0 && reinterpret_cast<uintptr_t>(p.bank) % 16 == 0;
  DenseKernel kernel = DenseKernel::kSimt;
  if constexpr (sizeof(T) == 2) {
    if (aligned && p.columns <= 256) kernel = DenseKernel::kMma;
    if (kernel == DenseKernel::kMma && wgmma_takes(p)) kernel = DenseKernel::kWgmma;
  }
  p.rounds = kernel != DenseKernel::kSimt;
  const DenseShape shape = kernel == DenseKernel::kSimt  ? simt_shape(p)
                           : kernel == DenseKernel::kMma ? mma_shape(p)
                                                         : wgmma_shape(p);
  const int64_t blocks = (p.queries + shape.queries - 1) / shape.queries;
  const int64_t tiles = (p.num_rows + shape.tile_rows - 1) / shape.tile_rows;
  const int64_t slots = int64_t(shape.blocks_per_multiprocessor) * multiprocessors();
  p.parts = static_cast<int>(whole_wave_parts(blocks, tiles, slots, kFixedTiles, std::max<int64_t>(1, tiles / 4)));

  const std::vector<int64_t> states_shape = {int64_t(p.parts), p.queries, 3};
  const std::vector<int64_t> weighted_shape = {int64_t(p.parts), p.queries, p.columns};
  Tensor states = allocate("bank_nce_dense", query, states_shape);
  Tensor weighted = allocate("bank_nce_dense", query, weighted_shape);
  p.states = static_cast<StreamState<A>*>(states.mutable_data_ptr());
  p.weighted = static_cast<A*>(weighted.mutable_data_ptr());

  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.parts));
  if (kernel == DenseKernel::kSimt) {
    launch_simt(p, grid, stream);
  } else if constexpr (sizeof(T) == 2) {
    if (kernel == DenseKernel::kMma) {
      launch_mma(p, grid, stream);
    } else {
      launch_wgmma(p, grid, stream);
    }
  }
  launch_kernel("bank_nce_dense", finish_kernel<T>, dim3(static_cast<unsigned>(p.queries)), dim3(kFinishThreads), 0,
                stream, p);
}

std::tuple<Tensor, Tensor, Tensor> bank_nce_dense_cuda(const Tensor& query_,  // [V, B, D]
                                                       const Tensor& bank_,   // [N, D]
                                                       const Tensor& index_,  // [B]
                                                       std::optional<Tensor> negatives_, std::optional<Tensor> z_tensor,
                                                       double z, double temperature, bool binary, bool exclude_self) {
  check_bank_nce_dense(query_, bank_, index_, negatives_, z_tensor, temperature, binary, exclude_self);
  check_z("bank_nce_dense", binary, z_tensor, z);
  SSLFAST_CHECK(bank_.size(1) <= kMaxColumns, "bank_nce_dense: bank has ", bank_.size(1), " columns, CUDA takes up to ",
                kMaxColumns);
  const DeviceGuard guard(query_.get_device_index());
  const Tensor query = readable("bank_nce_dense", "query", query_), bank = readable("bank_nce_dense", "bank", bank_);
  const Tensor index = readable("bank_nce_dense", "index", index_);
  const std::optional<Tensor> negatives = readable("bank_nce_dense", "negatives", negatives_);
  const int64_t views = query.size(0), batch = query.size(1);
  Tensor loss = allocate("bank_nce_dense", query, {views, batch});
  Tensor lse = allocate("bank_nce_dense", query, {views, batch});
  Tensor grad = allocate("bank_nce_dense", query, {views, batch, query.size(2)});
  if (views * batch == 0) return {loss, lse, grad};

  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_nce_dense", [&] {
    using A = accumulate_t<scalar_t>;
    DenseProblem<scalar_t> p{};
    p.query = static_cast<const A*>(query.const_data_ptr());
    p.bank = static_cast<const scalar_t*>(bank.const_data_ptr());
    p.index = static_cast<const int64_t*>(index.const_data_ptr());
    p.negatives = negatives ? static_cast<const int64_t*>(negatives->const_data_ptr()) : nullptr;
    p.z_tensor = z_tensor ? static_cast<const double*>(z_tensor->const_data_ptr()) : nullptr;
    p.queries = views * batch;
    p.batch = batch;
    p.columns = query.size(2);
    p.bank_rows = bank.size(0);
    p.num_rows = negatives ? negatives->size(0) : p.bank_rows;
    p.num_negatives = negatives ? p.num_rows : p.bank_rows - 1;
    p.inverse_temperature = 1.0 / temperature;
    p.z = z;
    p.binary = binary;
    p.exclude_self = exclude_self;
    p.loss = static_cast<A*>(loss.mutable_data_ptr());
    p.lse = static_cast<A*>(lse.mutable_data_ptr());
    p.grad = static_cast<A*>(grad.mutable_data_ptr());
    launch<scalar_t>(p, query, current_stream(query.get_device_index()));
  });
  return {loss, lse, grad};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("bank_nce_dense", TORCH_BOX(&sslfast::bank_nce_dense_cuda));
}
