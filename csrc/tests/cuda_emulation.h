// Runs a CUDA kernel on the CPU, one block after the other: every thread is a fiber that runs until it meets a barrier
// or a warp-wide operation. The order in which lanes go on is drawn anew each time, shared memory is no number before
// it is written, and its races are found (shadow_memory.h). How fast a kernel is does not show.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "shadow_memory.h"

#define __global__
#define __device__
// Thread-local memory is one block of the program, which nothing else uses here.
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)
#define FASTMTL_UNROLL
#define FASTMTL_UNROLL_BY_2
#define FASTMTL_NO_UNROLL
#define FASTMTL_GLOBAL(pointer)
#define FASTMTL_STORE_WORDS(to, words) (*(to) = (words))
#define FASTMTL_OPAQUE(value)
#define FASTMTL_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emulation::shared_memory)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index3 {
  unsigned x = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

/// The first that a kernel did wrong since it was last cleared.
inline std::string& fault = shadow.fault;

/// Lanes that wait for each other: a warp, or a block.
struct Meeting {
  int size = 0;
  int arrived = 0;
  long round = 0;
  long barriers = 0;
  char const* what = nullptr;
};

struct Block {
  // Contexts start fibers; from then on jumps, which take no system call, go between them and the scheduler.
  std::vector<ucontext_t> start;
  jmp_buf scheduler;
  struct Jump {
    jmp_buf to;
    bool started = false;
  };
  std::vector<Jump> fibers;
  std::vector<bool> done;
  std::vector<Meeting> warps;
  Meeting whole;
  // What a thread shows the others of its warp, or block.
  struct alignas(8) Slot {
    char bytes[32];
  };
  std::vector<Slot> slots;
  std::function<void()> body;
  unsigned current = 0;
};
/// Draws the orders in which lanes go on.
inline std::minstd_rand lane_orders;

inline Block* block = nullptr;

/// Dynamic shared memory, of which a block has at most so much.
inline thread_local double shared_memory[227 * 1024 / sizeof(double)];

inline void yield() {
  unsigned const fiber = block->current;
  if (_setjmp(block->fibers[fiber].to) == 0) _longjmp(block->scheduler, 1);
}

/// Runs one fiber until it yields or ends.
inline void resume(unsigned thread) {
  block->current = threadIdx.x = thread;
  shadow.lane = static_cast<int>(thread);
  shadow.warp_epoch = block->warps[thread / 32].barriers;
  if (_setjmp(block->scheduler) != 0) return;
  if (block->fibers[thread].started) _longjmp(block->fibers[thread].to, 1);
  block->fibers[thread].started = true;
  setcontext(&block->start[thread]);
}

/// Waits for the others; `what` they all meet for must be the same. Only barriers order accesses to memory.
inline void meet(Meeting& meeting, char const* what, bool barrier) {
  long const round = meeting.round;
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what && std::strcmp(meeting.what, what) != 0) {
    shadow.report(std::string("meets others at ") + meeting.what + " that are at " + what);
  }
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
    if (barrier) ++meeting.barriers;
    if (barrier && &meeting == &block->whole) shadow.order_block();
  } else {
    while (meeting.round == round) yield();
  }
  shadow.warp_epoch = block->warps[threadIdx.x / 32].barriers;
}

inline Meeting& warp() { return block->warps[threadIdx.x / 32]; }

/// Returns take(value_of), where value_of(lane) is what a lane of the warp gives.
template <class Value, class Take>
auto exchange(char const* what, Value const& value, Take const& take) {
  static_assert(sizeof(Value) <= sizeof(Block::Slot));
  std::memcpy(&block->slots[threadIdx.x], &value, sizeof(Value));
  meet(warp(), what, false);
  auto const result = take([first = threadIdx.x / 32 * 32](unsigned lane) {
    Value other;
    std::memcpy(&other, &block->slots[first + lane % 32], sizeof(Value));
    return other;
  });
  meet(warp(), what, false);
  return result;
}

inline void enter() {
  block->body();
  block->done[block->current] = true;
  _longjmp(block->scheduler, 1);
}

/// Runs body() for every thread of every block; `threads` is a multiple of 32.
template <class Body>
void launch(int64_t blocks, int threads, int64_t shared_doubles, Body const& body) {
  constexpr size_t stack_bytes = 256 * 1024;
  auto const emulated = std::make_unique<Block>();
  block = emulated.get();
  block->start.resize(threads);
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < static_cast<size_t>(threads)) {
    stacks.push_back(std::make_unique_for_overwrite<char[]>(stack_bytes));
  }
  block->slots.resize(threads);
  block->body = body;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    block->done.assign(threads, false);
    block->warps.assign(threads / 32, {32});
    block->whole = {threads};
    block->fibers.assign(threads, {});
    for (int t = 0; t < threads; ++t) {
      getcontext(&block->start[t]);
      block->start[t].uc_stack.ss_sp = stacks[t].get();
      block->start[t].uc_stack.ss_size = stack_bytes;
      makecontext(&block->start[t], enter, 0);
    }
    shadow.begin(shared_memory, shared_doubles * sizeof(double), sizeof(shared_memory));
    std::vector<unsigned> lanes(threads);
    std::iota(lanes.begin(), lanes.end(), 0u);
    while (!lanes.empty()) {
      for (size_t left = lanes.size(); left > 1; --left) std::swap(lanes[left - 1], lanes[lane_orders() % left]);
      for (unsigned const lane : lanes) resume(lane);
      std::erase_if(lanes, [](unsigned lane) { return block->done[lane]; });
    }
    shadow.end();
  }
  block = nullptr;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block->whole, __func__, true); }
