// A team of lanes: the one abstraction under which every T x T solver is written once for the CPU and for CUDA.
//
// A team has size() lanes in groups() groups of lanes() each; lane rank() = group() * lanes() + lane(). Work is divided
// by strided loops: one-dimensional ones over rank()/size(), two-dimensional ones over group()/groups() and, inside,
// lane()/lanes(), so that the inner loop is contiguous on a CPU and coalesced on a GPU.
//
// Every lane calls every collective (barrier, sum, lowest), in the same order, and gets the same result bit for bit; so
// a branch on a collective's result, or on memory written before a barrier, is taken by all lanes alike. Only barrier()
// orders memory: what a lane wrote before it, all lanes read after it.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_HD __host__ __device__
// The solvers are host and device templates, the CUDA teams device only: each instance lives on one side.
#define FASTMTL_TEAM_TEMPLATE _Pragma("nv_exec_check_disable") template <class Team>
#else
#define FASTMTL_HD
#define FASTMTL_TEAM_TEMPLATE template <class Team>
#endif

namespace fastmtl {

/// A value and the index it belongs to.
struct Choice {
  double value;
  int index;
};

/// The choice with the lower value; of equal ones, the one with the lower index.
FASTMTL_HD inline Choice lower(Choice a, Choice b) {
  bool const second = b.value < a.value || (b.value == a.value && b.index < a.index);
  return second ? b : a;
}

/// The team of one lane: a thread of the CPU.
struct HostTeam {
  FASTMTL_HD static constexpr int rank() { return 0; }
  FASTMTL_HD static constexpr int size() { return 1; }
  FASTMTL_HD static constexpr int lane() { return 0; }
  FASTMTL_HD static constexpr int lanes() { return 1; }
  FASTMTL_HD static constexpr int group() { return 0; }
  FASTMTL_HD static constexpr int groups() { return 1; }
  FASTMTL_HD void barrier() const {}
  FASTMTL_HD double sum(double value) const { return value; }
  FASTMTL_HD Choice lowest(Choice choice) const { return choice; }
};

#if defined(__CUDACC__)

/// A warp of 32 lanes.
struct WarpTeam {
  static constexpr unsigned kAll = 0xffffffffu;

  __device__ int rank() const { return lane(); }
  __device__ static constexpr int size() { return 32; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ static constexpr int lanes() { return 32; }
  __device__ static constexpr int group() { return 0; }
  __device__ static constexpr int groups() { return 1; }
  __device__ void barrier() const { __syncwarp(kAll); }

  __device__ double sum(double value) const {
    // A butterfly of commutative additions leaves the same bits in all lanes.
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAll, value, distance);
    return value;
  }

  __device__ Choice lowest(Choice choice) const {
    for (int distance = 16; distance > 0; distance /= 2) {
      Choice const other{__shfl_xor_sync(kAll, choice.value, distance), __shfl_xor_sync(kAll, choice.index, distance)};
      choice = lower(choice, other);
    }
    return choice;
  }
};

/// A one-dimensional block of whole warps; `scratch` is shared memory for one Choice per warp.
struct BlockTeam {
  Choice* scratch;

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ static constexpr int lanes() { return 32; }
  __device__ int group() const { return static_cast<int>(threadIdx.x / 32); }
  __device__ int groups() const { return static_cast<int>(blockDim.x / 32); }
  __device__ void barrier() const { __syncthreads(); }

  __device__ double sum(double value) const {
    value = WarpTeam().sum(value);
    if (lane() == 0) scratch[group()].value = value;
    __syncthreads();
    double total = 0;
    for (int g = 0; g < groups(); ++g) total += scratch[g].value;
    __syncthreads();
    return total;
  }

  __device__ Choice lowest(Choice choice) const {
    choice = WarpTeam().lowest(choice);
    if (lane() == 0) scratch[group()] = choice;
    __syncthreads();
    choice = scratch[0];
    for (int g = 1; g < groups(); ++g) choice = lower(choice, scratch[g]);
    __syncthreads();
    return choice;
  }
};

#endif

}  // namespace fastmtl
