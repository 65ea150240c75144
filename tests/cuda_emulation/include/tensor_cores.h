// The wrappers of csrc/common/ptx.cuh on the host, from the fragment layouts of the PTX manual. Asynchronous copies
// happen as late as they may: their target holds NaN until the thread waits for them.
#pragma once

#include <fibers.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace sslfast {
struct Bf16;
struct Fp16;
}  // namespace sslfast

namespace cuda_emulation {

template <typename Tag>
float from_bits(uint16_t bits) {
  if constexpr (std::is_same_v<Tag, sslfast::Bf16>) return __uint_as_float(static_cast<unsigned>(bits) << 16);
  return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits());
}
// Element `e` (0: low half) of a register.
template <typename Tag>
float from_register(uint32_t value, int e) {
  return from_bits<Tag>(static_cast<uint16_t>(value >> 16 * e));
}

// A fragment [16, 16] of a warp: register 2 * (column / 8) + row / 8, lane 4 * (row % 8) + column % 8 / 2.
inline int a_register(int row, int column) {
  return 2 * (column / 8) + row / 8;
}
inline int a_lane(int row, int column) {
  return 4 * (row % 8) + column % 8 / 2;
}

inline void check_shared(Site site, const void* pointer, size_t bytes, size_t alignment) {
  const unsigned char* p = static_cast<const unsigned char*>(pointer);
  const unsigned char* begin = machine.dynamic_shared;
  if (p < begin || p + bytes > begin + machine.dynamic_bytes) fail(site.words() + " outside of shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail(site.words() + " at a misaligned address");
}

struct Copy {
  void* to;
  const void* from;
  bool valid;
};
struct ThreadCopies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};
inline ThreadCopies& copies_of(Fiber& fiber) {
  if (fiber.copies == nullptr) fiber.copies = std::make_shared<ThreadCopies>();
  return *static_cast<ThreadCopies*>(fiber.copies.get());
}

struct MatrixLane {
  uint32_t* x;
  const void* row;
};
inline void load_matrices(Site site, uint32_t (&x)[4], const void* row, bool transposed) {
  check_shared(site, row, 16, 16);
  MatrixLane mine{x, row};
  warp_collective(site, 0xffffffffu, mine, [=](MatrixLane** lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t value = 0;
        for (int e = 0; e < 2; ++e) {
          const int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
          uint16_t element;
          memcpy(&element, static_cast<const char*>(lanes[8 * matrix + r]->row) + 2 * c, 2);
          value |= static_cast<uint32_t>(element) << 16 * e;
        }
        lanes[lane]->x[matrix] = value;
      }
    }
  });
}

}  // namespace cuda_emulation

namespace sslfast {

// Not zero, so that an address computed without the block's base is detected.
constexpr uint32_t kSharedBase = 2048;
inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - cuda_emulation::machine.dynamic_shared;
  return kSharedBase + static_cast<uint32_t>(offset);
}

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float fast_reciprocal(float x) {
  return 1.0f / x;
}

template <typename Tag>
void mma_m16n8k16(Tag, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SSLFAST_SITE) {
  using namespace cuda_emulation;
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  warp_collective(SSLFAST_HERE("mma"), 0xffffffffu, mine, [](Lane** lanes) {
    float left[16][16], right[16][8];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) {
        left[row][k] = from_register<Tag>(lanes[a_lane(row, k)]->a[a_register(row, k)], k % 2);
      }
      for (int n = 0; n < 8; ++n) right[k][n] = from_register<Tag>(lanes[4 * n + k % 8 / 2]->b[k / 8], k % 2);
    }
    for (int row = 0; row < 16; ++row) {
      for (int n = 0; n < 8; ++n) {
        float& result = lanes[4 * (row % 8) + n / 2]->d[2 * (row / 8) + n % 2];
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][n];
        result += sum;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&x)[4], const void* row, SSLFAST_SITE) {
  cuda_emulation::load_matrices(SSLFAST_HERE("ldmatrix"), x, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row, SSLFAST_SITE) {
  cuda_emulation::load_matrices(SSLFAST_HERE("ldmatrix.trans"), x, row, true);
}

inline void cp_async_16(void* shared, const void* global, bool valid, SSLFAST_SITE) {
  using namespace cuda_emulation;
  check_shared(SSLFAST_HERE("cp.async"), shared, 16, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail(SSLFAST_HERE("cp.async").words() + " from a misaligned address");
  memset(shared, kPoison, 16);
  copies_of(*machine.current).open.push_back({shared, global, valid});
}
inline void cp_async_commit() {
  cuda_emulation::ThreadCopies& copies = cuda_emulation::copies_of(*cuda_emulation::machine.current);
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kPending>
void cp_async_wait(SSLFAST_SITE) {
  cuda_emulation::dawdle(SSLFAST_HERE("cp.async.wait_group"));
  cuda_emulation::ThreadCopies& copies = cuda_emulation::copies_of(*cuda_emulation::machine.current);
  for (; copies.groups.size() > kPending; copies.groups.pop_front()) {
    for (const cuda_emulation::Copy& copy : copies.groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
  }
}

}  // namespace sslfast
