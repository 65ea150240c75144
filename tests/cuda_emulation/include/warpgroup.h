// The wrappers of csrc/common/wgmma.cuh on the host: barriers that count bytes, boxes that the copy engine delivers
// later, warpgroup products from 128-byte-swizzled shared memory. Products read shared memory when they are waited
// for (in odd orders: when the first thread issues them), accumulators hold NaN in between, and so does what was
// written unfenced.
#pragma once

#include <tensor_cores.h>

#include <map>

namespace cuda_emulation {

constexpr int kWarpgroup = 128;

struct Barrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  unsigned parity = 0;  // of the current phase

  void settle() {
    if (pending != 0 || bytes != 0) return;
    pending = count;
    parity ^= 1;
    progress();
  }
};

// A box in flight.
struct Box {
  unsigned char* to;
  const char* matrix;
  int64_t rows, columns;
  int box_rows, column, row;
  uint64_t* barrier;
};

// Shared memory as the copy engine and wgmma see it: what threads wrote and did not fence is missing.
inline std::vector<unsigned char> engine_memory;

struct Operand {
  uint64_t descriptor;
  bool along_k;  // rows of the matrix run along k

  // Bits of element (i, k), i counting along M or N [PTX ISA, matrix descriptor and canonical layouts].
  uint16_t at(int i, int k) const {
    const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    const uint32_t leading = field(16), stride = field(32);
    uint32_t address = field(0);
    if (along_k) {
      address += i / 8 * stride + i % 8 * 128 + k * 2;
    } else {
      address += i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128;
    }
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    const unsigned char* pointer = machine.dynamic_shared + (address - 2048);
    if (address < 2048 || pointer + 2 > machine.dynamic_shared + machine.dynamic_bytes) {
      fail("wgmma reads outside of shared memory");
    }
    memcpy(&bits, pointer, 2);
    constexpr uint16_t kNan = 0x7fff;
    return memcmp(pointer, engine_memory.data() + (address - 2048), 2) == 0 ? bits : kNan;
  }
};

struct Product {
  bool done = false, add = true, left_in_registers = false;
  int columns = 0;
  uint64_t left = 0, right = 0;
  uint32_t fragments[kWarpgroup][4];
  float* targets[kWarpgroup];
  float (*value)(uint16_t) = nullptr;
  std::vector<float> left_values, right_values;  // [64, 16] and [16, columns], once shared memory has been read

  void read() {
    if (!right_values.empty()) return;
    const Operand a{left, true}, b{right, !left_in_registers};
    for (int row = 0; row < 64 && !left_in_registers; ++row) {
      for (int k = 0; k < 16; ++k) left_values.push_back(value(a.at(row, k)));
    }
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < columns; ++n) right_values.push_back(value(b.at(n, k)));
    }
  }
};

struct WarpgroupThread {
  bool fenced = false;
  std::vector<std::shared_ptr<Product>> open;
  std::deque<std::vector<std::shared_ptr<Product>>> groups;
  std::map<float*, std::vector<float>> accumulators;  // the values of pending registers

  bool pending(const float* target, int thread) const {
    for (const auto& product : open) {
      if (product->targets[thread] == target) return true;
    }
    for (const auto& group : groups) {
      for (const auto& product : group) {
        if (product->targets[thread] == target) return true;
      }
    }
    return false;
  }
};

struct BlockState {
  std::map<uint64_t*, Barrier> barriers;
  std::deque<Box> boxes;
  std::map<int, WarpgroupThread> threads;
  std::map<int, std::shared_ptr<Product>> starting;  // by a warpgroup's first thread: not all threads have come yet
};
inline BlockState& block_state() {
  if (machine.block_state == nullptr) {
    machine.block_state = std::make_shared<BlockState>();
    engine_memory.assign(kSharedBytes, kPoison);
  }
  return *static_cast<BlockState*>(machine.block_state.get());
}

inline Barrier& barrier_at(Site site, uint64_t* address) {
  check_shared(site, address, 8, 8);
  const auto found = block_state().barriers.find(address);
  if (found == block_state().barriers.end()) fail(site.words() + " on a barrier that was not initialised");
  return found->second;
}

// The copy engine delivers one box: 128-byte lines, their 16-byte chunks moved as the address says, zeros outside.
inline void bring_a_box() {
  BlockState& block = block_state();
  if (block.boxes.empty()) return;
  const size_t which = machine.settings.order > 1 ? machine.random() % block.boxes.size() : 0;
  const Box box = block.boxes[which];
  block.boxes.erase(block.boxes.begin() + static_cast<std::ptrdiff_t>(which));
  for (int r = 0; r < box.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t row = int64_t(box.row) + r, column = int64_t(box.column) + c;
      const bool inside = row >= 0 && row < box.rows && column >= 0 && column < box.columns;
      uint16_t bits = 0;
      if (inside) memcpy(&bits, box.matrix + (row * box.columns + column) * 2, 2);
      uint32_t address = static_cast<uint32_t>(box.to - machine.dynamic_shared) + 2048 + r * 128 + c * 2;
      address ^= (address >> 7 & 7) << 4;
      memcpy(machine.dynamic_shared + (address - 2048), &bits, 2);
      memcpy(engine_memory.data() + (address - 2048), &bits, 2);
    }
  }
  Barrier& barrier = block.barriers.at(box.barrier);
  barrier.bytes -= box.box_rows * 128;
  barrier.settle();
}

