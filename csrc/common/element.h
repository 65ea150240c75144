// Ops that only move elements treat them as unsigned integers of their size. The body sees the type as `element_t`.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace sslfast {

inline void check_element(const char* op, const Tensor& t) {
  const size_t bytes = t.element_size();
  SSLFAST_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, op,
                ": elements must have 1, 2, 4 or 8 bytes, got ", bytes);
}

}  // namespace sslfast

#define SSLFAST_ELEMENT_CASE(BYTES, TYPE, ...) \
  case BYTES: {                                \
    using element_t = TYPE;                    \
    __VA_ARGS__();                             \
    break;                                     \
  }

// Any dtype that check_element accepts. Variadic, so that bodies may hold commas and kernel launches.
#define SSLFAST_DISPATCH_ELEMENT(TENSOR, ...)      \
  switch ((TENSOR).element_size()) {               \
    SSLFAST_ELEMENT_CASE(1, uint8_t, __VA_ARGS__)  \
    SSLFAST_ELEMENT_CASE(2, uint16_t, __VA_ARGS__) \
    SSLFAST_ELEMENT_CASE(4, uint32_t, __VA_ARGS__) \
    SSLFAST_ELEMENT_CASE(8, uint64_t, __VA_ARGS__) \
  }
