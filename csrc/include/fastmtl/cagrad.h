// CAGrad's weights from the Gram matrix of T gradients: the w on the simplex that minimises
//   F(w) = <g_w, g_0> + c |g_0| |g_w|,   g_w = sum_t w_t g_t,   g_0 their mean.
//
// Where g_w is not zero, F has the gradient <g_i, g_0 + g_w / shift>, shift = |g_w| / (c |g_0|): w makes g_w + shift
// g_0 the min-norm element of the hull of the vectors g_i + shift g_0. So a search over the shift surrounds the
// quadratic program of min_norm.h. |g_w| grows with the shift, |g_w| / shift falls, and on a fixed support w is linear
// in the shift: the search solves for the shift on the support found, inside a bracket.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/min_norm.h"
#include "fastmtl/nonneg_qp.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Memory of the method; all vectors have `size` entries.
struct CagradWork {
  NonnegQpWork qp;
  double* shifted;    // Gram matrix of g_i + shift g_0, row-major
  double* mean;       // <g_i, g_0>
  double* scale;      // 1 / |g_i + shift g_0|
  double* linear;     // scale over the largest scale
  double* weights;    // w
  double* image;      // G w
  double* slope;      // dw / dshift
  double* border;     // by position in the support
  double* direction;  // by position in the support

  static constexpr int kVectors = 8;

  FASTMTL_HD static int64_t storage(int size) {
    return NonnegQpWork::storage(size) + int64_t{size} * size + int64_t{kVectors} * size;
  }

  FASTMTL_HD CagradWork(double* memory, int size) : qp(memory, size) {
    shifted = memory + NonnegQpWork::storage(size);
    mean = shifted + int64_t{size} * size;
    scale = mean + size;
    linear = scale + size;
    weights = linear + size;
    image = weights + size;
    slope = image + size;
    border = slope + size;
    direction = border + size;
  }
};

/// Doubles of workspace that cagrad needs for n tasks.
FASTMTL_HD inline int64_t cagrad_workspace(int n) { return CagradWork::storage(n); }

namespace detail {

/// Solves for the weights at one shift, starting from the last support; returns the size of the new one.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD int solve_at(Team const& team, int n, double const* gram, double shift, double square,
                                              bool first, CagradWork const& work) {
  Choice largest{0, 0};
  for (int i = team.rank(); i < n; i += team.size()) {
    double const diagonal = gram[int64_t{i} * n + i];
    double const longest = sqrt(fmax(diagonal, 0.0)) + shift * sqrt(square);
    double const shifted = diagonal + 2 * shift * work.mean[i] + shift * shift * square;
    // What is left of a vector that cancels is known to this accuracy only.
    work.scale[i] = 1 / sqrt(fmax(shifted, 0x1p-46 * longest * longest));
    largest = lower(largest, {-work.scale[i], i});
  }
  largest = team.lowest(largest);
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) {
      work.shifted[int64_t{i} * n + j] =
          gram[int64_t{i} * n + j] + shift * (work.mean[i] + work.mean[j]) + shift * shift * square;
    }
  }
  for (int i = team.rank(); i < n; i += team.size()) work.linear[i] = work.scale[i] / -largest.value;
  team.barrier();

  double kept = 0;
  for (double rank_one = 1;; rank_one *= 4096) {
    kept = 0;
    for (int i = team.rank(); i < n; i += team.size()) kept += first || work.qp.member[i] != 0;
    kept = team.sum(kept);
    if (team.rank() == 0) {
      for (int i = 0, next = 0; i < n; ++i) {
        if (first || work.qp.member[i] != 0) work.qp.support[next++] = i;
      }
    }
    team.barrier();
    NonnegQp const qp{n, work.shifted, work.scale, work.linear, rank_one, kMinNormRidge};
    bool const solved = solve_nonneg_qp(team, qp, work.qp, static_cast<int>(kept));
    if (solved || rank_one > 1e12) break;
    team.barrier();
  }

  double total = 0;
  kept = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    total += work.qp.point[i] * work.linear[i];
    kept += work.qp.member[i];
  }
  total = team.sum(total);
  kept = team.sum(kept);
  for (int i = team.rank(); i < n; i += team.size()) work.weights[i] = work.qp.point[i] * work.linear[i] / total;
  team.barrier();
  return static_cast<int>(kept);
}

/// w'Gx for x with the image Gx, which is written.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double form(Team const& team, int n, double const* gram, double const* w,
                                             double const* x, double* image) {
  double value = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    image[i] = dot(n, gram + int64_t{i} * n, x);
    value += w[i] * image[i];
  }
  value = team.sum(value);
  team.barrier();
  return value;
}

/// Writes how the weights change with the shift while the support stays: G s = -mean + const on it, sum(s) = 0.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void differentiate(Team const& team, int n, CagradWork const& work, int count) {
  for (int p = team.rank(); p < count; p += team.size()) {
    int const i = work.qp.support[p];
    work.border[p] = work.linear[i];
    work.direction[p] = work.scale[i] * work.mean[i];
  }
  team.barrier();
  for (double* const side : {work.border, work.direction}) {
    solve_lower(team, work.qp.factor, count, side);
    solve_upper(team, work.qp.factor, count, side);
  }
  double constant = 0;
  double share = 0;
  for (int p = team.rank(); p < count; p += team.size()) {
    double const linear = work.linear[work.qp.support[p]];
    constant += linear * work.direction[p];
    share += linear * work.border[p];
  }
  constant = team.sum(constant);
  share = team.sum(share);
  for (int i = team.rank(); i < n; i += team.size()) work.slope[i] = 0;
  team.barrier();
  for (int p = team.rank(); p < count; p += team.size()) {
    int const i = work.qp.support[p];
    work.slope[i] = work.scale[i] * (constant / share * work.border[p] - work.direction[p]);
  }
  team.barrier();
}

}  // namespace detail

