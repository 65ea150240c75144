// ema_update_: checks, the flat memory of the tensors, and the arithmetic of one element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/philox.h"  // SSLFAST_HD

namespace sslfast {

// target + weight * (source - target), written so that weight 0, weight 1 and source == target are exact.
template <typename A>
SSLFAST_HD A move_toward(A target, A source, A weight) {
  const A difference = source - target;
  return weight < A(0.5) ? target + weight * difference : source - (A(1) - weight) * difference;
}

// One pair of tensors as flat memory: element i of target belongs to element i of source.
struct Span {
  void* target;
  const void* source;
  int64_t elements;
  ScalarType target_type, source_type;
};

struct Plan {
  std::vector<Span> spans;                            // none empty
  std::vector<Tensor> copies;                         // keeps the memory of contiguous copies
  std::vector<std::pair<Tensor, Tensor>> write_back;  // targets that are not flat, and their contiguous copies
};

// Elements of t are distinct in memory and have no gaps between them, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dimensions(t)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether elements of t may share memory: not if every stride exceeds the span of the smaller ones.
inline bool may_overlap_itself(const Tensor& t) {
  if (t.numel() == 0) return false;
  int64_t span = 1;
  for (const auto& [stride, size] : sorted_dimensions(t)) {
    if (stride < span) return true;
    span += (size - 1) * stride;
  }
  return false;
}

// Strides of dimensions of size 1 are arbitrary: those of channels_last 1x1 weights differ from contiguous ones.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline bool is_flat_pair(const Tensor& target, const Tensor& source) {
  return (target.is_contiguous() && source.is_contiguous()) || (is_dense(target) && same_strides(target, source));
}

inline void check_ema_pair(size_t i, const Tensor& target, const Tensor& source, const Tensor& first) {
  constexpr const char* op = "ema_update_";
  for (const auto& [list, t] : {std::pair("targets", &target), std::pair("sources", &source)}) {
    SSLFAST_CHECK(is_floating(t->scalar_type()), op, ": ", list, "[", i, "] must be fp32, fp64, bf16 or fp16, got ",
                  torch::headeronly::toString(t->scalar_type()),
                  "; leave integer buffers such as num_batches_tracked out and copy them with target.copy_(source)");
    check_memory(op, (std::string(list) + "[" + std::to_string(i) + "]").c_str(), *t);
    SSLFAST_CHECK(t->is_cuda() == first.is_cuda() && t->get_device_index() == first.get_device_index(), op, ": ", list,
                  "[", i, "] and targets[0] must be on the same device; move one of them with .to(device)");
  }
  bool same_shape = target.dim() == source.dim();
  for (int64_t d = 0; same_shape && d < target.dim(); ++d) same_shape = target.size(d) == source.size(d);
  SSLFAST_CHECK(same_shape, op, ": sources[", i, "] must have shape ", shape_string(target), " as targets[", i,
                "], got ", shape_string(source));
  SSLFAST_CHECK(!may_overlap_itself(target), op, ": targets[", i,
                "] is expanded or overlaps itself, several of its elements share memory; pass a .clone()");
}

// Elements shared by two tensors would be updated, or read after an update, in an order that depends on threads. A
// source may be its own target.
inline void check_lists_apart(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources) {
  struct Entry {
    Memory memory;
    size_t i;
    bool written;
  };
  std::vector<Entry> entries;
  entries.reserve(targets.size() + sources.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i].numel() == 0) continue;
    entries.push_back({Memory(targets[i]), i, true});
    entries.push_back({Memory(sources[i]), i, false});
  }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.memory.begin < b.memory.begin; });
  std::vector<const Entry*> open;  // of those before, the ones that reach past the start of the current one
  for (const Entry& entry : entries) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](const Entry* before) { return before->memory.end <= entry.memory.begin; }),
               open.end());
    for (const Entry* before : open) {
      if (!(before->written || entry.written) || !before->memory.may_share(entry.memory)) continue;
      SSLFAST_CHECK(!(before->written && entry.written), "ema_update_: targets[", std::min(before->i, entry.i),
                    "] and targets[", std::max(before->i, entry.i), "] share memory; pass tied weights once");
      const size_t target = before->written ? before->i : entry.i, source = before->written ? entry.i : before->i;
      const bool own = target == source && before->memory.begin == entry.memory.begin &&
                       targets[target].element_size() == sources[source].element_size() &&
                       same_strides(targets[target], sources[source]);
      SSLFAST_CHECK(own, "ema_update_: sources[", source, "] and targets[", target,
                    "] share memory; pass a .clone() of the source");
    }
    open.push_back(&entry);
  }
}

inline void check_ema_update(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                             const std::optional<Tensor>& momentum_tensor, double momentum) {
  constexpr const char* op = "ema_update_";
  SSLFAST_CHECK(targets.size() == sources.size(), op, ": as many sources as targets are needed, got ", targets.size(),
                " and ", sources.size());
  SSLFAST_CHECK(momentum >= 0 && momentum <= 1, op, ": momentum must be in [0, 1], got ", momentum);
  for (size_t i = 0; i < targets.size(); ++i) check_ema_pair(i, targets[i], sources[i], targets[0]);
  if (momentum_tensor) {
    SSLFAST_CHECK(momentum_tensor->dim() == 0 && (momentum_tensor->scalar_type() == ScalarType::Float ||
                                                  momentum_tensor->scalar_type() == ScalarType::Double),
                  op, ": momentum must be a float or a 0-d fp32 or fp64 tensor, got ",
                  torch::headeronly::toString(momentum_tensor->scalar_type()), " of shape ",
                  shape_string(*momentum_tensor));
    check_memory(op, "momentum", *momentum_tensor);
    if (!targets.empty()) check_same_device(op, "momentum", *momentum_tensor, "targets[0]", targets[0]);
    for (size_t i = 0; i < targets.size(); ++i) {
      check_apart(op, ("targets[" + std::to_string(i) + "]").c_str(), targets[i], "momentum", *momentum_tensor);
    }
  }
  check_lists_apart(targets, sources);
}

// Pairs of dense tensors with equal strides (contiguous, channels_last) are flat as they are; others go through
// contiguous copies, targets back again in finish().
inline Plan plan_ema_update(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources) {
  Plan plan;
  plan.spans.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (target.numel() == 0) continue;
    if (!is_flat_pair(target, source)) {
      source = readable("ema_update_", "sources", source);
      if (!target.is_contiguous()) {
        target = readable("ema_update_", "targets", target);
        plan.write_back.emplace_back(targets[i], target);
      }
      plan.copies.push_back(source);
    }
    plan.spans.push_back({target.mutable_data_ptr(), source.const_data_ptr(), target.numel(), target.scalar_type(),
                          source.scalar_type()});
  }
  return plan;
}

inline void finish(Plan& plan) {
  for (auto& [target, copy] : plan.write_back) torch::stable::copy_(target, copy);
}

}  // namespace sslfast
