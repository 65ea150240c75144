#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "ema_update_.h"

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 4;  // of target and source in flight per thread
constexpr uint32_t kChunk = kThreads * kQuads * 4;
constexpr int64_t kMaxElements = int64_t(1) << 30;  // of one entry, whole chunks; longer tensors take several
constexpr int kMaxEntries = 168;                    // as many as 4 KiB hold: ResNet-50's 161 tensors are one launch

// All inputs are kernel arguments: no copy to the device, no scratch memory, and a captured graph holds its own copy.
// Every driver supports 4 KiB.
struct Arguments {
  void* target[kMaxEntries];
  const void* source[kMaxEntries];
  uint32_t elements[kMaxEntries];
  uint32_t chunk_end[kMaxEntries];  // chunks of this entry and of all before it
  const void* momentum_tensor;      // [] fp32 or fp64, or null
  double momentum;
  int count;
  bool momentum_is_double;
};
static_assert(sizeof(Arguments) <= 4096);
static_assert(kMaxElements % kChunk == 0);

__device__ __forceinline__ double read_momentum(const Arguments& arguments) {
  if (arguments.momentum_tensor == nullptr) return arguments.momentum;
  const double momentum = arguments.momentum_is_double ? *static_cast<const double*>(arguments.momentum_tensor)
                                                       : *static_cast<const float*>(arguments.momentum_tensor);
  if (!(momentum >= 0 && momentum <= 1)) __trap();
  return momentum;
}

// One block updates one chunk of one tensor, which it finds by bisection in chunk_end. Whole aligned chunks are
// processed as quads, all loads before the first store; the rest element by element. target may equal source: every
// element is read before it is written, by the thread that writes it.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(const __grid_constant__ Arguments arguments) {
  using A = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<F, double>, double, float>;
  int entry = 0;
  for (int last = arguments.count - 1; entry < last;) {
    const int middle = (entry + last) / 2;
    if (arguments.chunk_end[middle] <= blockIdx.x) {
      entry = middle + 1;
    } else {
      last = middle;
    }
  }
  const uint32_t chunk = blockIdx.x - (entry > 0 ? arguments.chunk_end[entry - 1] : 0);
  const uint32_t begin = chunk * kChunk;
  const uint32_t count = min(kChunk, arguments.elements[entry] - begin);
  T* target = static_cast<T*>(arguments.target[entry]) + begin;
  const F* source = static_cast<const F*>(arguments.source[entry]) + begin;
  const A weight = static_cast<A>(1 - read_momentum(arguments));

  if (count == kChunk && is_quad_aligned(target) && is_quad_aligned(source)) {
    Quad<T> targets[kQuads];
    Quad<F> sources[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int first = (q * kThreads + threadIdx.x) * 4;
      targets[q] = *reinterpret_cast<const Quad<T>*>(target + first);
      sources[q] = *reinterpret_cast<const Quad<F>*>(source + first);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        targets[q].x[i] =
            static_cast<T>(move_toward<A>(static_cast<A>(targets[q].x[i]), static_cast<A>(sources[q].x[i]), weight));
      }
      *reinterpret_cast<Quad<T>*>(target + (q * kThreads + threadIdx.x) * 4) = targets[q];
    }
  } else {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      target[i] = static_cast<T>(move_toward<A>(static_cast<A>(target[i]), static_cast<A>(source[i]), weight));
    }
  }
}

// Spans of one pair of dtypes, kMaxEntries to a launch.
template <typename T, typename F>
void launch_all(const std::vector<Span>& spans, ScalarType target_type, ScalarType source_type, Arguments& arguments,
                cudaStream_t stream) {
  arguments.count = 0;
  uint32_t chunks = 0;
  const auto flush = [&] {
    if (arguments.count == 0) return;
    launch_kernel("ema_update_", ema_update_kernel<T, F>, chunks, kThreads, 0, stream, arguments);
    arguments.count = 0;
    chunks = 0;
  };
  for (const Span& span : spans) {
    if (span.target_type != target_type || span.source_type != source_type) continue;
    for (int64_t begin = 0; begin < span.elements; begin += kMaxElements) {
      const int64_t elements = std::min(kMaxElements, span.elements - begin);
      const int entry = arguments.count++;
      arguments.target[entry] = static_cast<T*>(span.target) + begin;
      arguments.source[entry] = static_cast<const F*>(span.source) + begin;
      arguments.elements[entry] = static_cast<uint32_t>(elements);
      chunks += static_cast<uint32_t>((elements + kChunk - 1) / kChunk);
      arguments.chunk_end[entry] = chunks;
      if (arguments.count == kMaxEntries) flush();
    }
  }
  flush();
}

void ema_update_cuda(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                     const std::optional<Tensor>& momentum_tensor, double momentum) {
  check_ema_update(targets, sources, momentum_tensor, momentum);
  if (targets.empty()) return;
  const DeviceGuard guard(targets[0].get_device_index());
  const cudaStream_t stream = current_stream(targets[0].get_device_index());
  Plan plan = plan_ema_update(targets, sources);
  Arguments arguments;
  arguments.momentum_tensor = momentum_tensor ? momentum_tensor->const_data_ptr() : nullptr;
  arguments.momentum_is_double = momentum_tensor && momentum_tensor->scalar_type() == ScalarType::Double;
  arguments.momentum = momentum;

  std::vector<std::pair<ScalarType, ScalarType>> pairs;  // of dtypes, in order of appearance; nearly always one
  for (const Span& span : plan.spans) {
    const std::pair pair(span.target_type, span.source_type);
    if (std::find(pairs.begin(), pairs.end(), pair) == pairs.end()) pairs.push_back(pair);
  }
  for (const std::pair<ScalarType, ScalarType>& pair : pairs) {
    const ScalarType target_type = pair.first, source_type = pair.second;
    SSLFAST_DISPATCH_FLOAT(target_type, "ema_update_", [&] {
      using target_t = scalar_t;
      SSLFAST_DISPATCH_FLOAT(source_type, "ema_update_", [&] {
        launch_all<target_t, scalar_t>(plan.spans, target_type, source_type, arguments, stream);
      });
    });
  }
  finish(plan);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&sslfast::ema_update_cuda));
}
