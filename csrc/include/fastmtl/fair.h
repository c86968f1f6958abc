// Fair weights (Nash-MTL, FairGrad) of T gradients from their Gram matrix: w > 0 with G w = w^-p elementwise.
//
// With d_i = sqrt(G_ii), e_i = d_i^((p-1)/(p+1)) and v_i = d_i w_i the equation is C v = e (v/e)^-p, where C has a unit
// diagonal and v = e solves it for tasks that do not interact. It is the optimality condition of a convex problem in v,
// solved by Newton steps with a line search. The curvature of v_i^-p is not that at v_i, but that of the secant to
// where row i would come to rest on its own: as good near the solution, and right by orders of magnitude far from it.
//
// Where gradients cancel there is no solution, so a ridge is added to C: it caps the weights, and the equation that is
// solved is that of G + ridge diag(G). Rows of length zero get weight zero.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/cholesky.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Added to the unit diagonal.
constexpr double kFairRidge = 1e-10;
/// Warm weights further than that from those of tasks that do not interact are not used.
constexpr double kFairFarthest = 1e50;

/// Memory of the solver; all vectors have `size` entries.
struct FairWork {
  PackedLower factor;
  double* cosine;   // C with its ridge, row-major
  double* inverse;  // 1 / d, zero for rows of length zero
  double* alone;    // e
  double* point;    // v
  double* image;    // C v
  double* target;   // e (v/e)^-p
  double* step;
  double* step_image;

  static constexpr int kVectors = 7;

  FASTMTL_HD static int64_t storage(int size) {
    return PackedLower::storage(size) + int64_t{size} * size + int64_t{kVectors} * size;
  }

  FASTMTL_HD FairWork(double* memory, int size) : factor{memory, size} {
    cosine = memory + PackedLower::storage(size);
    inverse = cosine + int64_t{size} * size;
    alone = inverse + size;
    point = alone + size;
    image = point + size;
    target = image + size;
    step = target + size;
    step_image = step + size;
  }
};

/// Doubles of workspace that fair needs for n tasks.
FASTMTL_HD inline int64_t fair_workspace(int n) { return FairWork::storage(n); }

namespace detail {

constexpr double kFairLeast = 1e-280;

/// x^-p for x > 0, kept away from overflow and underflow, which some p would reach.
FASTMTL_HD inline double negative_power(double x, double p) {
  return p == 1 ? 1 / x : fmin(fmax(pow(x, -p), kFairLeast), 1 / kFairLeast);
}

/// x^(1/p) for x > 0.
FASTMTL_HD inline double root(double x, double p) { return p == 1 ? x : pow(x, 1 / p); }

/// The inner product of x and y, and the sum of the absolute values of its terms.
struct Product {
  double value;
  double magnitude;
};

FASTMTL_HD inline Product product(int size, double const* x, double const* y) {
  double value[4] = {0, 0, 0, 0};
  double magnitude[4] = {0, 0, 0, 0};
  int j = 0;
  for (; j + 4 <= size; j += 4) {
    for (int chain = 0; chain < 4; ++chain) {
      double const term = x[j + chain] * y[j + chain];
      value[chain] += term;
      magnitude[chain] += fabs(term);
    }
  }
  for (; j < size; ++j) {
    value[0] += x[j] * y[j];
    magnitude[0] += fabs(x[j] * y[j]);
  }
  return {(value[0] + value[1]) + (value[2] + value[3]), (magnitude[0] + magnitude[1]) + (magnitude[2] + magnitude[3])};
}

/// Fills the factor's memory with C + diag(more), `more` null for none.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void fill(Team const& team, int n, FairWork const& work, double const* more) {
  for (int c = team.group(); c < n; c += team.groups()) {
    double* const column = work.factor.column(c);
    for (int r = c + team.lane(); r < n; r += team.lanes()) {
      column[r] = work.cosine[int64_t{c} * n + r] + (r == c && more != nullptr ? more[c] : 0.0);
    }
  }
  team.barrier();
}

/// Writes C with the least ridge of 1e-10, 1e-9, ... that makes it positive definite; that is the first one unless G
/// has negative eigenvalues beyond float64's rounding.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void regularise(Team const& team, int n, double const* gram, FairWork const& work) {
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) {
      double const cosine = work.inverse[i] * gram[int64_t{i} * n + j] * work.inverse[j];
      work.cosine[int64_t{i} * n + j] = i == j ? 1 + kFairRidge : fmin(fmax(cosine, -1.0), 1.0);
    }
  }
  team.barrier();
  for (double ridge = kFairRidge; ridge < 2 * n; ridge *= 10) {
    for (int i = team.rank(); i < n; i += team.size()) work.cosine[int64_t{i} * n + i] = 1 + ridge;
    team.barrier();
    fill(team, n, work, nullptr);
    if (factor(team, work.factor, n, 0.5 * ridge) == n) return;
    team.barrier();
  }
}

/// Scales the point along its ray to the minimum there, where v'(C v) = v'(e (v/e)^-p).
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void scale_along_ray(Team const& team, int n, double p, FairWork const& work) {
  double quadratic = 0;
  double linear = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const value = work.point[i];
    quadratic += value * product(n, work.cosine + int64_t{i} * n, work.point).value;
    linear += value * work.alone[i] * negative_power(value / work.alone[i], p);
  }
  quadratic = team.sum(quadratic);
  linear = team.sum(linear);
  team.barrier();
  double const factor = root(linear / quadratic, 1 + p);
  for (int i = team.rank(); i < n; i += team.size()) {
    // Rows of length zero stand alone; they start where they end.
    work.point[i] *= work.inverse[i] > 0 ? factor : 1.0;
  }
  team.barrier();
}

