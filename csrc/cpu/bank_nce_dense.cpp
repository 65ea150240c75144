#include "bank_nce_dense.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <new>
#include <tuple>

#include "common/simd.h"
#include "cpu/fast_math.h"

namespace sslfast {
namespace {

// A tile of bank rows, copied once as stored and once transposed, stays in the cache for a block of queries.
constexpr int64_t kTile = 64;
constexpr int64_t kBlock = 192;  // queries; copying a tile costs as much as ten of them
// Queries whose sums are in registers together: 6 x 4 vectors of 32 registers, 6 x 2 of 16.
constexpr int64_t kGroup = 6;
static_assert(kBlock % kGroup == 0);

template <int kBytes>
constexpr int kVectors = kBytes == 64 ? 4 : 2;

// The bank is split into parts, so that few queries also use many cores. The split does not depend on the number of
// threads, and neither does the result.
constexpr int64_t kTasks = 32, kPartRows = 4096;

template <typename T>
struct Problem {
  using A = accumulate_t<T>;
  const A* query;            // [Q, D], Q = V * B
  const T* bank;             // [N, D]
  const int64_t* index;      // [B]
  const int64_t* negatives;  // [K] or null: the whole bank
  int64_t queries, batch, columns, num_rows /* N or K */, parts;
  A inverse_temperature, offset;
  bool binary, exclude_self;
  StreamState<A>* states;  // [parts, Q]
  A* weighted;             // [parts, Q, D]
  int64_t begin, end;      // tasks of this call: query block * parts + part
};

template <typename A>
struct AlignedDelete {
  void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename A>
using Buffer = std::unique_ptr<A[], AlignedDelete<A>>;

template <typename A>
Buffer<A> zeros(int64_t count) {
  A* p = static_cast<A*>(::operator new[](count * sizeof(A), std::align_val_t(64)));
  std::fill(p, p + count, A(0));
  return Buffer<A>(p);
}

// out[g][r] (+)= sum_k a[g * stride + k] * b[k * width + r] for kGroup rows g and kVectors vectors of columns r.
template <typename A, int kBytes, bool kAdd>
SSLFAST_INLINE void multiply_group(const A* __restrict__ a, int64_t stride, int64_t depth, const A* __restrict__ b,
                                   int64_t width, A* __restrict__ out, int64_t out_stride) {
  typedef A Vector __attribute__((vector_size(kBytes)));
  constexpr int64_t kLanes = kBytes / sizeof(A);
  Vector sums[kGroup][kVectors<kBytes>];
  for (int64_t g = 0; g < kGroup; ++g) {
    for (int v = 0; v < kVectors<kBytes>; ++v) {
      Vector* source = reinterpret_cast<Vector*>(out + g * out_stride + v * kLanes);
      sums[g][v] = kAdd ? *source : Vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vector* row = reinterpret_cast<const Vector*>(b + k * width);
    Vector chunk[kVectors<kBytes>];
    for (int v = 0; v < kVectors<kBytes>; ++v) chunk[v] = row[v];
    for (int64_t g = 0; g < kGroup; ++g) {
      const A factor = a[g * stride + k];
      for (int v = 0; v < kVectors<kBytes>; ++v) sums[g][v] += factor * chunk[v];
    }
  }
  for (int64_t g = 0; g < kGroup; ++g) {
    for (int v = 0; v < kVectors<kBytes>; ++v) {
      *reinterpret_cast<Vector*>(out + g * out_stride + v * kLanes) = sums[g][v];
    }
  }
}

// Turns the scores of one query against a tile into weights; returns the factor that rescales earlier sums.
template <typename A>
SSLFAST_INLINE A weigh(A* __restrict__ scores, int64_t valid, bool binary, A offset, StreamState<A>& state) {
  A highest = A(-INFINITY);  // of the numbers: a NaN stays in its score
  for (int64_t r = 0; r < kTile; ++r) {
    scores[r] = r < valid ? scores[r] : A(-INFINITY);
    highest = scores[r] > highest ? scores[r] : highest;
  }
  OnlineLogSumExp<A> softmax{state.maximum, state.sum};
  const A factor = softmax.raise(highest);
  const A maximum = softmax.maximum;
  A total = 0, loss = 0;
  if (binary) {
#pragma omp simd reduction(+ : total, loss)
    for (int64_t r = 0; r < kTile; ++r) {
      const bool counts = !(scores[r] < -kLargest<A>);
      const NceTerm<A> term = nce_term<A>((counts ? scores[r] : maximum) - offset);
      total += fast_exp(scores[r] - maximum);
      loss += counts ? term.softplus : A(0);
      scores[r] = counts ? term.sigmoid : A(0);
    }
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t r = 0; r < kTile; ++r) {
      scores[r] = fast_exp(scores[r] - maximum);  // 0 for an excluded row
      total += scores[r];
    }
  }
  state = {maximum, softmax.sum + total, state.binary + loss};
  return binary ? A(1) : factor;
}

template <typename T, int kBytes>
SSLFAST_INLINE void stream_rows(const Problem<T>& p) {
  using A = accumulate_t<T>;
  constexpr int64_t kLanes = kBytes / sizeof(A), kWidth = kVectors<kBytes> * kLanes;
  static_assert(kTile % kWidth == 0);
  const int64_t columns = p.columns, padded = (columns + kWidth - 1) / kWidth * kWidth;
  const Buffer<A> tile = zeros<A>(kTile * padded), transposed = zeros<A>(columns * kTile);
  const Buffer<A> queries = zeros<A>(kBlock * padded), sums = zeros<A>(kBlock * padded);
  const Buffer<A> scores = zeros<A>(kGroup * kTile);
  StreamState<A> states[kBlock];
  int64_t selves[kBlock];

  for (int64_t task = p.begin; task < p.end; ++task) {
    const int64_t first_query = task / p.parts * kBlock, part = task % p.parts;
    const int64_t count = std::min(kBlock, p.queries - first_query);
    const int64_t groups = (count + kGroup - 1) / kGroup;
    std::fill(queries.get(), queries.get() + kBlock * padded, A(0));
    std::fill(sums.get(), sums.get() + kBlock * padded, A(0));
    for (int64_t q = 0; q < kBlock; ++q) {
      states[q] = StreamState<A>::empty();
      selves[q] = q < count && p.exclude_self ? p.index[(first_query + q) % p.batch] : -1;
      for (int64_t d = 0; q < count && d < columns; ++d) {
        queries[q * padded + d] = p.query[(first_query + q) * columns + d] * p.inverse_temperature;
      }
    }

    // Whole tiles, so that parts differ by at most one.
    const int64_t tiles = (p.num_rows + kTile - 1) / kTile;
    for (int64_t t = tiles * part / p.parts; t < tiles * (part + 1) / p.parts; ++t) {
      const int64_t first = t * kTile, valid = std::min(kTile, p.num_rows - first);
      const int64_t* listed = p.negatives == nullptr ? nullptr : p.negatives + first;
      for (int64_t r = 0; r < valid; ++r) {
        const T* __restrict__ source = p.bank + (listed != nullptr ? listed[r] : first + r) * columns;
        A* __restrict__ target = tile.get() + r * padded;
#pragma omp simd
        for (int64_t d = 0; d < columns; ++d) target[d] = static_cast<A>(source[d]);
      }
      for (int64_t r = 0; listed != nullptr && first + kTile + r < p.num_rows && r < kTile; ++r) {
        const char* next = reinterpret_cast<const char*>(p.bank + listed[kTile + r] * columns);
        for (int64_t byte = 0; byte < columns * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
      }
      for (int64_t r = 0; r < kTile; r += kLanes) {
        for (int64_t d = 0; d < columns; ++d) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            transposed[d * kTile + r + lane] = tile[(r + lane) * padded + d];
          }
        }
      }

      for (int64_t group = 0; group < groups; ++group) {
        const int64_t q = group * kGroup;
        for (int64_t r = 0; r < kTile; r += kWidth) {
          multiply_group<A, kBytes, false>(queries.get() + q * padded, padded, columns, transposed.get() + r, kTile,
                                           scores.get() + r, kTile);
        }
        for (int64_t g = 0; g < kGroup; ++g) {
          A* row = scores.get() + g * kTile;
          if (listed != nullptr && p.exclude_self) {
            for (int64_t r = 0; r < valid; ++r) row[r] = listed[r] == selves[q + g] ? A(-INFINITY) : row[r];
          }
          const A factor = weigh<A>(row, valid, p.binary, p.offset, states[q + g]);
          if (factor != A(1)) {
            A* sum = sums.get() + (q + g) * padded;
            for (int64_t d = 0; d < padded; ++d) sum[d] *= factor;
          }
        }
        for (int64_t d = 0; d < padded; d += kWidth) {
          multiply_group<A, kBytes, true>(scores.get(), kTile, kTile, tile.get() + d, padded,
                                          sums.get() + q * padded + d, padded);
        }
      }
    }

    for (int64_t q = 0; q < count; ++q) {
      const int64_t slot = part * p.queries + first_query + q;
      p.states[slot] = states[q];
      std::copy_n(sums.get() + q * padded, columns, p.weighted + slot * columns);
    }
  }
}

SSLFAST_MULTIVERSION_BY_WIDTH(stream_rows_best, stream_rows, const Problem<T>&)

// q . m_row / tau.
template <typename T>
accumulate_t<T> score_of(const Problem<T>& p, int64_t q, int64_t row) {
  using A = accumulate_t<T>;
  A score = 0;
  for (int64_t d = 0; d < p.columns; ++d) {
    score += p.query[q * p.columns + d] * p.inverse_temperature * static_cast<A>(p.bank[row * p.columns + d]);
  }
  return score;
}

// Merges the parts of one query and adds its positive.
template <typename T>
void finish_query(const Problem<T>& p, int64_t q, bool whole_bank, accumulate_t<T>* loss, accumulate_t<T>* lse,
                  accumulate_t<T>* grad /* [D] */) {
  using A = accumulate_t<T>;
  OnlineLogSumExp<A> softmax = OnlineLogSumExp<A>::empty();
  A binary = 0;
  for (int64_t part = 0; part < p.parts; ++part) {
    const StreamState<A>& state = p.states[part * p.queries + q];
    softmax.raise(state.maximum);
    softmax.sum += std::exp(state.maximum - softmax.maximum) * state.sum;
    binary += state.binary;
  }
  const int64_t self = p.index[q % p.batch];
  const T* positive = p.bank + std::max<int64_t>(self, 0) * p.columns;
  const A score = self >= 0 ? score_of(p, q, self) : A(0);
  if (whole_bank && p.binary && score > kLargest<A>) {  // rare: see finish_dense
    binary = 0;
    for (int64_t row = 0; row < p.num_rows; ++row) {
      if (row != self) binary += nce_term<A>(score_of(p, q, row) - p.offset).softplus;
    }
  }
  const DenseResult<A> result =
      finish_dense<A>({softmax.maximum, softmax.sum, binary}, self >= 0, score, whole_bank, p.binary, p.offset);
  *loss = result.loss;
  *lse = result.lse;
  for (int64_t d = 0; d < p.columns; ++d) {
    grad[d] = self >= 0 ? result.positive_weight * p.inverse_temperature * static_cast<A>(positive[d]) : A(0);
  }
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t slot = part * p.queries + q;
    const A weight = (p.binary ? A(1) : std::exp(p.states[slot].maximum - result.lse)) * p.inverse_temperature;
    for (int64_t d = 0; d < p.columns; ++d) grad[d] += weight * p.weighted[slot * p.columns + d];
  }
}

std::tuple<Tensor, Tensor, Tensor> bank_nce_dense_cpu(const Tensor& query_,  // [V, B, D]
                                                      const Tensor& bank_,   // [N, D]
                                                      const Tensor& index_,  // [B]
                                                      std::optional<Tensor> negatives_, std::optional<Tensor> z_tensor,
                                                      double z, double temperature, bool binary, bool exclude_self) {
  check_bank_nce_dense(query_, bank_, index_, negatives_, z_tensor, temperature, binary, exclude_self);
  const Tensor query = readable("bank_nce_dense", "query", query_), bank = readable("bank_nce_dense", "bank", bank_);
  const Tensor index = readable("bank_nce_dense", "index", index_);
  check_rows_in_range("bank_nce_dense", "index", index, bank.size(0), /*lowest=*/-1);
  const std::optional<Tensor> negatives = readable("bank_nce_dense", "negatives", negatives_);
  if (negatives) check_rows_in_range("bank_nce_dense", "negatives", *negatives, bank.size(0));
  const int64_t views = query.size(0), batch = query.size(1), columns = query.size(2), queries = views * batch;
  Tensor loss = allocate("bank_nce_dense", query, {views, batch});
  Tensor lse = allocate("bank_nce_dense", query, {views, batch});
  Tensor grad = allocate("bank_nce_dense", query, {views, batch, columns});
  if (queries == 0) return {loss, lse, grad};
  const double z_value = host_z("bank_nce_dense", binary, z_tensor, z);
  const int64_t num_negatives = negatives ? negatives->size(0) : bank.size(0) - 1;

  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_nce_dense", [&] {
    using A = accumulate_t<scalar_t>;
    Problem<scalar_t> p{};
    p.query = static_cast<const A*>(query.const_data_ptr());
    p.bank = static_cast<const scalar_t*>(bank.const_data_ptr());
    p.index = static_cast<const int64_t*>(index.const_data_ptr());
    p.negatives = negatives ? static_cast<const int64_t*>(negatives->const_data_ptr()) : nullptr;
    p.queries = queries;
    p.batch = batch;
    p.columns = columns;
    p.num_rows = negatives ? num_negatives : bank.size(0);
    const int64_t blocks = (queries + kBlock - 1) / kBlock;
    p.parts = std::clamp<int64_t>((kTasks + blocks - 1) / blocks, 1, std::max<int64_t>(1, p.num_rows / kPartRows));
    p.inverse_temperature = static_cast<A>(1.0 / temperature);
    p.offset = static_cast<A>(binary ? nce_offset(z_value, num_negatives, bank.size(0)) : 0.0);
    p.binary = binary;
    p.exclude_self = exclude_self;
    const Tensor states = allocate("bank_nce_dense", query, {p.parts, queries, 3});
    const Tensor weighted = allocate("bank_nce_dense", query, {p.parts, queries, columns});
    p.states = static_cast<StreamState<A>*>(states.mutable_data_ptr());
    p.weighted = static_cast<A*>(weighted.mutable_data_ptr());
    torch::stable::parallel_for(0, blocks * p.parts, 1, [&](int64_t begin, int64_t end) {
      Problem<scalar_t> some = p;
      some.begin = begin;
      some.end = end;
      stream_rows_best<scalar_t>(some);
    });
    A* losses = static_cast<A*>(loss.mutable_data_ptr());
    A* lses = static_cast<A*>(lse.mutable_data_ptr());
    A* grads = static_cast<A*>(grad.mutable_data_ptr());
    torch::stable::parallel_for(0, queries, 16, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        finish_query<scalar_t>(p, q, !negatives.has_value(), losses + q, lses + q, grads + q * columns);
      }
    });
  });
  return {loss, lse, grad};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("bank_nce_dense", TORCH_BOX(&sslfast::bank_nce_dense_cpu));
}
