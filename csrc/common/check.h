// Checks and names shared by all ops. A failed check throws std::runtime_error: "op: rule, got value".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sslfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

// Not STD_TORCH_CHECK, whose messages begin with a function, a file and a line of these sources.
#define SSLFAST_CHECK(cond, ...)                                           \
  do {                                                                     \
    if (!(cond)) throw std::runtime_error(::sslfast::joined(__VA_ARGS__)); \
  } while (false)

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

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  SSLFAST_CHECK(is_floating(t.scalar_type()), op, ": ", name, " must be fp32, fp64, bf16 or fp16, got ",
                torch::headeronly::toString(t.scalar_type()));
}

inline void check_int64(const char* op, const char* name, const Tensor& t) {
  SSLFAST_CHECK(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64; convert it with .long(), got ",
                torch::headeronly::toString(t.scalar_type()));
}

// Steps from the first element of a tensor to its last; the tensor has elements.
inline int64_t last_element(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return last;
}

// Every tensor passes here before its memory is touched: a storage can be resized, or be smaller than the sizes say.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  const int64_t needed = (t.storage_offset() + last_element(t) + 1) * static_cast<int64_t>(t.element_size());
  SSLFAST_CHECK(needed <= held, op, ": ", name, " has shape ", shape_string(t), " and needs ", needed,
                " bytes of its storage, which has ", held,
                "; the storage was resized, pass a tensor that owns its memory");
}

// (stride, size) of the dimensions with more than one element, by stride.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dimensions(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Memory of a tensor in bytes: from begin to end, in runs of `run` that start at multiples of `step` (0: one run).
struct Memory {
  const char *begin = nullptr, *end = nullptr;
  int64_t run = 0, step = 0;

  explicit Memory(const Tensor& t) {
    if (t.numel() == 0) return;
    const int64_t size = static_cast<int64_t>(t.element_size());
    begin = static_cast<const char*>(t.const_data_ptr());
    end = begin + (last_element(t) + 1) * size;
    run = size;
    if (t.is_contiguous()) {
      run = end - begin;
      return;
    }
    for (const auto& [stride, count] : sorted_dimensions(t)) {
      if (step == 0 && stride * size <= run) {
        run += (count - 1) * stride * size;
      } else {
        step = std::gcd(step, stride * size);
      }
    }
  }

  // False only if no byte is shared. Slices of one matrix along its columns lie between each other: their runs are
  // compared modulo the step.
  bool may_share(const Memory& other) const {
    if (begin == nullptr || other.begin == nullptr || end <= other.begin || other.end <= begin) return false;
    const int64_t common = std::gcd(step, other.step);
    if (common == 0) return true;
    const int64_t offset = ((other.begin - begin) % common + common) % common;
    return offset < run || offset + other.run > common;
  }
};

// What an op writes shares no memory with what it reads: the result would depend on the order of threads, and values
// would change after they were checked.
inline void check_apart(const char* op, const char* written_name, const Tensor& written, const char* name,
                        const Tensor& t) {
  SSLFAST_CHECK(!Memory(written).may_share(Memory(t)), op, ": ", name, " must not share memory with ", written_name,
                "; pass ", name, ".clone()");
}

inline std::string out_of_memory(const char* op, double bytes) {
  std::ostringstream out;
  out.precision(0);
  out << op << ": out of memory, the op needs " << std::fixed << bytes
      << " bytes for one tensor; use a smaller batch or fewer negatives";
  return out.str();
}

// Throws before torch does, whose message is a stack trace on the screen. Addresses are reserved, no page is touched.
inline void check_allocation(const char* op, double bytes, bool on_cpu) {
  constexpr double kLarge = 1 << 26, kLargest = 1e18;
  if (bytes < kLarge) return;
  void* probe = bytes < kLargest && on_cpu ? std::malloc(static_cast<size_t>(bytes)) : nullptr;
  const bool fits = bytes < kLargest && (!on_cpu || probe != nullptr);
  std::free(probe);
  SSLFAST_CHECK(fits, out_of_memory(op, bytes));
}

// A new contiguous tensor on the device of `like`, and of its dtype unless given. By the C function where there are
// elements: the stable ABI's new_empty looks its operator up by name in every call, which takes longer than to
// allocate.
inline Tensor allocate(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  const int32_t type =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype ? *dtype : like.scalar_type()));
  double bytes = static_cast<double>(aoti_torch_dtype_element_size(type));
  for (const int64_t size : sizes) bytes *= static_cast<double>(size);
  check_allocation(op, bytes, like.is_cpu());
  try {
    if (bytes == 0) return torch::stable::new_empty(like, sizes, dtype);  // the other sizes may be of any magnitude
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    type, device_type, like.get_device_index(), &handle));
    return Tensor(handle);
  } catch (const std::exception&) {
    throw std::runtime_error(out_of_memory(op, bytes));
  }
}

// `t` with its elements in order, as kernels read it; a copy where it has another layout.
inline Tensor readable(const char* op, const char* name, const Tensor& t) {
  check_memory(op, name, t);
  if (t.is_contiguous()) return t;
  const double bytes = static_cast<double>(t.numel()) * static_cast<double>(t.element_size());
  check_allocation(op, bytes, t.is_cpu());
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    throw std::runtime_error(out_of_memory(op, bytes));
  }
}
inline std::optional<Tensor> readable(const char* op, const char* name, const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(readable(op, name, *t)) : std::nullopt;
}

// A tensor that is updated in place, row by row.
inline void check_updated(const char* op, const char* name, const Tensor& t) {
  check_floating(op, name, t);
  if (t.is_contiguous()) return;
  std::string strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides += (d ? ", " : "") + std::to_string(t.stride(d));
  SSLFAST_CHECK(false, op, ": ", name, " must be contiguous, it is updated in place; build it with .contiguous(), got ",
                shape_string(t), " with strides [", strides, "]");
}

// All tensors of an op call are on one device.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  SSLFAST_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op, ": ", name,
                " and ", other_name, " must be on the same device; move one of them with .to(device)");
}

// [B] int64 of bank rows or similar.
inline void check_index(const char* op, const char* name, const Tensor& index) {
  check_int64(op, name, index);
  SSLFAST_CHECK(index.dim() == 1, op, ": ", name, " must have shape [B], got ", shape_string(index));
}

// CPU only: reads the values. On CUDA the kernels trap instead, since reading them would synchronise with the device.
inline void check_rows_in_range(const char* op, const char* name, const Tensor& rows /* int64, contiguous */,
                                int64_t num_rows, int64_t lowest = 0) {
  const int64_t* values = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    SSLFAST_CHECK(values[i] >= lowest && values[i] < num_rows, op, ": ", name, " must be in [", lowest, ", ", num_rows,
                  "), got ", values[i], " at flat position ", i, "; these are rows of bank");
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
  check_memory(op, "step", *step_tensor);
  check_same_device(op, "step", *step_tensor, "index", index);
}

}  // namespace sslfast
