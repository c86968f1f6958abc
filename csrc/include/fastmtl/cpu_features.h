// Which vector instructions the CPU kernels use, decided once at run time. The library is compiled for the baseline
// machine; functions marked with the macros below are compiled for more and called only where isa() allows it.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTMTL_X86 1
#define FASTMTL_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FASTMTL_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define FASTMTL_X86 0
#endif

namespace fastmtl {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

inline char const* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

/// What this CPU and its operating system support.
inline Isa supported_isa() {
#if FASTMTL_X86
  __builtin_cpu_init();
  bool const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

/// The instruction set in use: the best supported one, or less where FASTMTL_ISA names less.
inline Isa isa() {
  static Isa const chosen = [] {
    Isa const best = supported_isa();
    char const* wish = std::getenv("FASTMTL_ISA");
    if (wish == nullptr) return best;
    for (Isa const candidate : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (std::string_view(wish) == isa_name(candidate) && candidate <= best) return candidate;
    }
    return best;
  }();
  return chosen;
}

}  // namespace fastmtl
