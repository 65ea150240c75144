// bank_nce: noise-contrastive scoring against a memory bank. Checks and the arithmetic of one score.
//
// With s_k = q . m_k / tau for the positive (k = 0) and the K negatives:
//   InfoNCE  loss = logsumexp_k(s_k) - s_0                          d/ds_k = softmax_k - [k = 0]
//   NCE      u_k = s_k - log(Z K / N),  P_n = 1/N,  h = P / (P + K P_n) = sigmoid(u)
//            loss = softplus(-u_0) + sum_k softplus(u_k)            d/ds_k = sigmoid(u_k) - [k = 0]
// and d/dq = sum_k (d/ds_k) m_k / tau: one pass over the rows gives loss and gradient.
// A shard of a bank holds some of the K+1 rows. The sums then run over those; a query whose positive is elsewhere has
// loss = logsumexp_k(s_k), or sum_k softplus(u_k).
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/philox.h"
#include "negative_rows.h"

namespace sslfast {

// log(Z K / N): a score minus it is the NCE logit.
SSLFAST_HD double nce_offset(double z, int64_t num_negatives, int64_t num_rows) {
  const double log_z = z > 0 ? log(z) : NAN;  // of 0 too: an infinite loss would have a finite gradient
  return log_z + log(static_cast<double>(num_negatives)) - log(static_cast<double>(num_rows));
}

// softplus(u) = log(1 + exp(u)) and sigmoid(u) from e = exp(-|u|) and log(1 + e), which the CPU and CUDA code compute
// with their own functions: no overflow at any u.
template <typename A>
struct NceTerm {
  A softplus, sigmoid;

  SSLFAST_HD NceTerm(A u, A e, A log1p_e)
      : softplus((u > A(0) ? u : A(0)) + log1p_e), sigmoid((u > A(0) ? A(1) : e) / (A(1) + e)) {}
  SSLFAST_HD NceTerm(A softplus, A sigmoid) : softplus(softplus), sigmoid(sigmoid) {}
};

// The ends of what a running maximum takes. It stays finite, so that exp(score - maximum) is the right weight of every
// score: 0 of -inf, inf of +inf and NaN of NaN, which then are in the sum as in that of the reference.
template <typename A>
constexpr A kLargest = std::is_same_v<A, double> ? A(DBL_MAX) : A(FLT_MAX);

// Running softmax state of one query: value = sum of exp(s - maximum).
template <typename A>
struct OnlineLogSumExp {
  A maximum, sum;

  static SSLFAST_HD OnlineLogSumExp empty() { return {-kLargest<A>, A(0)}; }

  // Raises the maximum to `score` where that is larger; returns the factor that rescales earlier sums.
  SSLFAST_HD A raise(A score) {
    score = score > kLargest<A> ? kLargest<A> : score;
    if (!(score > maximum)) return A(1);
    const A factor = exp(maximum - score);  // 0 for the empty state
    maximum = score;
    sum *= factor;
    return factor;
  }

  SSLFAST_HD A value() const { return maximum + log(sum); }
};

// Rows first .. first + rows - 1 of a bank of num_rows. Index and negatives are rows of the whole bank.
struct Shard {
  int64_t first, rows, num_rows;

