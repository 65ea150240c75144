// bank_enqueue_: checks, and the rows of the ring that keys are written to.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Of B keys the last min(B, N) are kept. Key `skipped + k` goes to row `(head + skipped + k) mod N`, so rows are
// distinct.
struct Ring {
  int64_t num_rows, batch, skipped, kept;

  Ring(int64_t num_rows, int64_t batch)
      : num_rows(num_rows),
        batch(batch),
        skipped(std::max<int64_t>(batch - num_rows, 0)),
        kept(std::min(batch, num_rows)) {}

  SSLFAST_HD int64_t start(int64_t head) const { return (head + skipped) % num_rows; }
  SSLFAST_HD int64_t row(int64_t start, int64_t k) const {
    return start + k < num_rows ? start + k : start + k - num_rows;
  }
  SSLFAST_HD int64_t advanced(int64_t head) const { return (head + batch) % num_rows; }
};

inline void check_bank_enqueue(const Tensor& bank,    // [N, D]
                               const Tensor& head,    // []
                               const Tensor& keys) {  // [B, D]
  constexpr const char* op = "bank_enqueue_";
  SSLFAST_CHECK(bank.dim() == 2 && bank.size(0) > 0, op, ": bank must have shape [N, D] with N >= 1, got ",
                shape_string(bank));
  check_updated(op, "bank", bank);
  check_floating(op, "keys", keys);
  SSLFAST_CHECK(head.dim() == 0, op, ": head must be 0-d, got shape ", shape_string(head));
  check_int64(op, "head", head);
  SSLFAST_CHECK(keys.dim() == 2 && keys.size(1) == bank.size(1), op, ": keys must have shape [B, D] = [B, ",
                bank.size(1), "], got ", shape_string(keys), "; bank is ", shape_string(bank));
  check_same_device(op, "head", head, "bank", bank);
  check_same_device(op, "keys", keys, "bank", bank);
  check_memory(op, "bank", bank);
  check_memory(op, "head", head);
  check_memory(op, "keys", keys);
  check_apart(op, "bank", bank, "head", head);
  check_apart(op, "bank", bank, "keys", keys);
  check_apart(op, "head", head, "keys", keys);
}

}  // namespace sslfast
