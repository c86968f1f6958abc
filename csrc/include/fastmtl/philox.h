// Philox4x32-10: random numbers as a pure function of a seed, an offset and an index, the same on every backend.
//
// Number i of the stream (seed, offset) is word i % 4 of the block whose counter is i / 4 in its low and the offset in
// its high 64 bits, and whose key is the seed. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_PHILOX __host__ __device__ __forceinline__
#define FASTMTL_PHILOX_UNROLL _Pragma("unroll")
#else
// Inlined into kernels of every instruction set, and vectorised there.
#define FASTMTL_PHILOX inline __attribute__((always_inline))
#define FASTMTL_PHILOX_UNROLL _Pragma("GCC unroll 10")
#endif

namespace fastmtl {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9;
constexpr uint32_t kPhiloxKey1 = 0xBB67AE85;

/// Replaces four counter words by four random words.
FASTMTL_PHILOX void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  auto k0 = static_cast<uint32_t>(seed);
  auto k1 = static_cast<uint32_t>(seed >> 32);
  FASTMTL_PHILOX_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint64_t const p0 = uint64_t{kPhiloxMultiplier0} * c0;
    uint64_t const p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
}

/// Writes numbers 4 * block .. 4 * block + 3 of a stream as words.
FASTMTL_PHILOX void philox_block(uint64_t seed, uint64_t offset, uint64_t block, uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(block >> 32);
  words[2] = static_cast<uint32_t>(offset);
  words[3] = static_cast<uint32_t>(offset >> 32);
  philox(words[0], words[1], words[2], words[3], seed);
}

/// The multiple of 2^-24 in [0, 1) that a word stands for; exact in float32, as is 2 u - 1.
FASTMTL_PHILOX float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace fastmtl
