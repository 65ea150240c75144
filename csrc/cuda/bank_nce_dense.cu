#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bank_nce_dense.h"
#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/dense_mma.cuh"
#include "cuda/dense_problem.cuh"
#include "cuda/dense_simt.cuh"
#include "cuda/dense_wgmma.cuh"

namespace sslfast {
namespace {

constexpr int kMaxColumns = 512;
constexpr int kFinishWarps = 4;

// One warp per query: merges the parts in order, adds the positive, writes loss, log-sum-exp and gradient.
template <typename T>
__global__ void __launch_bounds__(kFinishWarps* kWarpSize) finish_kernel(const DenseProblem<T> p) {
  using A = accumulate_t<T>;
  const int64_t q = blockIdx.x * int64_t(kFinishWarps) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (q >= p.queries) return;
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

  OnlineLogSumExp<A> softmax = OnlineLogSumExp<A>::empty();
  A binary = A(0);
  for (int part = 0; part < p.parts; ++part) {
    const StreamState<A> state = p.states[part * p.queries + q];
    softmax.raise(state.maximum);
    softmax.sum += exp(state.maximum - softmax.maximum) * state.sum;
    binary += state.binary;
  }
  if (p.binary && p.negatives == nullptr && score > kLargest<A>) {  // rare: see finish_dense
    binary = A(0);
    for (int64_t row = 0; row < p.bank_rows; ++row) {
      if (row != self) binary += nce_term(score_of(p.bank + row * p.columns) - p.offset()).softplus;
    }
  }
  const DenseResult<A> result = finish_dense<A>({softmax.maximum, softmax.sum, binary}, self >= 0, score,
                                                p.negatives == nullptr, p.binary, p.offset());
  if (lane == 0) {
    p.loss[q] = result.loss;
    p.lse[q] = result.lse;
  }
  for (int64_t d = lane; d < p.columns; d += kWarpSize) {
    A column = self < 0 ? A(0) : result.positive_weight * static_cast<A>(positive[d]);
    for (int part = 0; part < p.parts; ++part) {
      const int64_t slot = part * p.queries + q;
      const StreamState<A> state = p.states[slot];
      const A weight = p.binary ? A(1) : exp(state.maximum - result.lse);
      column += weight * p.weighted[slot * p.columns + d];
    }
    p.grad[q * p.columns + d] = column * inverse_temperature;
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
  // Enough parts to fill every multiprocessor with blocks, each with several tiles to stream.
  const int64_t blocks = (p.queries + shape.queries - 1) / shape.queries;
  const int64_t tiles = (p.num_rows + shape.tile_rows - 1) / shape.tile_rows;
  const int64_t wanted = (int64_t(shape.blocks_per_multiprocessor) * multiprocessors() + blocks - 1) / blocks;
  p.parts = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, tiles / 4)));

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
  launch_kernel("bank_nce_dense", finish_kernel<T>,
                dim3(static_cast<unsigned>((p.queries + kFinishWarps - 1) / kFinishWarps)),
                dim3(kFinishWarps * kWarpSize), 0, stream, p);
}

std::tuple<Tensor, Tensor, Tensor> bank_nce_dense_cuda(const Tensor& query_,  // [V, B, D]
                                                       const Tensor& bank_,   // [N, D]
                                                       const Tensor& index_,  // [B]
                                                       std::optional<Tensor> negatives_, std::optional<Tensor> z_tensor,
                                                       double z, double temperature, bool binary, bool exclude_self) {
  check_bank_nce_dense(query_, bank_, index_, negatives_, z_tensor, temperature, binary, exclude_self);
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
