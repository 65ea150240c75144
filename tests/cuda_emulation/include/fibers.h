// The threads of one block as fibers on one OS thread. A fiber runs until it must wait for others; the next one is
// drawn from `order`, so that a missing barrier shows as a wrong result. What would hang or be undefined on a device
// is an error that names thread and line: threads at different barriers, exits while others wait, endless
// spinning, addresses outside of memory.
#pragma once

#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cuda_emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t(1) << 18;
constexpr size_t kSharedBytes = 227 * 1024;  // the limit of a block on the larger devices
constexpr size_t kSharedMargin = 4096;       // behind it, which no kernel may write to
constexpr int kPoison = 0xff;                // NaN in every float format, -1 as an integer
constexpr int64_t kSpins = 1 << 20;          // of all threads, without progress in between

// A line of a kernel; the default arguments of the intrinsics fill it in.
struct Site {
  const char* what = "";
  const char* function = "";
  const char* file = "";
  int line = 0;

  bool operator==(const Site& other) const {
    return line == other.line && (what == other.what || strcmp(what, other.what) == 0) &&
           (file == other.file || strcmp(file, other.file) == 0);
  }
  std::string words() const {
    return std::string(what) + " in " + function + " (" + (strrchr(file, '/') ? strrchr(file, '/') + 1 : file) + ":" +
           std::to_string(line) + ")";
  }
};

#define SSLFAST_SITE \
  const char *function = __builtin_FUNCTION(), const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SSLFAST_HERE(what)     \
  ::cuda_emulation::Site {     \
    what, function, file, line \
  }

// A wait: of the lanes in `mask` of one warp, or of `count` threads at barrier `barrier`.
struct Wait {
  Site site;
  unsigned mask = 0;
  int barrier = -1;
  int count = 0;
  void* lane = nullptr;  // the waiting lane's operands and result

  bool meets(const Wait& other) const {
    if (barrier != other.barrier || count != other.count || mask != other.mask) return false;
    return barrier > 0 || site == other.site;  // named barriers may be met from different lines
  }
};

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  jmp_buf context;
  dim3 thread;
  int number = 0;
  State state = State::kDone;
  Wait wait;
  void* stack = nullptr;
  std::shared_ptr<void> copies;  // what tensor_cores.h keeps for a thread
};

struct Settings {
  uint64_t order = 0;  // 0: as numbered; 1: last comes first; otherwise a seed
  int multiprocessors = 2;
  int compute_capability = 80;
};

struct Machine {
  Settings settings;
  std::mutex mutex;
  std::mt19937_64 random;
  std::deque<Fiber> fibers;  // grows to the largest block, stacks are kept
  std::vector<void*> free_stacks;
  std::deque<int> ready;
  int next = -1;  // runs before those in `ready`
  int threads = 0;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string op, failure;
  int64_t spins = 0, launches = 0;
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  std::shared_ptr<void> block_state;  // what warpgroup.h keeps for a block
  int arrived[16] = {};               // threads at a barrier of the block that do not wait there
};
inline Machine machine;
inline std::string (*end_of_block)() = nullptr;  // reports what a finished block left pending

inline std::string words(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
inline std::string where(const Fiber& fiber) {
  return "thread " + words(fiber.thread) + " of block " + words(blockIdx);
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error(what + ", " + where(*machine.current));
}

inline int pick_ready() {
  Machine& m = machine;
  if (m.next >= 0) return std::exchange(m.next, -1);
  size_t position = 0;
  if (m.settings.order == 1) position = m.ready.size() - 1;
  if (m.settings.order > 1) position = m.random() % m.ready.size();
  std::swap(m.ready[position], position == 0 ? m.ready.front() : m.ready.back());
  const int number = position == 0 ? m.ready.front() : m.ready.back();
  position == 0 ? m.ready.pop_front() : m.ready.pop_back();
  return number;
}

[[noreturn]] inline void enter(int number) {
  machine.current = &machine.fibers[number];
  threadIdx = machine.current->thread;
  _longjmp(machine.current->context, 1);
}

// Switches to the next fiber, or back to the scheduler. noipa: threadIdx and everything else may be another's before
// and is this fiber's after the call.
__attribute__((noipa)) inline void suspend() {
  Machine& m = machine;
  if (_setjmp(m.current->context) != 0) return;
  if (m.ready.empty() || !m.failure.empty()) _longjmp(m.scheduler, 1);
  enter(pick_ready());
}

inline void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  machine.ready.push_back(fiber.number);
}

// Lets others run; for loops that wait for memory to change.
inline void yield(Site site) {
  Machine& m = machine;
  if (++m.spins > kSpins) fail("spins without end at " + site.words());
  m.current->state = State::kReady;
  m.current->wait.site = site;
  if (m.settings.order == 1) {
    m.ready.push_front(m.current->number);
  } else {
    m.ready.push_back(m.current->number);
  }
  suspend();
}
inline void progress() {
  machine.spins = 0;
}

