// Checks and names shared by all ops. A failed check throws std::runtime_error: "op: rule, got value".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

namespace sslfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define SSLFAST_CHECK(cond, ...) STD_TORCH_CHECK(cond, __VA_ARGS__)

inline std::string shape_string(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

// All tensors of an op call are on one device.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  SSLFAST_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op, ": ", name,
                " and ", other_name, " must be on the same device; move one of them with .to(device)");
}

// [B] int64 of bank rows or similar.
inline void check_index(const char* op, const char* name, const Tensor& index) {
  SSLFAST_CHECK(index.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64; convert it with .long()");
  SSLFAST_CHECK(index.dim() == 1, op, ": ", name, " must have shape [B], got ", shape_string(index));
}

// CPU only: reads the values. On CUDA the kernels trap instead, since reading them would synchronise with the device.
inline void check_rows_in_range(const char* op, const char* name, const Tensor& rows /* int64, contiguous */,
                                int64_t num_rows, int64_t lowest = 0) {
  const int64_t* values = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    SSLFAST_CHECK(values[i] >= lowest && values[i] < num_rows, op, ": ", name, " must be in [", lowest, ", ", num_rows,
                  "), got ", values[i], " at flat position ", i);
  }
}

// The value of step_tensor if given, else step; CPU tensors only.
inline int64_t host_step(const std::optional<Tensor>& step_tensor, int64_t step) {
  return step_tensor ? *static_cast<const int64_t*>(step_tensor->const_data_ptr()) : step;
}

inline void check_step(const char* op, const std::optional<Tensor>& step_tensor, const Tensor& index) {
  if (!step_tensor) return;
  SSLFAST_CHECK(step_tensor->dim() == 0 && step_tensor->scalar_type() == ScalarType::Long, op,
                ": step must be an int or a 0-d int64 tensor, got shape ", shape_string(*step_tensor));
  check_same_device(op, "step", *step_tensor, "index", index);
}

}  // namespace sslfast
