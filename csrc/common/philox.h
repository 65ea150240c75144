// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same bits as
// sslfast/ops/philox.py on every device. A draw is a function of (seed, stream, step, row, block), nothing else.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SSLFAST_HD __host__ __device__ __forceinline__
#else
#define SSLFAST_HD inline __attribute__((always_inline))
#endif

namespace sslfast {

// What a draw is for; the values equal Stream in sslfast/ops/philox.py.
constexpr uint32_t kStreamNegatives = 0;
constexpr uint32_t kStreamSharedNegatives = 7;
constexpr uint32_t kStreamPermutations = 8;

struct PhiloxBlock {
  uint32_t x0, x1, x2, x3;
};

SSLFAST_HD PhiloxBlock philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Block j of a row: counter (j, row mod 2^32, step mod 2^32, stream * 2^16 + row / 2^32).
SSLFAST_HD PhiloxBlock philox_row(uint32_t block, int64_t row, int64_t step, uint32_t stream, int64_t seed) {
  return philox4x32(block, static_cast<uint32_t>(row), static_cast<uint32_t>(step),
                    (stream << 16) + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
                    static_cast<uint64_t>(seed));
}

// floor((high * 2^32 + low) * bound / 2^64), uniform on 0 .. bound-1 for bound <= 2^32, bias below bound / 2^64.
SSLFAST_HD int64_t scale_to_bound(uint32_t low, uint32_t high, uint64_t bound) {
  const uint64_t carry = (static_cast<uint64_t>(low) * bound) >> 32;
  return static_cast<int64_t>((static_cast<uint64_t>(high) * bound + carry) >> 32);
}

}  // namespace sslfast
