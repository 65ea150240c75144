#include "permutations.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "common/philox.h"

namespace sslfast {
namespace {

constexpr int64_t kBlock = 4096;         // candidates whose distances stay in the L1 cache
constexpr int32_t kChosen = -(1 << 26);  // below every sum of distances, also after 9! more of them

// All permutations in an order drawn by the seed, one array per position: columns[position * total + candidate].
std::vector<uint8_t> drawn_candidates(int64_t total, int64_t cells, int64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(total));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = total - 1; i > 0; --i) {
    const PhiloxBlock bits = philox_row(0, i, 0, kStreamPermutations, seed);
    std::swap(order[i], order[scale_to_bound(bits.x0, bits.x1, static_cast<uint64_t>(i) + 1)]);
  }
  std::vector<uint8_t> columns(static_cast<size_t>(total * cells));
  // int64_t: of uint8_t g++ 12 for aarch64 takes next_permutation's swaps for writes out of range.
  std::vector<int64_t> permutation(static_cast<size_t>(cells));
  std::iota(permutation.begin(), permutation.end(), int64_t{0});
  for (int64_t rank = 0; rank < total; ++rank) {
    for (int64_t position = 0; position < cells; ++position)
      columns[position * total + order[rank]] = static_cast<uint8_t>(permutation[position]);
    std::next_permutation(permutation.begin(), permutation.end());
  }
  return columns;
}

}  // namespace

std::vector<uint8_t> max_hamming_permutations(int64_t count, int64_t cells, int64_t seed) {
  int64_t total = 1;
  for (int64_t i = 2; i <= cells; ++i) total *= i;
  const std::vector<uint8_t> columns = drawn_candidates(total, cells, seed);

  // Distances of every candidate to the permutations chosen so far.
  std::vector<int32_t> sum(static_cast<size_t>(total), 0);
  std::vector<uint8_t> nearest(static_cast<size_t>(total), static_cast<uint8_t>(cells));
  std::vector<uint8_t> result;
  result.reserve(static_cast<size_t>(count * cells));
  uint8_t distance[kBlock];
  int64_t chosen = 0;
  while (true) {
    for (int64_t position = 0; position < cells; ++position) result.push_back(columns[position * total + chosen]);
    if (static_cast<int64_t>(result.size()) == count * cells) return result;
    sum[chosen] = kChosen;

    int64_t next = 0;
    int32_t best = std::numeric_limits<int32_t>::min();
    for (int64_t start = 0; start < total; start += kBlock) {
      const int64_t size = std::min(kBlock, total - start);
      std::fill(distance, distance + size, static_cast<uint8_t>(cells));
      for (int64_t position = 0; position < cells; ++position) {
        const uint8_t* column = columns.data() + position * total + start;
        const uint8_t own = columns[position * total + chosen];
        for (int64_t i = 0; i < size; ++i) distance[i] = static_cast<uint8_t>(distance[i] - (column[i] == own));
      }
      int32_t* sums = sum.data() + start;
      uint8_t* nearests = nearest.data() + start;
      for (int64_t i = 0; i < size; ++i) nearests[i] = std::min(nearests[i], distance[i]);
      for (int64_t i = 0; i < size; ++i) sums[i] += distance[i];
      int32_t largest = std::numeric_limits<int32_t>::min();
      for (int64_t i = 0; i < size; ++i) largest = std::max(largest, sums[i] * 16 + nearests[i]);
      if (largest > best) {  // the first among equals: the order of candidates is drawn
        best = largest;
        for (int64_t i = 0; i < size; ++i) {
          if (sums[i] * 16 + nearests[i] == largest) {
            next = start + i;
            break;
          }
        }
      }
    }
    chosen = next;
  }
}

}  // namespace sslfast
