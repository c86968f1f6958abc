// Compiles the header named by FASTMTL_KERNELS once per instruction set, in the namespaces fastmtl::portable,
// fastmtl::avx2 and fastmtl::avx512. No include guard: an op's file defines FASTMTL_KERNELS and includes this once.
// Such a header must include nothing but others of its kind; what it needs is included by the op's file before.
#include "fastmtl/cpu_features.h"

#if FASTMTL_X86
#include <immintrin.h>
#endif

#define FASTMTL_VECTOR_BYTES 16
#define FASTMTL_ISA_LEVEL 0
namespace fastmtl::portable {
#include "fastmtl/vec.h"
#include "fastmtl/vec_convert.h"
#include FASTMTL_KERNELS
}  // namespace fastmtl::portable
#undef FASTMTL_VECTOR_BYTES
#undef FASTMTL_ISA_LEVEL

#if FASTMTL_X86

#define FASTMTL_VECTOR_BYTES 32
#define FASTMTL_ISA_LEVEL 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace fastmtl::avx2 {
#include "fastmtl/vec.h"
#include "fastmtl/vec_convert.h"
#include FASTMTL_KERNELS
}  // namespace fastmtl::avx2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTMTL_VECTOR_BYTES
#undef FASTMTL_ISA_LEVEL

#define FASTMTL_VECTOR_BYTES 64
#define FASTMTL_ISA_LEVEL 2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace fastmtl::avx512 {
#include "fastmtl/vec.h"
#include "fastmtl/vec_convert.h"
#include FASTMTL_KERNELS
}  // namespace fastmtl::avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FASTMTL_VECTOR_BYTES
#undef FASTMTL_ISA_LEVEL

#endif  // FASTMTL_X86

#undef FASTMTL_KERNELS

// Calls the variant of a kernel this machine runs: FASTMTL_DISPATCH(gram_slice, job, slice).
#if FASTMTL_X86
#define FASTMTL_DISPATCH(function, ...)                                                  \
  (::fastmtl::isa() == ::fastmtl::Isa::avx512 ? ::fastmtl::avx512::function(__VA_ARGS__) \
   : ::fastmtl::isa() == ::fastmtl::Isa::avx2 ? ::fastmtl::avx2::function(__VA_ARGS__)   \
                                              : ::fastmtl::portable::function(__VA_ARGS__))
#else
#define FASTMTL_DISPATCH(function, ...) ::fastmtl::portable::function(__VA_ARGS__)
#endif