  bool is_whole() const { return rows == num_rows; }
  SSLFAST_HD bool holds(int64_t row) const { return row >= first && row < first + rows; }
};

inline Shard make_shard(const Tensor& bank, int64_t first_row, int64_t num_rows) {
  const int64_t rows = bank.size(0);
  if (num_rows == -1) num_rows = rows;
  SSLFAST_CHECK(first_row >= 0 && rows <= num_rows && first_row <= num_rows - rows, "bank_nce: ", rows,
                " rows from row ", first_row, " on are not a shard of a bank of ", num_rows, " rows");
  SSLFAST_CHECK(rows >= 1 || num_rows == 0, "bank_nce: a shard must hold at least one row");
  return {first_row, rows, num_rows};
}

// Checks shared by bank_nce and bank_nce_dense.
inline void check_scoring(const char* op,
                          const Tensor& query,                    // [V, B, D] fp32 or fp64
                          const Tensor& bank,                     // [N, D]
                          const Tensor& index,                    // [B] int64
                          const std::optional<Tensor>& z_tensor,  // [] fp64
                          double temperature) {
  SSLFAST_CHECK(bank.dim() == 2, op, ": bank must have shape [N, D], got ", shape_string(bank));
  check_floating(op, "bank", bank);
  SSLFAST_CHECK(query.dim() == 3, op, ": query must have shape [V, B, D], got ", shape_string(query));
  SSLFAST_CHECK(query.size(2) == bank.size(1), op, ": query must have D=", bank.size(1), " columns like bank, got ",
                query.size(2));
  const ScalarType wanted = bank.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  SSLFAST_CHECK(query.scalar_type() == wanted, op, ": query must be ",
                wanted == ScalarType::Double ? "fp64 like bank" : "fp32; convert it with .float()", ", got ",
                torch::headeronly::toString(query.scalar_type()));
  check_index(op, "index", index);
  SSLFAST_CHECK(index.size(0) == query.size(1), op, ": index must have B=", query.size(1), " entries, got ",
                index.size(0), ", for a query ", shape_string(query));
  check_same_device(op, "bank", bank, "query", query);
  check_same_device(op, "index", index, "query", query);
  SSLFAST_CHECK(temperature >= 1e-30 && temperature <= 1e30, op, ": temperature must be in [1e-30, 1e+30], got ",
                temperature);
  if (z_tensor) {
    SSLFAST_CHECK(z_tensor->dim() == 0 && z_tensor->scalar_type() == ScalarType::Double, op,
                  ": z must be a float or a 0-d fp64 tensor, got shape ", shape_string(*z_tensor));
    check_memory(op, "z", *z_tensor);
    check_same_device(op, "z", *z_tensor, "query", query);
  }
}

// The normaliser of NCE where it is a number. NaN passes: a loss that is not finite is the trainer's business.
inline void check_z(const char* op, bool binary, const std::optional<Tensor>& tensor, double z) {
  SSLFAST_CHECK(!binary || tensor || !(z <= 0), op, ": z must be positive, got ", z);
}

// The normaliser of NCE on the CPU, else 1.
inline double host_z(const char* op, bool binary, const std::optional<Tensor>& tensor, double z) {
  if (!binary) return 1.0;
  check_z(op, binary, tensor, z);
  if (!tensor) return z;
  const double value = *static_cast<const double*>(tensor->const_data_ptr());
  SSLFAST_CHECK(!(value <= 0), op, ": z must be positive, got a tensor of ", value);
  return value;
}

inline void check_bank_nce(const Tensor& query,                       // [V, B, D] fp32 or fp64
                           const Tensor& bank,                        // [N, D]
                           const Tensor& index,                       // [B] int64
                           const std::optional<Tensor>& negatives,    // [B, K] int64; none: drawn
                           const std::optional<Tensor>& step_tensor,  // [] int64
                           const std::optional<Tensor>& z_tensor,     // [] fp64
                           int64_t num_negatives, double temperature, bool exclude_self, int64_t seed,
                           const Shard& shard) {
  constexpr const char* op = "bank_nce";
  check_scoring(op, query, bank, index, z_tensor, temperature);
  check_step(op, step_tensor, index);
  if (negatives) {
    check_int64(op, "negatives", *negatives);
    SSLFAST_CHECK(negatives->dim() == 2 && negatives->size(0) == index.size(0), op,
                  ": negatives must have shape [K] or [B, K] "
                  "with B=",
                  index.size(0), ", got ", shape_string(*negatives));
    SSLFAST_CHECK(negatives->size(1) == num_negatives && num_negatives >= 1, op,
                  ": negatives must name at least one row per sample, got shape ", shape_string(*negatives));
    check_same_device(op, "negatives", *negatives, "query", query);
  } else {
    check_sampling(op, num_negatives, shard.num_rows, seed, exclude_self);
  }
}

}  // namespace sslfast
