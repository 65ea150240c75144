#include "negative_rows.h"

#include <torch/csrc/stable/library.h>

#include "cpu/draw_rows.h"

namespace sslfast {
namespace {

SSLFAST_MULTIVERSION(draw_rows_best, draw_rows, const DrawRows&)

Tensor negative_rows_cpu(const Tensor& index_,  // [B] int64
                         std::optional<Tensor> step_tensor, int64_t step, int64_t num_negatives, int64_t num_rows,
                         int64_t seed, bool exclude_self, bool shared) {
  check_negative_rows(index_, step_tensor, num_negatives, num_rows, seed, exclude_self, shared);
  const Tensor index = readable("negative_rows", "index", index_);
  check_rows_in_range("negative_rows", "index", index, num_rows);
  const int64_t batch = index.size(0);
  Tensor rows = allocate("negative_rows", index, {batch, num_negatives});
  const NegativeSampler sampler = make_sampler(seed, host_step(step_tensor, step), num_rows, exclude_self, shared);
  const int64_t* self = static_cast<const int64_t*>(index.const_data_ptr());
  int64_t* out = static_cast<int64_t*>(rows.mutable_data_ptr());

  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      draw_rows_best<int64_t>({sampler, self[b], 0, num_negatives, out + b * num_negatives});
    }
  });
  return rows;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("negative_rows", TORCH_BOX(&sslfast::negative_rows_cpu));
}
