// Host implementation of csrc/common/launch.cuh: launch_kernel runs a grid's blocks one after another (in an order
// drawn from the settings) and a block's threads as fibers. And of the intrinsics that kernels use.
#pragma once

#include <fibers.h>
#include <guarded.h>
#include <tensor_cores.h>
#include <warpgroup.h>

namespace sslfast {

// Lives as long as an op's host code: the tensors that the op makes are watched until it ends.
struct DeviceGuard {
  explicit DeviceGuard(int32_t) { cuda_emulation::guarded_tensors.clear(); }
  ~DeviceGuard() { cuda_emulation::guarded_tensors.clear(); }
};

inline cudaStream_t current_stream(int32_t) {
  return nullptr;
}
inline int multiprocessors() {
  return cuda_emulation::machine.settings.multiprocessors;
}
template <typename Kernel>
int blocks_per_multiprocessor(Kernel, int, size_t) {
  return 2;
}
inline int compute_capability() {
  return cuda_emulation::machine.settings.compute_capability;
}
inline int64_t shared_memory_limit() {
  const int capability = cuda_emulation::machine.settings.compute_capability;
  const bool is_large = capability == 90 || capability == 100;
  return is_large ? int64_t(cuda_emulation::kSharedBytes) : (capability == 80 ? 163 : 99) * 1024;
}
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_emulation::machine.dynamic_shared);
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* op, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments&&... arguments) {
  using namespace cuda_emulation;
  Machine& m = machine;
  const std::lock_guard<std::mutex> lock(m.mutex);
  const auto check = [&](bool good, const char* what) {
    if (!good) throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + what);
  };
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  check(threads >= 1 && threads <= 1024, "a block must have 1 to 1024 threads");
  check(grid.x >= 1 && grid.y >= 1 && grid.z >= 1, "the grid is empty");
  check(grid.x < (1u << 31) && grid.y < 65536 && grid.z < 65536, "the grid is too large");
  check(static_cast<int64_t>(shared_bytes) <= shared_memory_limit(), "too much dynamic shared memory");
  if (m.dynamic_shared == nullptr) m.dynamic_shared = static_cast<unsigned char*>(aligned_alloc(1024, 256 * 1024));
  m.dynamic_bytes = shared_bytes;
  m.op = op;
  m.threads = static_cast<int>(threads);
  m.random.seed(m.settings.order + 1000 * ++m.launches);
  m.failure.clear();
  while (m.fibers.size() < threads) make_fiber();

  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  const std::function<void()> run = [&] { std::apply(kernel, values); };
  m.kernel = &run;
  gridDim = grid, blockDim = block;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  // A step coprime to the number of blocks visits each once.
  uint64_t step = m.settings.order == 0 ? 1 : m.random() % blocks + 1;
  while (std::gcd(step, blocks) != 1) ++step;
  uint64_t number = m.settings.order == 0 ? 0 : m.random() % blocks;
  {
    const FaultHandler handler;
    for (uint64_t i = 0; i < blocks && m.failure.empty(); ++i, number = (number + step) % blocks) {
      blockIdx = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y));
      run_block();
      for (size_t j = 0; shared_bytes > 0 && j < kSharedMargin && m.failure.empty(); ++j) {
        if (m.dynamic_shared[shared_bytes + j] != kPoison) {
          m.failure = "write past the dynamic shared memory, block " + words(blockIdx);
        }
      }
    }
  }
  if (m.failure.empty()) m.failure = find_damage();
  if (m.failure.empty()) return;
  forget_fibers();
  throw std::runtime_error(m.op + ": " + m.failure);
}

}  // namespace sslfast

// Sets the properties of the emulated device; called by tests.
extern "C" __attribute__((visibility("default"))) inline void cuda_emulation_configure(uint64_t order,
                                                                                       int multiprocessors,
                                                                                       int compute_capability) {
  cuda_emulation::machine.settings = {order, multiprocessors, compute_capability};
}
// An unused inline function would not be in the library.
__attribute__((used)) inline void* const cuda_emulation_exports = reinterpret_cast<void*>(&cuda_emulation_configure);

[[noreturn]] inline void __trap(SSLFAST_SITE) {
  cuda_emulation::fail(SSLFAST_HERE("device trap").words());
}
inline void __syncthreads(SSLFAST_SITE) {
  cuda_emulation::block_barrier(SSLFAST_HERE("__syncthreads"), 0, cuda_emulation::machine.threads);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, SSLFAST_SITE) {
  cuda_emulation::yield(SSLFAST_HERE("__nanosleep"));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SSLFAST_SITE) {
  char nothing = 0;
  cuda_emulation::warp_collective(SSLFAST_HERE("__syncwarp"), mask, nothing, [](char**) {});
}

