// One source, three instruction sets, chosen at run time: AVX-512, AVX2+FMA, or the compiler's default target.
//
// A kernel is written once as an always-inline function template of plain loops marked `#pragma omp simd`;
// SSLFAST_MULTIVERSION wraps it in one function per instruction set and calls the best one that the CPU supports.
#pragma once

namespace sslfast {

#define SSLFAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)

enum class Isa { kBase, kAvx2, kAvx512 };

inline Isa detect_isa() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
  return Isa::kBase;
}

inline Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

#define SSLFAST_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define SSLFAST_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))

#define SSLFAST_CHOOSE_VERSION(name, Args) \
  template <typename T>                    \
  void name(Args args) {                   \
    switch (cpu_isa()) {                   \
      case Isa::kAvx512:                   \
        return name##_avx512<T>(args);     \
      case Isa::kAvx2:                     \
        return name##_avx2<T>(args);       \
      default:                             \
        return name##_base<T>(args);       \
    }                                      \
  }

// Defines `name<T>(Args&)`, which runs body<T>(args) compiled for the CPU's instruction set. body must be
// SSLFAST_INLINE.
#define SSLFAST_MULTIVERSION(name, body, Args)          \
  template <typename T>                                 \
  SSLFAST_TARGET_AVX512 void name##_avx512(Args args) { \
    body<T>(args);                                      \
  }                                                     \
  template <typename T>                                 \
  SSLFAST_TARGET_AVX2 void name##_avx2(Args args) {     \
    body<T>(args);                                      \
  }                                                     \
  template <typename T>                                 \
  void name##_base(Args args) {                         \
    body<T>(args);                                      \
  }                                                     \
  SSLFAST_CHOOSE_VERSION(name, Args)

// The same for body<T, kBytes>(args), kBytes being the width of a vector register: bodies that keep a block of sums in
// registers need the number of registers.
#define SSLFAST_MULTIVERSION_BY_WIDTH(name, body, Args) \
  template <typename T>                                 \
  SSLFAST_TARGET_AVX512 void name##_avx512(Args args) { \
    body<T, 64>(args);                                  \
  }                                                     \
  template <typename T>                                 \
  SSLFAST_TARGET_AVX2 void name##_avx2(Args args) {     \
    body<T, 32>(args);                                  \
  }                                                     \
  template <typename T>                                 \
  void name##_base(Args args) {                         \
    body<T, 16>(args);                                  \
  }                                                     \
  SSLFAST_CHOOSE_VERSION(name, Args)

#else

#define SSLFAST_MULTIVERSION_BY_WIDTH(name, body, Args) \
  template <typename T>                                 \
  void name(Args args) {                                \
    body<T, 16>(args);                                  \
  }

#define SSLFAST_MULTIVERSION(name, body, Args) \
  template <typename T>                        \
  void name(Args args) {                       \
    body<T>(args);                             \
  }

#endif

}  // namespace sslfast
