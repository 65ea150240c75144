#include "bank_nce.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "cpu/draw_rows.h"
#include "cpu/fast_math.h"

namespace sslfast {
namespace {

// Rows scored together: they stay in L1 between the scoring and the gradient pass, while the next ones are
// prefetched. 16 rows of 128 fp32 columns are 8 KiB; best of 8, 16, 32 (bench_bank_nce).
constexpr int64_t kRows = 16;
// Columns are padded to whole 64-byte vectors.
constexpr int64_t kPad = 16;

template <typename T>
struct Problem {
  using A = accumulate_t<T>;
  const A* query;            // [V, B, D]
  const T* bank;             // [N, D]
  const int64_t* index;      // [B]
  const int64_t* negatives;  // [B, K] or null: drawn
  NegativeSampler sampler;
  Shard shard;
  int64_t views, batch, columns, num_negatives;
  double temperature;
  bool binary;
  double offset;       // log(Z K / N)
  A* loss;             // [V, B]
  A* lse;              // [V, B]
  A* grad;             // [V, B, D]
  int64_t begin, end;  // samples of this call
};

// scores[r] = q . row_r for kRows rows, four at a time so that a chunk of q is loaded once for all four.
template <typename A>
SSLFAST_INLINE void dot_rows(const A* __restrict__ query, const A* const* rows, int64_t columns, A* scores) {
  for (int64_t r = 0; r < kRows; r += 4) {
    const A* __restrict__ a = rows[r], * __restrict__ b = rows[r + 1];
    const A* __restrict__ c = rows[r + 2], * __restrict__ d = rows[r + 3];
    A sa = 0, sb = 0, sc = 0, sd = 0;
#pragma omp simd reduction(+ : sa, sb, sc, sd)
    for (int64_t j = 0; j < columns; ++j) {
      const A q = query[j];
      sa += q * a[j];
      sb += q * b[j];
      sc += q * c[j];
      sd += q * d[j];
    }
    scores[r] = sa;
    scores[r + 1] = sb;
    scores[r + 2] = sc;
    scores[r + 3] = sd;
  }
}

// sum += weights . rows, eight rows at a time so that a chunk of sum is loaded and stored once for all eight.
template <typename A>
SSLFAST_INLINE void add_weighted_rows(A* __restrict__ sum, const A* const* rows, const A* weights, int64_t columns) {
  for (int64_t r = 0; r < kRows; r += 8) {
    const A* __restrict__ p0 = rows[r], * __restrict__ p1 = rows[r + 1], * __restrict__ p2 = rows[r + 2];
    const A* __restrict__ p3 = rows[r + 3], * __restrict__ p4 = rows[r + 4], * __restrict__ p5 = rows[r + 5];
    const A* __restrict__ p6 = rows[r + 6], * __restrict__ p7 = rows[r + 7];
    const A w0 = weights[r], w1 = weights[r + 1], w2 = weights[r + 2], w3 = weights[r + 3];
    const A w4 = weights[r + 4], w5 = weights[r + 5], w6 = weights[r + 6], w7 = weights[r + 7];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const A low = w0 * p0[j] + w1 * p1[j] + w2 * p2[j] + w3 * p3[j];
      const A high = w4 * p4[j] + w5 * p5[j] + w6 * p6[j] + w7 * p7[j];
      sum[j] += low + high;
    }
  }
}

// Reads the `padded` columns of a bank row as A: in place, or converted into `buffer`.
template <typename T>
struct RowReader {
  using A = accumulate_t<T>;
  const T* bank;
  int64_t columns, padded;
  bool direct;  // stored as A and a whole number of vectors

  SSLFAST_INLINE const A* read(int64_t row, A* __restrict__ buffer /* [padded], zero behind columns */) const {
    const T* __restrict__ source = bank + row * columns;
    if constexpr (std::is_same_v<T, A>) {
      if (direct) return source;
    }
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) buffer[j] = static_cast<A>(source[j]);
    return buffer;
  }

