#include "ema_update_.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>

#include "common/simd.h"

namespace sslfast {
namespace {

// Below this a thread costs more than it saves: about 0.4 MB of fp32 traffic.
constexpr int64_t kGrain = 32768;

template <typename T_, typename F_>
struct Types {
  using T = T_;
  using F = F_;
};

template <typename P>
struct Range {
  typename P::T* target;        // [count]
  const typename P::F* source;  // [count]
  int64_t count;
  double weight;
};

template <typename P>
SSLFAST_INLINE void update_range_body(const Range<P>& range) {
  using T = typename P::T;
  using A = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<typename P::F, double>, double, float>;
  T* target = range.target;  // may equal source: element i is read before it is written
  const typename P::F* source = range.source;
  const A weight = static_cast<A>(range.weight);
#pragma omp simd
  for (int64_t i = 0; i < range.count; ++i) {
    target[i] = static_cast<T>(move_toward<A>(static_cast<A>(target[i]), static_cast<A>(source[i]), weight));
  }
}
SSLFAST_MULTIVERSION(update_range, update_range_body, const Range<T>&)

void update_part(const Span& span, int64_t begin, int64_t end, double weight) {
  SSLFAST_DISPATCH_FLOAT(span.target_type, "ema_update_", [&] {
    using target_t = scalar_t;
    SSLFAST_DISPATCH_FLOAT(span.source_type, "ema_update_", [&] {
      update_range<Types<target_t, scalar_t>>({static_cast<target_t*>(span.target) + begin,
                                               static_cast<const scalar_t*>(span.source) + begin, end - begin, weight});
    });
  });
}

double host_momentum(const std::optional<Tensor>& tensor, double momentum) {
  if (!tensor) return momentum;
  const void* data = tensor->const_data_ptr();
  const double value = tensor->scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                                   : *static_cast<const float*>(data);
  SSLFAST_CHECK(value >= 0 && value <= 1, "ema_update_: momentum must be in [0, 1], got a tensor of ", value);
  return value;
}

// Threads share the elements of all tensors laid end to end, so that many small tensors cost no more than one.
void ema_update_cpu(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                    const std::optional<Tensor>& momentum_tensor, double momentum) {
  check_ema_update(targets, sources, momentum_tensor, momentum);
  const double weight = 1 - host_momentum(momentum_tensor, momentum);
  Plan plan = plan_ema_update(targets, sources);
  std::vector<int64_t> starts;  // position of each span's first element, and the end
  starts.reserve(plan.spans.size() + 1);
  starts.push_back(0);
  for (const Span& span : plan.spans) starts.push_back(starts.back() + span.elements);
  torch::stable::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t s = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; s < plan.spans.size() && starts[s] < end; ++s) {
      update_part(plan.spans[s], std::max(begin, starts[s]) - starts[s], std::min(end, starts[s + 1]) - starts[s],
                  weight);
    }
  });
  finish(plan);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&sslfast::ema_update_cpu));
}