/// Updates image and target; returns the largest residual of a row in units of what it may be.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double measure(Team const& team, int n, double p, FairWork const& work) {
  Choice worst{0, 0};
  for (int i = team.rank(); i < n; i += team.size()) {
    Product const image = product(n, work.cosine + int64_t{i} * n, work.point);
    double const target = work.alone[i] * negative_power(work.point[i] / work.alone[i], p);
    work.image[i] = image.value;
    work.target[i] = target;
    double const allowed = 1e-11 * target + 8 * DBL_EPSILON * image.magnitude;
    worst = lower(worst, {-fabs(image.value - target) / allowed, i});
  }
  worst = team.lowest(worst);
  team.barrier();
  return -worst.value;
}

/// The curvature of row i: of the secant of e (x/e)^-p from v_i to where it meets (C v)_i, or as far as it is trusted.
FASTMTL_HD inline double secant(double value, double image, double target, double p) {
  constexpr double shrink = 1e-6;
  double const grow = exp(1 / fmax(p, 0.2));
  double const end = fmax(image, target * negative_power(grow, p));
  double const ratio = fmax(root(target / end, p), shrink);
  if (fabs(ratio - 1) < 1e-4) return p * target / value;
  return (target - end) / ((ratio - 1) * value);
}

/// The step length at which the slope along the step has fallen to less than half: the convex objective's minimum.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double search(Team const& team, int n, double p, FairWork const& work) {
  double slope = 0;
  Choice blocking{INFINITY, n};
  for (int i = team.rank(); i < n; i += team.size()) {
    double const step = work.step[i];
    slope += (work.image[i] - work.target[i]) * step;
    if (step < 0) blocking = lower(blocking, {work.point[i] / -step, i});
  }
  slope = team.sum(slope);
  blocking = team.lowest(blocking);

  double low = 0;
  double high = blocking.value;
  double length = high > 1 ? 1 : 0.5 * high;
  for (int left = 48; left > 0; --left) {
    double here = 0;
    for (int i = team.rank(); i < n; i += team.size()) {
      double const value = (work.point[i] + length * work.step[i]) / work.alone[i];
      double const target = work.alone[i] * negative_power(value, p);
      double const slack = work.image[i] + length * work.step_image[i] - target;
      here += value > kFairLeast ? slack * work.step[i] : INFINITY;
    }
    here = team.sum(here);
    if (fabs(here) <= -0.5 * slope) return length;
    (here < 0 ? low : high) = length;
    length = high < INFINITY ? 0.5 * (low + high) : 4 * length;
  }
  return low;
}

}  // namespace detail

/// Writes the n weights for the row-major n x n matrix `gram` and p > 0, NaN if it has a non-finite entry. `warm` (n
/// weights to start near, or null) changes the time taken, not the accuracy.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void fair(Team const& team, int n, double p, double const* gram, double const* warm,
                                           double* weights, double* workspace) {
  double faults = 0;
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) faults += !(fabs(gram[int64_t{i} * n + j]) <= DBL_MAX);
  }
  faults = team.sum(faults);
  if (faults > 0) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }

  FairWork const work(workspace, n);
  double unusable = warm == nullptr;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const square = gram[int64_t{i} * n + i];
    bool const zero = square <= 0;
    work.inverse[i] = zero ? 0.0 : 1 / sqrt(square);
    work.alone[i] = zero || p == 1 ? 1.0 : pow(square, 0.5 * (p - 1) / (p + 1));
    work.point[i] = work.alone[i];
    if (warm != nullptr && !zero) {
      work.point[i] = warm[i] * sqrt(square);
      // Squares of what is further from the start than that overflow.
      double const ratio = work.point[i] / work.alone[i];
      unusable += !(ratio >= 1 / kFairFarthest && ratio <= kFairFarthest);
    }
  }
  unusable = team.sum(unusable);
  team.barrier();
  detail::regularise(team, n, gram, work);

  bool warmed = unusable == 0;
  if (warmed) {
    detail::scale_along_ray(team, n, p, work);
    // Near means: no row is off by more than its own size.
    warmed = detail::measure(team, n, p, work) <= 1e11;
  }
  if (!warmed) {
    for (int i = team.rank(); i < n; i += team.size()) work.point[i] = work.alone[i];
    team.barrier();
    detail::scale_along_ray(team, n, p, work);
  }
  for (int left = 200; left > 0 && detail::measure(team, n, p, work) > 1; --left) {
    for (int i = team.rank(); i < n; i += team.size()) {
      work.step[i] = work.target[i] - work.image[i];
      work.step_image[i] = detail::secant(work.point[i], work.image[i], work.target[i], p);
    }
    team.barrier();
    detail::fill(team, n, work, work.step_image);
    factor(team, work.factor, n, 0.0);
    solve_lower(team, work.factor, n, work.step);
    solve_upper(team, work.factor, n, work.step);
    for (int i = team.rank(); i < n; i += team.size()) {
      work.step_image[i] = detail::product(n, work.cosine + int64_t{i} * n, work.step).value;
    }
    team.barrier();
    double const length = detail::search(team, n, p, work);
    for (int i = team.rank(); i < n; i += team.size()) work.point[i] += length * work.step[i];
    team.barrier();
  }
  // A matrix that no ridge has made definite may lead anywhere.
  double lost = 0;
  for (int i = team.rank(); i < n; i += team.size()) lost += !(fabs(work.point[i] * work.inverse[i]) <= DBL_MAX);
  lost = team.sum(lost);
  for (int i = team.rank(); i < n; i += team.size()) {
    weights[i] = (lost > 0 ? work.alone[i] : work.point[i]) * work.inverse[i];
  }
}

}  // namespace fastmtl
