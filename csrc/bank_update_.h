// bank_update_: checks and the arithmetic of one row.
#pragma once

#include "common/check.h"
#include "common/dispatch.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// Smallest divisor: a row with a smaller norm is divided by it instead, as torch.nn.functional.normalize does.
constexpr double kNormFloor = 1e-12;

template <typename A>
SSLFAST_HD A blend(A old_value, A feature, A momentum) {
  return momentum * old_value + (A(1) - momentum) * feature;
}

inline void check_bank_update(const Tensor& bank,      // [N, D]
                              const Tensor& index,     // [B]
                              const Tensor& features,  // [B, D]
                              double momentum) {
  constexpr const char* op = "bank_update_";
  SSLFAST_CHECK(bank.dim() == 2, op, ": bank must have shape [N, D], got ", shape_string(bank));
  check_updated(op, "bank", bank);
  check_floating(op, "features", features);
  check_index(op, "index", index);
  SSLFAST_CHECK(features.dim() == 2 && features.size(0) == index.size(0) && features.size(1) == bank.size(1), op,
                ": features must have shape [B, D] = [", index.size(0), ", ", bank.size(1), "], got ",
                shape_string(features), "; a row for each entry of index, with the columns of bank");
  SSLFAST_CHECK(momentum >= 0 && momentum <= 1, op, ": momentum must be in [0, 1], got ", momentum);
  check_same_device(op, "index", index, "bank", bank);
  check_same_device(op, "features", features, "bank", bank);
  check_memory(op, "bank", bank);
  check_memory(op, "index", index);
  check_memory(op, "features", features);
  check_apart(op, "bank", bank, "index", index);
  check_apart(op, "bank", bank, "features", features);
}

}  // namespace sslfast
