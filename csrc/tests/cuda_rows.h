// Rows in emulated device memory, with room around them that nothing may touch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/vector.cuh"
#include "check.h"

namespace rows_test {

using fastmtl::Bf16;
using fastmtl::F16;
using fastmtl::StripPlan;

inline double value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline double value_of(Bf16 x) { return fastmtl::widen<double>(x); }
inline double value_of(F16 x) { return fastmtl::widen<double>(x); }

/// Checks that the kernels since the last call had no race in shared memory and met at the same operations.
inline void check_fault_free(std::string const& what) {
  check(emulation::fault.empty(), what + ": " + emulation::fault);
  emulation::fault.clear();
}

/// Rows of several tensors, task by task, each in memory of its own with room around it.
template <class Storage>
struct Rows {
  int rows;
  std::vector<int64_t> lengths;
  std::vector<std::vector<Storage>> memory;
  std::vector<Storage*> data;  // By tensor, then row; null: missing.

  Rows(int rows, std::vector<int64_t> lengths, int64_t offset, bool alike, int seed) : rows(rows), lengths(lengths) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (size_t k = 0; k < lengths.size(); ++k) {
      for (int t = 0; t < rows; ++t) {
        int64_t const skipped = offset + (alike ? 0 : t % 3);
        memory.emplace_back(lengths[k] + skipped + 16);
        fastmtl::narrow(memory.back()[0], std::nan(""));
        std::fill(memory.back().begin(), memory.back().end(), memory.back()[0]);
        // To the next multiple of 16 bytes, so that `offset` decides how the row lies.
        auto const past = reinterpret_cast<uintptr_t>(memory.back().data()) % 16 / sizeof(Storage);
        Storage* const begin = memory.back().data() + (past ? 16 / sizeof(Storage) - past : 0) + skipped;
        for (int64_t e = 0; e < lengths[k]; ++e) fastmtl::narrow(begin[e], normal(random));
        data.push_back(begin);
      }
    }
  }

  Storage*& at(int t, size_t k) { return data[k * rows + t]; }

  std::vector<StripPlan> plans(std::vector<int32_t> const& group, std::vector<void*> const& outs = {}) const {
    std::vector<StripPlan> all;
    for (size_t k = 0; k < lengths.size(); ++k) {
      std::vector<void const*> pointers(data.begin() + k * rows, data.begin() + (k + 1) * rows);
      for (size_t m = 0; m * lengths.size() < outs.size(); ++m) pointers.push_back(outs[m * lengths.size() + k]);
      all.push_back({pointers, lengths[k], group.empty() ? 0 : group[k]});
    }
    return all;
  }

  double product(int i, int j, size_t k) const {
    Storage const* const a = data[k * rows + i];
    Storage const* const b = data[k * rows + j];
    double sum = 0;
    for (int64_t e = 0; a != nullptr && b != nullptr && e < lengths[k]; ++e) sum += value_of(a[e]) * value_of(b[e]);
    return sum;
  }
};

}  // namespace rows_test