namespace cuda_emulation {

inline int lane_of(const Fiber& fiber) {
  return fiber.number % kWarp;
}

// Every lane gets the value of lane source(lane) of its group of `width` lanes, its own where that is outside.
template <typename T, typename Source>
T shuffle(Site site, unsigned mask, T value, int width, const Source& source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  struct Lane {
    T value, result;
    int from;
  };
  const int lane = lane_of(*machine.current);
  Lane mine{value, value, source(lane, lane / width * width)};
  warp_collective(site, mask, mine, [&](Lane** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i] == nullptr) continue;
      if (lanes[lanes[i]->from] == nullptr) {
        fail(site.words() + " reads lane " + std::to_string(lanes[i]->from) + ", which takes no part");
      }
      lanes[i]->result = lanes[lanes[i]->from]->value;
    }
  });
  return mine.result;
}

inline unsigned ballot(Site site, unsigned mask, bool predicate) {
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_collective(site, mask, mine, [](Lane** lanes) {
    unsigned result = 0;
    for (int i = 0; i < kWarp; ++i) result |= (lanes[i] != nullptr && lanes[i]->predicate ? 1u : 0u) << i;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i] != nullptr) lanes[i]->result = result;
    }
  });
  return mine.result;
}

}  // namespace cuda_emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, SSLFAST_SITE) {
  return cuda_emulation::shuffle(SSLFAST_HERE("__shfl_sync"), mask, value, width,
                                 [=](int, int group) { return group + (from & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, SSLFAST_SITE) {
  return cuda_emulation::shuffle(SSLFAST_HERE("__shfl_xor_sync"), mask, value, width, [=](int lane, int group) {
    return (lane ^ flip) < group + width ? lane ^ flip : lane;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SSLFAST_SITE) {
  return cuda_emulation::shuffle(SSLFAST_HERE("__shfl_down_sync"), mask, value, width, [=](int lane, int group) {
    return lane + static_cast<int>(by) < group + width ? lane + static_cast<int>(by) : lane;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SSLFAST_SITE) {
  return cuda_emulation::shuffle(SSLFAST_HERE("__shfl_up_sync"), mask, value, width, [=](int lane, int group) {
    return lane - static_cast<int>(by) >= group ? lane - static_cast<int>(by) : lane;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SSLFAST_SITE) {
  return cuda_emulation::ballot(SSLFAST_HERE("__ballot_sync"), mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, SSLFAST_SITE) {
  return cuda_emulation::ballot(SSLFAST_HERE("__any_sync"), mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SSLFAST_SITE) {
  return cuda_emulation::ballot(SSLFAST_HERE("__all_sync"), mask, predicate != 0) == mask;
}
inline int __syncthreads_or(int predicate, SSLFAST_SITE) {
  static int any;
  cuda_emulation::block_barrier(SSLFAST_HERE("__syncthreads_or"), 0, cuda_emulation::machine.threads);
  any = 0;
  cuda_emulation::block_barrier(SSLFAST_HERE("__syncthreads_or 2"), 0, cuda_emulation::machine.threads);
  any |= predicate;
  cuda_emulation::block_barrier(SSLFAST_HERE("__syncthreads_or 3"), 0, cuda_emulation::machine.threads);
  return any != 0;
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;  // alignment is checked by -fsanitize=alignment
}

template <typename T, typename Change>
T atomic_change(T* address, const Change& change) {
  const T old = *address;
  *address = change(old);
  cuda_emulation::progress();
  return old;
}
template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return atomic_change(address, [=](T old) { return static_cast<T>(old + static_cast<T>(value)); });
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  return atomic_change(address, [=](T old) { return std::max(old, static_cast<T>(value)); });
}
template <typename T, typename U>
T atomicMin(T* address, U value) {
  return atomic_change(address, [=](T old) { return std::min(old, static_cast<T>(value)); });
}
template <typename T, typename U>
T atomicExch(T* address, U value) {
  return atomic_change(address, [=](T) { return static_cast<T>(value); });
}
template <typename T, typename U, typename W>
T atomicCAS(T* address, U expected, W value) {
  return atomic_change(address, [=](T old) { return old == static_cast<T>(expected) ? static_cast<T>(value) : old; });
}
