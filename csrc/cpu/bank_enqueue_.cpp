#include "bank_enqueue_.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace sslfast {
namespace {

template <typename T, typename F>
void write_rows(T* bank,        // [N, D]
                const F* keys,  // [B, D]
                int64_t head, int64_t columns, const Ring& ring) {
  const int64_t start = ring.start(head);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, ring.kept, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      T* __restrict__ row = bank + ring.row(start, k) * columns;
      const F* __restrict__ key = keys + (ring.skipped + k) * columns;
#pragma omp simd
      for (int64_t d = 0; d < columns; ++d) row[d] = static_cast<T>(key[d]);
    }
  });
}

void bank_enqueue_cpu(const Tensor& bank, const Tensor& head, const Tensor& keys_) {
  check_bank_enqueue(bank, head, keys_);
  const Tensor keys = readable("bank_enqueue_", "keys", keys_);
  const Ring ring(bank.size(0), keys.size(0));
  int64_t* position = static_cast<int64_t*>(head.mutable_data_ptr());
  SSLFAST_CHECK(*position >= 0 && *position < ring.num_rows, "bank_enqueue_: head must be in [0, ", ring.num_rows,
                "), got ", *position, "; it is a row of bank");
  SSLFAST_DISPATCH_FLOAT(bank.scalar_type(), "bank_enqueue_", [&] {
    using bank_t = scalar_t;
    SSLFAST_DISPATCH_FLOAT(keys.scalar_type(), "bank_enqueue_", [&] {
      write_rows(static_cast<bank_t*>(bank.mutable_data_ptr()), static_cast<const scalar_t*>(keys.const_data_ptr()),
                 *position, bank.size(1), ring);
    });
  });
  *position = ring.advanced(*position);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("bank_enqueue_", TORCH_BOX(&sslfast::bank_enqueue_cpu));
}
