// bank_nce_dense: every query against the same rows, the whole bank or a given list. Checks; the arithmetic of one
// score is that of bank_nce.h.
//
// The stream runs over rows j with s_j = q . m_j / tau and keeps, per query, as attention does with K = V = bank:
//   maximum, sum = sum_j exp(s_j - maximum), weighted = sum_j w_j m_j, and for NCE binary = sum_j softplus(u_j),
// with w_j = exp(s_j - maximum) for InfoNCE and sigmoid(u_j) for NCE. Parts of the bank merge (StreamState).
// The positive s_0 is added last. It is one of the rows of the whole bank, and one more score beside a list:
//   InfoNCE  loss = lse - s_0               d/dq = (sum_j softmax_j m_j - m_0) / tau
//   NCE      loss = binary - u_0 (whole bank), binary + softplus(-u_0) (list); K = N - 1 for the whole bank
// A query whose index is -1 has no positive here (a shard of a bank): loss = lse, or binary.
#pragma once

#include "bank_nce.h"

namespace sslfast {

// State of one query after some of the rows, without the weighted sum.
template <typename A>
struct StreamState {
  A maximum, sum, binary;

  static SSLFAST_HD StreamState empty() { return {-kLargest<A>, A(0), A(0)}; }
};

// The gradient times tau, from the weighted sums of the stream and the positive's row:
// grad * tau = exp(maximum_part - scale_lse) * weighted_part + ... + positive_weight * m_0 (factor 1 for NCE).
template <typename A>
struct DenseResult {
  A loss, lse, positive_weight;
};

// `state` holds all rows; `score` is s_0, `offset` = log(Z K / N); exp and log by the host or device library.
template <typename A>
SSLFAST_HD DenseResult<A> finish_dense(const StreamState<A>& state, bool has_positive, A score, bool whole_bank,
                                       bool binary, A offset) {
  OnlineLogSumExp<A> softmax{state.maximum, state.sum};
  if (has_positive && !whole_bank) {
    softmax.raise(score);
    softmax.sum += static_cast<A>(exp(score - softmax.maximum));
  }
  const A lse = softmax.value();
  if (!has_positive) return {binary ? state.binary : lse, lse, A(0)};
  if (!binary) return {lse - score, lse, whole_bank ? A(-1) : static_cast<A>(exp(score - lse)) - A(1)};
  const A u = score - offset;
  // softplus(-u) - softplus(u) = -u, of which an infinite one cannot be subtracted: state.binary then leaves it out.
  if (whole_bank) return {u > kLargest<A> ? state.binary : state.binary - u, lse, A(-1)};
  const A e = static_cast<A>(exp(u > A(0) ? -u : u));
  const NceTerm<A> term(-u, e, static_cast<A>(log1p(e)));  // -log h(s_0) = softplus(-u_0), and its derivative
  return {state.binary + term.softplus, lse, -term.sigmoid};
}

inline void check_bank_nce_dense(const Tensor& query,                     // [V, B, D] fp32 or fp64
                                 const Tensor& bank,                      // [N, D]
                                 const Tensor& index,                     // [B] int64, -1: no positive
                                 const std::optional<Tensor>& negatives,  // [K] int64; none: the whole bank
                                 const std::optional<Tensor>& z_tensor,   // [] fp64
                                 double temperature, bool binary, bool exclude_self) {
  constexpr const char* op = "bank_nce_dense";
  check_scoring(op, query, bank, index, z_tensor, temperature);
  SSLFAST_CHECK(bank.size(0) >= 1, op, ": bank must hold at least one row, got ", shape_string(bank));
  if (negatives) {
    check_int64(op, "negatives", *negatives);
    SSLFAST_CHECK(negatives->dim() == 1, op, ": negatives must have shape [K], got ", shape_string(*negatives));
    SSLFAST_CHECK(negatives->size(0) >= 1, op, ": negatives must name at least one row, got ",
                  shape_string(*negatives));
    check_same_device(op, "negatives", *negatives, "query", query);
  } else {
    SSLFAST_CHECK(!exclude_self, op, ": exclude_self is for given negatives; the whole bank holds each positive once");
    SSLFAST_CHECK(!binary || bank.size(0) >= 2, op, ": NCE against the whole bank needs at least 2 rows, got 1");
  }
}

}  // namespace sslfast
