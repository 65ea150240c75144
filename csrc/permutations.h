// Sets of permutations with a large Hamming distance, for sslfast/ops/permutations.py.
#pragma once

#include <cstdint>
#include <vector>

namespace sslfast {

constexpr int64_t kMaxPermutationCells = 9;  // all 9! = 362,880 permutations are candidates

// `count` distinct permutations of 0 .. cells-1, row by row: `count * cells` bytes.
// Requires 1 <= cells <= kMaxPermutationCells, 1 <= count <= cells! and seed >= 0.
std::vector<uint8_t> max_hamming_permutations(int64_t count, int64_t cells, int64_t seed);

}  // namespace sslfast