inline void perform(Product& product, int first_thread) {
  if (product.done) return;
  product.done = true;
  product.read();
  if (product.left_in_registers) {
    for (int row = 0; row < 64; ++row) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t value = product.fragments[row / 16 * kWarp + a_lane(row % 16, k)][a_register(row % 16, k)];
        product.left_values.push_back(product.value(static_cast<uint16_t>(value >> 16 * (k % 2))));
      }
    }
  }
  const float *left = product.left_values.data(), *right = product.right_values.data();
  for (int row = 0; row < 64; ++row) {
    for (int n = 0; n < product.columns; ++n) {
      const int thread = row / 16 * kWarp + row % 8 * 4 + n % 8 / 2;
      WarpgroupThread& owner = block_state().threads[first_thread + thread];
      float& result = owner.accumulators.at(product.targets[thread])[n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += left[row * 16 + k] * right[k * product.columns + n];
      result = product.add ? result + sum : sum;
    }
  }
}

template <typename Tag, int kCount>
void issue(Site site, float (&d)[kCount], const uint32_t* a, uint64_t left, uint64_t right, bool add) {
  Machine& m = machine;
  const int first = m.current->number / kWarpgroup * kWarpgroup;
  WarpgroupThread& mine = block_state().threads[m.current->number];
  if (!mine.fenced) fail(site.words() + " without wgmma_fence before it");
  if (first + kWarpgroup > m.threads) fail(site.words() + " in an incomplete warpgroup");
  if (mine.accumulators.find(d) == mine.accumulators.end()) {
    mine.accumulators[d].assign(d, d + kCount);
    memset(d, kPoison, sizeof(d));
  }
  if (auto& product = block_state().starting[first]; product == nullptr) {
    product = std::make_shared<Product>();
    product->add = add;
    product->left_in_registers = a != nullptr;
    product->columns = kCount * 2;
    product->left = left, product->right = right;
    product->value = &from_bits<Tag>;
    // A warp that has arrived need not wait for the others.
    if (m.settings.order % 2 == 1) product->read();
  }
  struct Lane {
    float* d;
    const uint32_t* a;
    uint64_t left, right;
    bool add;
  } lane{d, a, left, right, add};
  int partners[kWarpgroup];
  for (int i = 0; i < kWarpgroup; ++i) partners[i] = first + i;
  meet(Wait{site, 0xffffffffu, -2, 0, &lane}, partners, kWarpgroup, kWarpgroup, [&] {
    const auto product = std::move(block_state().starting[first]);
    block_state().starting.erase(first);
    for (int i = 0; i < kWarpgroup; ++i) {
      const Lane& other = *static_cast<Lane*>(m.fibers[first + i].wait.lane);
      if (other.left != left || other.right != right || other.add != add) {
        fail(site.words() + " with other operands than thread " + words(m.fibers[first + i].thread));
      }
      product->targets[i] = other.d;
      if (a != nullptr) std::copy_n(other.a, 4, product->fragments[i]);
      block_state().threads[first + i].open.push_back(product);
    }
    if (m.settings.order % 2 == 1) perform(*product, first);
  });
}

inline void wait_for_products(size_t pending) {
  const int number = machine.current->number, first = number / kWarpgroup * kWarpgroup;
  WarpgroupThread& mine = block_state().threads[number];
  mine.fenced = false;
  while (mine.groups.size() > pending) {
    const auto group = std::move(mine.groups.front());
    mine.groups.pop_front();
    for (const auto& product : group) perform(*product, first);
    for (const auto& product : group) {
      float* target = product->targets[number - first];
      const auto held = mine.accumulators.find(target);
      if (held != mine.accumulators.end() && !mine.pending(target, number - first)) {
        std::copy(held->second.begin(), held->second.end(), target);
        mine.accumulators.erase(held);
      }
    }
  }
}

inline std::string what_is_left() {
  if (machine.block_state == nullptr) return "";
  const BlockState& block = block_state();
  if (!block.boxes.empty()) return "block " + words(blockIdx) + " ends while boxes are on their way";
  for (const auto& [number, thread] : block.threads) {
    if (!thread.accumulators.empty()) return where(machine.fibers[number]) + " ends while products are under way";
  }
  return "";
}
inline const bool what_is_left_is_checked = (end_of_block = &what_is_left, true);

}  // namespace cuda_emulation