/// Writes the n weights for the row-major n x n matrix `gram` and c >= 0, NaN if it has a non-finite entry.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void cagrad(Team const& team, int n, double c, double const* gram, double* weights,
                                             double* workspace) {
  double faults = 0;
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) faults += !(fabs(gram[int64_t{i} * n + j]) <= DBL_MAX);
  }
  faults = team.sum(faults);

  CagradWork const work(workspace, n);
  double square = 0;
  double length = 0;
  double zeros = 0;
  Choice smallest{INFINITY, 0};
  Choice shortest{INFINITY, 0};
  Choice longest{0, 0};
  for (int i = team.rank(); i < n; i += team.size()) {
    double const row_length = sqrt(fmax(gram[int64_t{i} * n + i], 0.0));
    double sum = 0;
    for (int j = 0; j < n; ++j) sum += gram[int64_t{i} * n + j];
    work.mean[i] = sum / n;
    square += work.mean[i] / n;
    length += row_length / n;
    zeros += row_length == 0;
    smallest = lower(smallest, {work.mean[i], i});
    longest = lower(longest, {-row_length, i});
    if (row_length > 0) shortest = lower(shortest, {row_length, i});
  }
  square = team.sum(square);
  length = team.sum(length);
  zeros = team.sum(zeros);
  smallest = team.lowest(smallest);
  shortest = team.lowest(shortest);
  longest = team.lowest(longest);
  team.barrier();
  // Below it, the mean gradient is rounding.
  bool const balanced = !(square > 0x1p-45 * length * length);
  bool const linear = c <= 1e-8;
  if (faults > 0 || balanced || linear) {
    double const even = faults > 0 ? NAN : 1.0 / n;
    for (int i = team.rank(); i < n; i += team.size()) {
      weights[i] = faults > 0 || balanced ? even : i == smallest.index ? 1.0 : 0.0;
    }
    return;
  }

  double const slack = c * sqrt(square);
  double low = 0;
  double high = -2 * longest.value / slack;
  double shift = fmin(1 / c, 0.5 * high);
  bool stationary = false;
  for (int left = 64; left > 0; --left) {
    int const count = detail::solve_at(team, n, gram, shift, square, left == 64, work);
    double const form = detail::form(team, n, gram, work.weights, work.weights, work.image);
    double const norm = sqrt(fmax(form, 0.0));
    double mass = 0;
    for (int i = team.rank(); i < n; i += team.size()) {
      mass += work.weights[i] * sqrt(fmax(gram[int64_t{i} * n + i], 0.0));
    }
    mass = team.sum(mass);
    // Smaller norms are rounding of the Gram matrix, and so are sums in which only rows of length zero have weight.
    stationary = norm <= 2e-8 * mass || mass <= 1e-8 * shortest.value;
    // The square of the norm is a sum with this rounding.
    double const rounding = fmax(1e-13 * norm, DBL_EPSILON * mass * mass / norm);
    if (stationary || fabs(norm - slack * shift) <= rounding) break;
    bool const above = norm > slack * shift;
    (above ? low : high) = shift;
    if (high - low <= 4 * DBL_EPSILON * high) break;

    detail::differentiate(team, n, work, count);
    double const cross = detail::form(team, n, gram, work.slope, work.weights, work.image);
    double const curved = detail::form(team, n, gram, work.slope, work.slope, work.image);
    double const linear_term = cross - slack * slack * shift;
    double const excess = (norm - slack * shift) * (norm + slack * shift);
    double const root = linear_term * linear_term - (curved - slack * slack) * excess;
    double next = shift + excess / (sqrt(fmax(root, 0.0)) - linear_term);
    if (!(root >= 0 && next > low && next < high)) {
      next = norm / slack;
      if (!(next > 2 * low && next < 0.5 * high)) next = low > 0 ? sqrt(low) * sqrt(high) : 1e-4 * next;
    }
    if (next == shift) break;
    shift = next;
  }
  bool const vanish = stationary && zeros > 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const diagonal = gram[int64_t{i} * n + i];
    weights[i] = !vanish ? work.weights[i] : diagonal <= 0 ? 1 / zeros : 0.0;
  }
}

/// Writes the n coefficients of the update g_0 + (c |g_0| / |g_w|) g_w for the weights w; of g_0 where g_w is zero.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void cagrad_step(Team const& team, int n, double c, double const* gram,
                                                  double const* weights, double* update) {
  team.barrier();
  double sum = 0;
  double form = 0;
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) {
      double const entry = gram[int64_t{i} * n + j];
      sum += entry;
      form += weights[i] * entry * weights[j];
    }
  }
  sum = team.sum(sum);
  form = team.sum(form);
  double const radius = c * sqrt(sum > 0 ? sum : 0) / n;
  double const reach = form > 0 ? radius / sqrt(form) : 0;
  for (int i = team.rank(); i < n; i += team.size()) update[i] = 1.0 / n + reach * weights[i];
}

}  // namespace fastmtl