// In drawn orders, operations that do not wait may yield too.
inline void dawdle(Site site) {
  if (machine.settings.order < 2) return;
  for (uint64_t n = machine.random() % 4; n > 0; --n) yield(site);
}

// In drawn orders, half of the time: goes straight to a thread that spins at `what`, which may find its wait over.
inline void let_waiters_go(const char* what) {
  Machine& m = machine;
  if (m.settings.order < 2 || m.random() % 2 == 0) return;
  for (auto it = m.ready.begin(); it != m.ready.end(); ++it) {
    if (strcmp(m.fibers[*it].wait.site.what, what) != 0) continue;
    m.next = *it;
    m.ready.erase(it);
    make_ready(*m.current);
    suspend();
    return;
  }
}

// Blocks until `needed` of the partners have come, calling thread included; the last one runs `complete` on their
// operands and frees them.
template <typename Complete>
void meet(const Wait& wait, const int* partners, int count, int needed, const Complete& complete) {
  Machine& m = machine;
  Fiber& self = *m.current;
  self.wait = wait;
  int present = 0, absent = 0;
  for (int i = 0; i < count && absent <= count - needed; ++i) {
    const Fiber& other = m.fibers[partners[i]];
    const bool here = &other == &self || (other.state == State::kWaiting && other.wait.meets(wait));
    ++(here ? present : absent);
  }
  if (present < needed) {
    self.state = State::kWaiting;
    suspend();
    return;
  }
  complete();
  progress();
  for (int i = 0; i < count; ++i) {
    Fiber& other = m.fibers[partners[i]];
    if (&other != &self && other.state == State::kWaiting && other.wait.meets(wait)) make_ready(other);
  }
  if (m.settings.order != 0) {
    make_ready(self);
    suspend();
  }
}

// combine(Lane* lanes[32]) sees every participating lane's operands (null elsewhere) and writes their results.
template <typename Lane, typename Combine>
void warp_collective(Site site, unsigned mask, Lane& mine, const Combine& combine) {
  Machine& m = machine;
  const int warp = m.current->number / kWarp * kWarp;
  int partners[kWarp], count = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (warp + lane >= m.threads) fail(site.words() + " names lane " + std::to_string(lane) + ", which does not exist");
    partners[count++] = warp + lane;
  }
  if (!(mask >> (m.current->number - warp) & 1)) fail(site.words() + " has a mask without the calling lane");
  meet(Wait{site, mask, -1, 0, &mine}, partners, count, count, [&] {
    Lane* lanes[kWarp] = {};
    for (int i = 0; i < count; ++i) lanes[partners[i] - warp] = static_cast<Lane*>(m.fibers[partners[i]].wait.lane);
    combine(lanes);
  });
}

// Barrier 0 is __syncthreads: all threads, one line. Others are met by any `count` threads, some of which may have
// arrived without waiting.
inline void block_barrier(Site site, int barrier, int count) {
  static int everyone[1024];
  for (int i = 0; i < machine.threads; ++i) everyone[i] = i;
  int& arrived = machine.arrived[barrier];
  meet(Wait{site, 0, barrier, count, nullptr}, everyone, machine.threads, count - arrived, [&] { arrived = 0; });
}
inline void arrive_at_barrier(Site site, int barrier, int count) {
  Machine& m = machine;
  const Wait wait{site, 0, barrier, count, nullptr};
  const auto waits = [&](const Fiber& fiber) { return fiber.state == State::kWaiting && fiber.wait.meets(wait); };
  int present = ++m.arrived[barrier];
  for (int i = 0; i < m.threads; ++i) present += waits(m.fibers[i]) ? 1 : 0;
  progress();
  if (present < count) return;
  if (present > count) fail(site.words() + " once too often");
  m.arrived[barrier] = 0;
  for (int i = 0; i < m.threads; ++i) {
    if (waits(m.fibers[i])) make_ready(m.fibers[i]);
  }
}

inline void fiber_main() {
  for (;;) {
    Fiber& self = *machine.current;
    try {
      (*machine.kernel)();
    } catch (const std::exception& error) {
      if (machine.failure.empty()) machine.failure = error.what();
    }
    self.state = State::kDone;
    progress();
    suspend();
  }
}

__attribute__((noipa)) inline void resume(int number) {
  if (_setjmp(machine.scheduler) == 0) enter(number);
}

