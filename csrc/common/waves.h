// How many parts to split a stream into, so that a grid of blocks fills the multiprocessors in whole waves.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sslfast {

// Each of `blocks` streams has `steps` steps of equal length; a part of one is a block of the grid, `slots` of which
// run at a time and which costs `fixed_steps` steps beside its own. Rounding the number of parts up to fill the slots
// would leave most of them idle in a last, short wave. Taken is the quickest of the grids that fill 1, 2, ... kWaves
// waves from below, the fewest parts among equals; 1 <= parts <= max_parts.
inline int64_t whole_wave_parts(int64_t blocks, int64_t steps, int64_t slots, int64_t fixed_steps, int64_t max_parts) {
  constexpr int64_t kWaves = 8;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t first = std::max<int64_t>(1, ceil_div(blocks, slots));
  int64_t best = 1, best_steps = INT64_MAX;
  for (int64_t waves = first; waves < first + kWaves; ++waves) {
    const int64_t parts = std::clamp<int64_t>(waves * slots / blocks, 1, max_parts);
    const int64_t taken = ceil_div(blocks * parts, slots) * (ceil_div(steps, parts) + fixed_steps);
    if (taken < best_steps) best = parts, best_steps = taken;
  }
  return best;
}

}  // namespace sslfast