namespace sslfast {

struct RowMap {
  const char* matrix;
  int64_t rows, columns;
  int box_rows;
};
template <typename Tag>
RowMap make_row_map(Tag, const void* matrix, int64_t rows, int64_t columns, int box_rows) {
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || columns % 8 != 0 || box_rows < 1 || box_rows > 256) {
    throw std::runtime_error("sslfast: cuTensorMapEncodeTiled failed");
  }
  return {static_cast<const char*>(matrix), rows, columns, box_rows};
}

inline void barrier_init(uint64_t* barrier, int count, SSLFAST_SITE) {
  cuda_emulation::check_shared(SSLFAST_HERE("mbarrier.init"), barrier, 8, 8);
  cuda_emulation::block_state().barriers[barrier] = {count, count, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes, SSLFAST_SITE) {
  cuda_emulation::Barrier& found = cuda_emulation::barrier_at(SSLFAST_HERE("mbarrier.arrive"), barrier);
  found.bytes += bytes;
  if (--found.pending < 0) cuda_emulation::fail(SSLFAST_HERE("mbarrier.arrive").words() + " once too often");
  found.settle();
  cuda_emulation::let_waiters_go("mbarrier.try_wait");
  cuda_emulation::dawdle(SSLFAST_HERE("mbarrier.arrive"));
}
inline void barrier_arrive(uint64_t* barrier, SSLFAST_SITE) {
  barrier_arrive_expecting(barrier, 0, function, file, line);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, SSLFAST_SITE) {
  const cuda_emulation::Site site = SSLFAST_HERE("mbarrier.try_wait");
  while (cuda_emulation::barrier_at(site, barrier).parity == parity) {
    cuda_emulation::bring_a_box();
    if (cuda_emulation::barrier_at(site, barrier).parity == parity) cuda_emulation::yield(site);
  }
}
inline void named_barrier_sync(int barrier, int threads, SSLFAST_SITE) {
  const cuda_emulation::Site site = SSLFAST_HERE("bar.sync");
  if (barrier < 0 || barrier > 15 || threads % 32 != 0) cuda_emulation::fail(site.words() + " with wrong numbers");
  cuda_emulation::block_barrier(site, barrier, threads);
}
inline void named_barrier_arrive(int barrier, int threads, SSLFAST_SITE) {
  const cuda_emulation::Site site = SSLFAST_HERE("bar.arrive");
  if (barrier < 1 || barrier > 15 || threads % 32 != 0) cuda_emulation::fail(site.words() + " with wrong numbers");
  cuda_emulation::arrive_at_barrier(site, barrier, threads);
  cuda_emulation::dawdle(site);
}
inline void load_box(void* shared, const RowMap* map, int column, int row, uint64_t* barrier, SSLFAST_SITE) {
  using namespace cuda_emulation;
  const Site site = SSLFAST_HERE("cp.async.bulk.tensor");
  barrier_at(site, barrier);
  check_shared(site, shared, size_t(map->box_rows) * 128, 128);
  memset(shared, kPoison, size_t(map->box_rows) * 128);
  block_state().boxes.push_back(
      {static_cast<unsigned char*>(shared), map->matrix, map->rows, map->columns, map->box_rows, column, row, barrier});
}

// Of all threads' writes so far: a missing fence is detected, one that only some threads omit is not.
inline void async_proxy_fence() {
  using namespace cuda_emulation;
  block_state();
  memcpy(engine_memory.data(), machine.dynamic_shared, machine.dynamic_bytes);
}
inline void wgmma_fence() {
  cuda_emulation::block_state().threads[cuda_emulation::machine.current->number].fenced = true;
}
inline void wgmma_commit() {
  cuda_emulation::WarpgroupThread& mine =
      cuda_emulation::block_state().threads[cuda_emulation::machine.current->number];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int kPending>
void wgmma_wait(SSLFAST_SITE) {
  cuda_emulation::dawdle(SSLFAST_HERE("wgmma.wait_group"));
  char nothing = 0;
  cuda_emulation::warp_collective(SSLFAST_HERE("wgmma.wait_group"), 0xffffffffu, nothing, [](char**) {});
  cuda_emulation::wait_for_products(kPending);
}
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <typename Tag>
void wgmma_m64n64k16_transposed(Tag, float (&d)[32], const uint32_t (&a)[4], uint64_t b, SSLFAST_SITE) {
  cuda_emulation::issue<Tag>(SSLFAST_HERE("wgmma"), d, a, 0, b, true);
}
template <typename Tag>
void wgmma_m64n128k16(Tag, float (&d)[64], uint64_t a, uint64_t b, bool add, SSLFAST_SITE) {
  cuda_emulation::issue<Tag>(SSLFAST_HERE("wgmma"), d, nullptr, a, b, add);
}
template <typename Tag>
void wgmma_m64n128k16_transposed(Tag, float (&d)[64], const uint32_t (&a)[4], uint64_t b, SSLFAST_SITE) {
  cuda_emulation::issue<Tag>(SSLFAST_HERE("wgmma"), d, a, 0, b, true);
}

}  // namespace sslfast
