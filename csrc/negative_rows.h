// negative_rows: the draw of sampled negatives, the same on every device, and its checks.
#pragma once

#include "common/check.h"
#include "common/philox.h"

namespace sslfast {

// Uniform over the num_rows rows, or over all but self (num_rows - 1 of them, shifted past self).
struct NegativeSampler {
  int64_t seed, step;
  uint64_t bound;  // num_rows, or num_rows - 1 where self is excluded
  bool exclude_self;
  uint32_t stream;

  SSLFAST_HD int64_t shift(int64_t row, int64_t self) const { return row + (exclude_self && row >= self ? 1 : 0); }

  // Negatives 2 * pair and 2 * pair + 1 of the sample with bank row `self`.
  SSLFAST_HD void draw(uint32_t pair, int64_t self, int64_t* first, int64_t* second) const {
    const PhiloxBlock bits = philox_row(pair, self, step, stream, seed);
    *first = shift(scale_to_bound(bits.x0, bits.x1, bound), self);
    *second = shift(scale_to_bound(bits.x2, bits.x3, bound), self);
  }
};

// shared: one draw for the whole batch, that of row 0 in a separate stream, which excludes no row.
inline NegativeSampler make_sampler(int64_t seed, int64_t step, int64_t num_rows, bool exclude_self,
                                    bool shared = false) {
  return {seed, step, static_cast<uint64_t>(num_rows - (exclude_self ? 1 : 0)), exclude_self,
          shared ? kStreamSharedNegatives : kStreamNegatives};
}

inline void check_sampling(const char* op, int64_t num_negatives, int64_t num_rows, int64_t seed, bool exclude_self) {
  SSLFAST_CHECK(num_negatives >= 1, op, ": num_negatives must be at least 1, got ", num_negatives);
  SSLFAST_CHECK(num_negatives < (int64_t(1) << 33), op, ": num_negatives must be below 2**33, got ", num_negatives);
  SSLFAST_CHECK(num_rows <= (int64_t(1) << 32), op, ": at most 2**32 bank rows can be drawn from, got ", num_rows);
  SSLFAST_CHECK(seed >= 0, op, ": seed must be in [0, 2**63), got ", seed);
  SSLFAST_CHECK(num_rows >= (exclude_self ? 2 : 1), op, ": drawing negatives needs at least ", exclude_self ? 2 : 1,
                " bank rows", exclude_self ? " when exclude_self is True" : "", ", got ", num_rows);
}

inline void check_negative_rows(const Tensor& index,                       // [B] int64
                                const std::optional<Tensor>& step_tensor,  // [] int64
                                int64_t num_negatives, int64_t num_rows, int64_t seed, bool exclude_self, bool shared) {
  check_index("negative_rows", "index", index);
  check_step("negative_rows", step_tensor, index);
  check_sampling("negative_rows", num_negatives, num_rows, seed, exclude_self);
  SSLFAST_CHECK(!(shared && exclude_self),
                "negative_rows: a shared draw is for the whole batch and excludes no row; "
                "pass exclude_self=False");
}

}  // namespace sslfast
