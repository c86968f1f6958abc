// The numbers of a Philox stream that a kernel draws where it needs them.
#pragma once

#include "fastmtl/philox.h"
#include "vector.cuh"

namespace fastmtl {

/// Seed and offset, read on the device.
struct Stream {
  uint64_t seed;
  uint64_t offset;

  __device__ Stream(int64_t const* random, int64_t stride)
      : seed(static_cast<uint64_t>(random[0])), offset(static_cast<uint64_t>(random[stride])) {}

  /// Number `index` of the stream as 2 u - 1. Words are selected, not indexed: an index would send them to memory.
  __device__ float centred(int64_t index) const {
    uint32_t words[4];
    philox_block(seed, offset, static_cast<uint64_t>(index >> 2), words);
    uint32_t const low = (index & 1) != 0 ? words[1] : words[0];
    uint32_t const high = (index & 1) != 0 ? words[3] : words[2];
    return 2 * uniform((index & 2) != 0 ? high : low) - 1;
  }

  /// The numbers from `index` on: whole blocks of four where they begin with one.
  template <class Acc, int count>
  __device__ void draw(int64_t index, Acc (&centred_numbers)[count]) const {
    if (count % 4 == 0 && (index & 3) == 0) {
      FASTMTL_UNROLL
      for (int i = 0; i < count; ++i) {
        if (i % 4 != 0) continue;
        uint32_t words[4];
        philox_block(seed, offset, static_cast<uint64_t>((index + i) >> 2), words);
        FASTMTL_UNROLL
        for (int w = 0; w < 4; ++w) {
          if (i + w < count) centred_numbers[i + w] = static_cast<Acc>(2 * uniform(words[w]) - 1);
        }
      }
    } else {
      FASTMTL_UNROLL
      for (int i = 0; i < count; ++i) centred_numbers[i] = static_cast<Acc>(centred(index + i));
    }
  }
};

/// The sign that stays: with the sum of the s_t and that of their sizes, purity > u exactly where
/// sum > (2 u - 1) sizes. A NaN leaves neither.
template <class Acc>
__device__ inline Acc sign_that_stays(Acc sum, Acc size, Acc centred) {
  Acc const limit = centred * size;
  return sum > limit ? Acc(1) : sum < limit ? Acc(-1) : Acc(0);
}

}  // namespace fastmtl
