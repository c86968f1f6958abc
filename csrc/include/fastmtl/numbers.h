// Vectors of floats of either width, as the ops on what a step has of T tasks take them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "fastmtl/team.h"

namespace fastmtl {

FASTMTL_HD inline bool is_finite(double value) { return fabs(value) <= DBL_MAX; }

/// Numbers of float32 or float64, a stride apart; `data` is null where there are none.
struct Numbers {
  void const* data = nullptr;
  int64_t stride = 1;
  bool wide = true;

  FASTMTL_HD double operator[](int64_t i) const {
    return wide ? static_cast<double const*>(data)[i * stride] : double{static_cast<float const*>(data)[i * stride]};
  }
};

/// A dense vector of float32 or float64 that is read and written.
struct Vector {
  void* data = nullptr;
  bool wide = true;

  FASTMTL_HD double operator[](int64_t i) const {
    return wide ? static_cast<double const*>(data)[i] : double{static_cast<float const*>(data)[i]};
  }

  FASTMTL_HD void set(int64_t i, double value) const {
    if (wide) {
      static_cast<double*>(data)[i] = value;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
};

/// The largest of n values by index, -infinity of none.
template <class Team, class Value>
FASTMTL_HD double largest(Team const& team, int n, Value const& value) {
  Choice best{INFINITY, n};
  for (int t = team.rank(); t < n; t += team.size()) best = lower(best, Choice{-value(t), t});
  return -team.lowest(best).value;
}

/// The sum of n values by index.
template <class Team, class Value>
FASTMTL_HD double total(Team const& team, int n, Value const& value) {
  double sum = 0;
  for (int t = team.rank(); t < n; t += team.size()) sum += value(t);
  return team.sum(sum);
}

}  // namespace fastmtl