inline void __syncwarp() { emulation::meet(emulation::warp(), __func__, true); }

inline int __syncthreads_or(int value) {
  std::memcpy(&emulation::block->slots[threadIdx.x], &value, sizeof(value));
  emulation::meet(emulation::block->whole, __func__, true);
  bool any = false;
  for (auto const& slot : emulation::block->slots) {
    std::memcpy(&value, &slot, sizeof(value));
    any |= value != 0;
  }
  emulation::meet(emulation::block->whole, __func__, true);
  return any;
}

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, unsigned distance) {
  unsigned const lane = threadIdx.x % 32 ^ distance;
  return emulation::exchange(__func__, value, [&](auto const& of_lane) { return of_lane(lane); });
}

template <class Value>
Value __shfl_sync(unsigned, Value value, unsigned lane) {
  return emulation::exchange(__func__, value, [&](auto const& of_lane) { return of_lane(lane); });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::exchange(__func__, value, [](auto const& of_lane) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(of_lane(lane)) << lane;
    return bits;
  });
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low));
}
inline _Float16 __ushort_as_half(uint16_t bits) { return std::bit_cast<_Float16>(bits); }
inline uint16_t __half_as_ushort(_Float16 value) { return std::bit_cast<uint16_t>(value); }
inline float __half2float(_Float16 value) { return static_cast<float>(value); }
inline _Float16 __float2half_rn(float value) { return static_cast<_Float16>(value); }
inline _Float16 __double2half(double value) { return static_cast<_Float16>(value); }

namespace fastmtl {

/// To nearest, ties away from zero, in ten bits of fraction.
inline uint32_t to_tf32(float value) {
  uint32_t const bits = std::bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline void multiply_tf32(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  struct Operands {
    float a[4];
    float b[2];
  } operands;
  std::memcpy(operands.a, a, sizeof(a));
  std::memcpy(operands.b, b, sizeof(b));
  unsigned const lane = threadIdx.x % 32;
  emulation::exchange(__func__, operands, [&](auto const& of_lane) {
    // (row, k) of a is in lane 4 row + k % 4, register row / 8 + 2 (k / 4); (k, column) of b in lane 4 column + k % 4.
    for (unsigned c = 0; c < 4; ++c) {
      double sum = d[c];
      for (unsigned k = 0; k < 8; ++k) {
        float const left = of_lane(4 * (lane / 4) + k % 4).a[c / 2 + 2 * (k / 4)];
        sum += static_cast<double>(left) * of_lane(4 * (2 * (lane % 4) + c % 2) + k % 4).b[k / 4];
      }
      d[c] = static_cast<float>(sum);
    }
    return 0;
  });
}

template <class Storage>
void multiply_words(float (&d)[4], uint32_t const (&a)[2], uint32_t b) {
  struct Operands {
    uint32_t a[2];
    uint32_t b;
  };
  auto const half = [](uint32_t word, unsigned k) {
    return widen<double>(Storage{static_cast<uint16_t>(word >> 16 * (k % 2))});
  };
  unsigned const lane = threadIdx.x % 32;
  emulation::exchange(__func__, Operands{{a[0], a[1]}, b}, [&](auto const& of_lane) {
    // (row, k) of a is in lane 4 row + k / 2, word row / 8, half k % 2; (k, column) of b in lane 4 column + k / 2.
    for (unsigned c = 0; c < 4; ++c) {
      double sum = d[c];
      for (unsigned k = 0; k < 8; ++k) {
        double const left = half(of_lane(4 * (lane / 4) + k / 2).a[c / 2], k);
        sum += left * half(of_lane(4 * (2 * (lane % 4) + c % 2) + k / 2).b, k);
      }
      d[c] = static_cast<float>(sum);
    }
    return 0;
  });
}

inline void multiply_f64(double (&d)[2], double a, double b) {
  struct Operands {
    double a;
    double b;
  };
  unsigned const lane = threadIdx.x % 32;
  emulation::exchange(__func__, Operands{a, b}, [&](auto const& of_lane) {
    for (unsigned c = 0; c < 2; ++c) {
      for (unsigned k = 0; k < 4; ++k) {
        d[c] += of_lane(4 * (lane / 4) + k).a * of_lane(4 * (2 * (lane % 4) + c) + k).b;
      }
    }
    return 0;
  });
}

}  // namespace fastmtl
