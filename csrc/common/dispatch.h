// Runtime dtype to C++ type. The body sees the type as `scalar_t`.
#pragma once

#include <torch/headeronly/core/Dispatch.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// fp32, fp64, bf16, fp16. Variadic, so that bodies may hold commas and kernel launches.
#define SSLFAST_DISPATCH_FLOAT(TYPE, NAME, ...)                                                       \
  THO_DISPATCH_SWITCH(TYPE, NAME,                                                                     \
                      THO_DISPATCH_CASE(torch::headeronly::ScalarType::Float, __VA_ARGS__)            \
                          THO_DISPATCH_CASE(torch::headeronly::ScalarType::Double, __VA_ARGS__)       \
                              THO_DISPATCH_CASE(torch::headeronly::ScalarType::BFloat16, __VA_ARGS__) \
                                  THO_DISPATCH_CASE(torch::headeronly::ScalarType::Half, __VA_ARGS__))

namespace sslfast {

// Sums run in fp32, in fp64 for fp64 input.
template <typename T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename accumulate<T>::type;

}  // namespace sslfast