__attribute__((noipa)) inline void make_fiber() {
  Machine& m = machine;
  if (m.free_stacks.empty()) {
    void* fresh =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fresh == MAP_FAILED) throw std::runtime_error("emulation: no memory for a stack");
    mprotect(fresh, 4096, PROT_NONE);
    m.free_stacks.push_back(fresh);
  }
  void* stack = m.free_stacks.back();
  m.free_stacks.pop_back();
  m.fibers.emplace_back();
  m.fibers.back().stack = stack;
  Fiber& fiber = m.fibers.back();
  fiber.number = static_cast<int>(m.fibers.size()) - 1;
  // The context starts inside suspend's twin: it saves itself and goes back, and the first resume enters fiber_main.
  static jmp_buf created;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  m.current = &fiber;
  makecontext(
      &context,
      +[] {
        if (_setjmp(machine.current->context) == 0) _longjmp(created, 1);
        fiber_main();
      },
      0);
  if (_setjmp(created) == 0) setcontext(&context);
}

// After a failure: fibers in the middle of a kernel are never resumed.
inline void forget_fibers() {
  Machine& m = machine;
  for (const Fiber& fiber : m.fibers) m.free_stacks.push_back(fiber.stack);
  m.fibers.clear();
}

inline std::string describe_deadlock() {
  const Machine& m = machine;
  std::string text = "threads wait for each other";
  std::vector<std::pair<std::string, std::pair<int, const Fiber*>>> groups;  // by what they wait for
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    const std::string what = fiber.state == State::kDone ? "exited" : "wait at " + fiber.wait.site.words();
    auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == what; });
    if (found == groups.end()) {
      groups.push_back({what, {1, &fiber}});
    } else {
      ++found->second.first;
    }
  }
  for (const auto& [what, group] : groups) {
    text += "; " + std::to_string(group.first) + " (the first " + where(*group.second) + ") " + what;
  }
  return text;
}

// Thread-local storage of this binary: the static shared memory of all its kernels.
inline std::pair<void*, size_t> static_shared() {
  static thread_local char anchor = 0;
  struct Found {
    const char* code;
    void* data;
    size_t bytes;
  } found{reinterpret_cast<const char*>(&static_shared), nullptr, 0};
  asm volatile("" ::"r"(&anchor) : "memory");  // allocates it for this OS thread
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* pointer) {
        Found* f = static_cast<Found*>(pointer);
        bool mine = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& h = info->dlpi_phdr[i];
          const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + h.p_vaddr);
          mine |= h.p_type == PT_LOAD && f->code >= begin && f->code < begin + h.p_memsz;
        }
        for (int i = 0; mine && i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS) *f = {f->code, info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
        }
        return mine ? 1 : 0;
      },
      &found);
  if (found.data == nullptr) throw std::runtime_error("emulation: static shared memory was not found");
  return {found.data, found.bytes};
}

inline void handle_signal(int number, siginfo_t* info, void*) {
  char text[200];
  if (number == SIGILL) {
    snprintf(text, sizeof(text),
             "misaligned address, index outside of an array or integer overflow (instruction %p; gdb: info line *%p)",
             info->si_addr, info->si_addr);
  } else {
    snprintf(text, sizeof(text), "illegal memory access at %p", info->si_addr);
  }
  machine.failure = std::string(text) + ", " + where(*machine.current);
  _longjmp(machine.scheduler, 2);
}

// While a kernel runs, faults are its own and become errors.
class FaultHandler {
 public:
  FaultHandler() : stack_(1 << 16) {
    stack_t mine{};
    mine.ss_sp = stack_.data();
    mine.ss_size = stack_.size();
    sigaltstack(&mine, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = handle_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandler() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGILL};
  std::vector<char> stack_;
  stack_t old_stack_;
  struct sigaction old_[3];
};

inline void run_block() {
  Machine& m = machine;
  const auto [shared, bytes] = static_shared();
  memset(shared, kPoison, bytes);
  if (m.dynamic_bytes > 0) memset(m.dynamic_shared, kPoison, m.dynamic_bytes + kSharedMargin);
  m.block_state.reset();
  std::fill(std::begin(m.arrived), std::end(m.arrived), 0);
  m.ready.clear();
  m.next = -1;
  m.spins = 0;
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.copies.reset();
    make_ready(fiber);
  }
  while (!m.ready.empty() && m.failure.empty()) resume(pick_ready());
  for (int i = 0; i < m.threads && m.failure.empty(); ++i) {
    if (m.fibers[i].state != State::kDone) m.failure = describe_deadlock();
  }
  for (int i = 0; i < 16 && m.failure.empty(); ++i) {
    if (m.arrived[i] != 0) m.failure = "barrier " + std::to_string(i) + " is left with arrivals that no thread met";
  }
  if (m.failure.empty() && end_of_block != nullptr) m.failure = end_of_block();
}

}  // namespace cuda_emulation
