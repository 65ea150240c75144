#include "bank_update_.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace sslfast {
namespace {

// Positions of the batch that write: of a repeated index the last one, of -1 none.
std::vector<int64_t> last_occurrences(const int64_t* index, int64_t batch) {
  std::vector<int64_t> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return index[a] != index[b] ? index[a] < index[b] : a < b; });
  std::vector<int64_t> winners;
  winners.reserve(batch);
  for (int64_t i = 0; i < batch; ++i) {
    if (index[order[i]] == -1) continue;
    if (i + 1 == batch || index[order[i]] != index[order[i + 1]]) winners.push_back(order[i]);
  }
  return winners;
}

template <typename T, typename F>
void update_rows(T* bank,               // [N, D]
                 const int64_t* index,  // [B]
                 const F* features,     // [B, D]
                 int64_t batch, int64_t columns, double momentum_) {
  using A = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<F, double>, double, float>;
  const A momentum = static_cast<A>(momentum_);
  const std::vector<int64_t> winners = last_occurrences(index, batch);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, static_cast<int64_t>(winners.size()), grain, [&](int64_t begin, int64_t end) {
    std::vector<A> blended(columns);
    A* __restrict__ buffer = blended.data();
    for (int64_t w = begin; w < end; ++w) {
      T* __restrict__ row = bank + index[winners[w]] * columns;
      const F* __restrict__ feature = features + winners[w] * columns;
      A squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t d = 0; d < columns; ++d) {
        buffer[d] = blend<A>(static_cast<A>(row[d]), static_cast<A>(feature[d]), momentum);
        squares += buffer[d] * buffer[d];
      }
      const A norm = std::sqrt(squares);
      const A scale = A(1) / (norm < static_cast<A>(kNormFloor) ? static_cast<A>(kNormFloor) : norm);  // NaN stays NaN
#pragma omp simd
      for (int64_t d = 0; d < columns; ++d) row[d] = static_cast<T>(buffer[d] * scale);
    }
  });
}

void bank_update_cpu(const Tensor& bank, const Tensor& index_, const Tensor& features_, double momentum) {
  check_bank_update(bank, index_, features_, momentum);
  const Tensor index = readable("bank_update_", "index", index_);
  const Tensor features = readable("bank_update_", "features", features_);
  check_rows_in_range("bank_update_", "index", index, bank.size(0), /*lowest=*/-1);
  const int64_t* rows = static_cast<const int64_t*>(index.const_data_ptr());
  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_update_", [&] {
    using bank_t = scalar_t;
    SSLFAST_DISPATCH_FLOAT(features.scalar_type(), "bank_update_", [&] {
      update_rows(static_cast<bank_t*>(bank.mutable_data_ptr()), rows,
                  static_cast<const scalar_t*>(features.const_data_ptr()), index.size(0), bank.size(1), momentum);
    });
  });
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("bank_update_", TORCH_BOX(&sslfast::bank_update_cpu));
}
