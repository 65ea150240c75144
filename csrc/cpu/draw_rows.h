// Drawing the negatives of one sample on the CPU, for negative_rows and bank_nce.
#pragma once

#include "common/simd.h"
#include "negative_rows.h"

namespace sslfast {

struct DrawRows {
  NegativeSampler sampler;
  int64_t self;   // bank row of the sample
  int64_t first;  // an even number: the first negative drawn
  int64_t count;
  int64_t* out;  // [count]
};

// Philox blocks are independent, so pairs of negatives fill the lanes of a vector.
template <typename T = int64_t>
SSLFAST_INLINE void draw_rows(const DrawRows& d) {
  const uint32_t first_pair = static_cast<uint32_t>(d.first / 2);
  const NegativeSampler sampler = d.sampler;
  const int64_t self = d.self;
  T* __restrict__ out = d.out;
#pragma omp simd
  for (int64_t pair = 0; pair < d.count / 2; ++pair) {
    sampler.draw(first_pair + static_cast<uint32_t>(pair), self, out + 2 * pair, out + 2 * pair + 1);
  }
  if (d.count % 2 != 0) {
    int64_t unused;
    sampler.draw(first_pair + static_cast<uint32_t>(d.count / 2), self, out + d.count - 1, &unused);
  }
}

}  // namespace sslfast