  SSLFAST_INLINE void prefetch(int64_t row) const {
    const char* first = reinterpret_cast<const char*>(bank + row * columns);
    for (int64_t byte = 0; byte < columns * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(first + byte);
  }
};

// The negatives of sample b that the shard holds, as rows of the shard.
template <typename T>
SSLFAST_INLINE void rows_of_shard(const Problem<T>& p, int64_t b, std::vector<int64_t>& out) {
  out.resize(p.num_negatives);
  if (p.negatives != nullptr) {
    std::copy_n(p.negatives + b * p.num_negatives, p.num_negatives, out.data());
  } else {
    draw_rows<int64_t>({p.sampler, p.index[b], 0, p.num_negatives, out.data()});
  }
  int64_t count = 0;
  for (const int64_t row : out) {
    if (p.shard.holds(row)) out[count++] = row - p.shard.first;
  }
  out.resize(count);
}

// One sample at a time: all its views against the same rows, kRows rows at a time, with the next rows already
// drawn and being prefetched. Extra memory per thread: (V + kRows) * padded columns.
template <typename T>
SSLFAST_INLINE void score_samples(const Problem<T>& p) {
  using A = accumulate_t<T>;
  const int64_t padded = (p.columns + kPad - 1) / kPad * kPad;
  const RowReader<T> reader{p.bank, p.columns, padded, p.columns == padded};
  std::vector<A> scratch((2 * p.views + kRows) * padded, A(0));
  A* queries = scratch.data();           // [V, padded], q / tau
  A* sums = queries + p.views * padded;  // [V, padded], weighted rows
  A* buffer = sums + p.views * padded;   // [kRows, padded]
  std::vector<OnlineLogSumExp<A>> states(p.views);
  std::vector<double> binary_losses(p.views);
  const A inverse_temperature = static_cast<A>(1.0 / p.temperature);
  const A offset = static_cast<A>(p.offset);
  int64_t drawn[2][kRows];
  std::vector<int64_t> of_shard;

  for (int64_t b = p.begin; b < p.end; ++b) {
    const int64_t self = p.index[b];
    const int64_t* given = p.negatives == nullptr ? nullptr : p.negatives + b * p.num_negatives;
    int64_t num_negatives = p.num_negatives;
    if (!p.shard.is_whole()) {
      rows_of_shard(p, b, of_shard);
      given = of_shard.data();
      num_negatives = static_cast<int64_t>(of_shard.size());
    }
    const bool has_positive = p.shard.holds(self);
    const int64_t own = has_positive ? self - p.shard.first : 0;
    for (int64_t v = 0; v < p.views; ++v) {
      const A* source = p.query + (v * p.batch + b) * p.columns;
      for (int64_t j = 0; j < p.columns; ++j) queries[v * padded + j] = source[j] * inverse_temperature;
      states[v] = OnlineLogSumExp<A>::empty();
      binary_losses[v] = 0;
    }
    std::fill(sums, sums + p.views * padded, A(0));

    // Fills `target` with the rows of block `first` and prefetches them. Short blocks repeat their first row: a weight
    // of 0 would turn a NaN of any other row into a NaN of the sum.
    const auto prepare = [&](int64_t first, int64_t* target) __attribute__((always_inline)) {
      if (given != nullptr) {
        for (int64_t r = 0; r < kRows; ++r) target[r] = given[first + r < num_negatives ? first + r : first];
      } else {
        draw_rows<int64_t>({p.sampler, self, first, kRows, target});
        for (int64_t r = num_negatives - first; r < kRows; ++r) target[r] = target[0];
      }
      for (int64_t r = 0; r < kRows; ++r) reader.prefetch(target[r]);
    };

    if (num_negatives > 0) prepare(0, drawn[0]);
    int64_t slot = 0;
    for (int64_t first = 0; first < num_negatives; first += kRows, slot ^= 1) {
      if (first + kRows < num_negatives) prepare(first + kRows, drawn[slot ^ 1]);
      const int64_t valid = std::min(kRows, num_negatives - first);
      const A* rows[kRows];
      for (int64_t r = 0; r < kRows; ++r) rows[r] = reader.read(drawn[slot][r], buffer + r * padded);
      for (int64_t v = 0; v < p.views; ++v) {
        alignas(64) A scores[kRows];
        alignas(64) A weights[kRows];
        dot_rows<A>(queries + v * padded, rows, padded, scores);
        for (int64_t r = valid; r < kRows; ++r) scores[r] = A(-INFINITY);
        A* sum = sums + v * padded;

        A highest = scores[0];
        for (int64_t r = 1; r < kRows; ++r) highest = scores[r] > highest ? scores[r] : highest;
        const A factor = states[v].raise(highest);
        A total = 0;
        const A maximum = states[v].maximum;
#pragma omp simd reduction(+ : total)
        for (int64_t r = 0; r < kRows; ++r) {
          weights[r] = r < valid ? fast_exp(scores[r] - maximum) : A(0);
          total += weights[r];
        }
        states[v].sum += total;
        if (p.binary) {
          A loss = 0;
#pragma omp simd reduction(+ : loss)
          for (int64_t r = 0; r < kRows; ++r) {
            const NceTerm<A> term = nce_term<A>(r < valid ? scores[r] - offset : A(0));
            weights[r] = r < valid ? term.sigmoid : A(0);
            loss += r < valid ? term.softplus : A(0);
          }
          binary_losses[v] += static_cast<double>(loss);
        } else if (factor != A(1)) {
          for (int64_t j = 0; j < padded; ++j) sum[j] *= factor;
        }
        add_weighted_rows<A>(sum, rows, weights, padded);
      }
    }

    const A* positive = reader.read(own, buffer);
    for (int64_t v = 0; v < p.views; ++v) {
      A* sum = sums + v * padded;
      A score = 0;
      for (int64_t j = 0; j < p.columns; ++j) score += queries[v * padded + j] * positive[j];
      const A factor = has_positive ? states[v].raise(score) : A(1);
      const A weight = has_positive ? std::exp(score - states[v].maximum) : A(0);
      states[v].sum += weight;
      const A lse = states[v].value();  // -inf where the shard holds none of the rows
      A scale, positive_weight;         // grad = scale * sum + positive_weight * m_0
      A loss;
      if (p.binary) {
        const NceTerm<A> term = nce_term<A>(offset - score);  // -log h(s_0) = softplus(-u_0)
        loss = static_cast<A>(binary_losses[v] + (has_positive ? static_cast<double>(term.softplus) : 0.0));
        scale = inverse_temperature;
        positive_weight = -term.sigmoid * inverse_temperature;
      } else {
        loss = has_positive ? lse - score : lse;
        scale = states[v].sum > A(0) ? factor / states[v].sum * inverse_temperature : A(0);
        positive_weight = (weight / states[v].sum - A(1)) * inverse_temperature;
      }
      if (!has_positive) positive_weight = A(0);
      p.loss[v * p.batch + b] = loss;
      p.lse[v * p.batch + b] = lse;
      A* grad = p.grad + (v * p.batch + b) * p.columns;
      for (int64_t j = 0; j < p.columns; ++j) grad[j] = scale * sum[j] + positive_weight * positive[j];
    }
  }
}

SSLFAST_MULTIVERSION(score_samples_best, score_samples, const Problem<T>&)

std::tuple<Tensor, Tensor, Tensor> bank_nce_cpu(const Tensor& query_,  // [V, B, D]
                                                const Tensor& bank_,   // [N, D]
                                                const Tensor& index_,  // [B]
                                                std::optional<Tensor> negatives_, std::optional<Tensor> step_tensor,
                                                int64_t step, std::optional<Tensor> z_tensor, double z,
                                                int64_t num_negatives, double temperature, bool binary,
                                                bool exclude_self, int64_t seed, int64_t first_row, int64_t num_rows) {
  const Shard shard = make_shard(bank_, first_row, num_rows);
  check_bank_nce(query_, bank_, index_, negatives_, step_tensor, z_tensor, num_negatives, temperature, exclude_self,
                 seed, shard);
  const Tensor query = readable("bank_nce", "query", query_), bank = readable("bank_nce", "bank", bank_);
  const Tensor index = readable("bank_nce", "index", index_);
  check_rows_in_range("bank_nce", "index", index, shard.num_rows);
  const std::optional<Tensor> negatives = readable("bank_nce", "negatives", negatives_);
  if (negatives) check_rows_in_range("bank_nce", "negatives", *negatives, shard.num_rows);
  const int64_t views = query.size(0), batch = query.size(1), columns = query.size(2);
  Tensor loss = allocate("bank_nce", query, {views, batch});
  Tensor lse = allocate("bank_nce", query, {views, batch});
  Tensor grad = allocate("bank_nce", query, {views, batch, columns});
  if (views == 0 || batch == 0) return {loss, lse, grad};
  const double z_value = host_z("bank_nce", binary, z_tensor, z);

  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_nce", [&] {
    using A = accumulate_t<scalar_t>;
    Problem<scalar_t> problem{
        static_cast<const A*>(query.const_data_ptr()),
        static_cast<const scalar_t*>(bank.const_data_ptr()),
        static_cast<const int64_t*>(index.const_data_ptr()),
        negatives ? static_cast<const int64_t*>(negatives->const_data_ptr()) : nullptr,
        make_sampler(seed, host_step(step_tensor, step), shard.num_rows, exclude_self),
        shard,
        views,
        batch,
        columns,
        num_negatives,
        temperature,
        binary,
        binary ? nce_offset(z_value, num_negatives, shard.num_rows) : 0.0,
        static_cast<A*>(loss.mutable_data_ptr()),
        static_cast<A*>(lse.mutable_data_ptr()),
        static_cast<A*>(grad.mutable_data_ptr()),
        0,
        0,
    };
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Problem<scalar_t> part = problem;
      part.begin = begin;
      part.end = end;
      score_samples_best<scalar_t>(part);
    });
  });
  return {loss, lse, grad};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("bank_nce", TORCH_BOX(&sslfast::bank_nce_cpu));
}
