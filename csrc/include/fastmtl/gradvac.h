// Gradient Vaccine from the Gram matrix of one group of parameters: where the cosine of a task's gradient p with
// another one, g_j, is below its running average rho_ij, enough of g_j is added to p to bring it there.
//
// |p| is kept beside the products <p, g_k>. Both are sums whose rounding is relative to the length of all that p was
// made of; a p much shorter than that is rounding, and so would its cosines be.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastmtl/surgery.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Targets are brought into [-kGradvacTarget, kGradvacTarget]: what it takes to reach a cosine of 1 is infinite, and
/// near it, rounding decides.
constexpr double kGradvacTarget = 1 - 0x1p-20;
/// Most that one step adds to p, in lengths of g_i: no chain of steps is infinite.
constexpr double kGradvacLongest = 0x1p100;
/// Squares of lengths that are zero as far as float64 can tell: of p, in units of its path from 0, and of the part of p
/// that is normal to g_j, in units of p.
constexpr double kGradvacResolution = 0x1p-44;

/// Doubles of workspace that gradvac needs for n tasks and a team of `groups` groups.
FASTMTL_HD inline int64_t gradvac_workspace(int n, int groups) { return n + SurgeryWork::storage(n, groups); }

/// One task's vector p.
struct Vaccinated {
  double length;  // |g_i|
  double path;    // of p from 0
  double square;  // |p|^2

  FASTMTL_HD bool resolved() const { return square > kGradvacResolution * path * path; }

  /// The multiple of a vector of length `other` that brings p, now at `cosine` to it, to the cosine `target`.
  FASTMTL_HD double amount(double cosine, double target, double other) const {
    target = fmin(fmax(target, -kGradvacTarget), kGradvacTarget);
    if (!(cosine < target)) return 0;
    double const sine = sqrt(1 - target * target);
    double const normal = 1 - cosine * cosine;
    double const outside = normal > kGradvacResolution ? sqrt(normal) : 0.0;
    double const added = sqrt(square) * (target * outside - cosine * sine) / sine;
    return fmin(fmax(added, 0.0), kGradvacLongest * length) / other;
  }

  /// Follows p as it gets `amount` of a vector of length `other`, with which its product was `product`.
  FASTMTL_HD void add(double amount, double product, double other) {
    path += amount * other;
    square += amount * (2 * product + amount * other * other);
  }
};

/// Writes the n weights for the symmetric n x n matrix `gram` and moves the averages in `rho` (n x n). Row i of
/// `orders` (n x steps) names the tasks that gradient i meets, first to last; itself, and what is no task, is passed
/// over. A non-finite entry of `gram` or `rho` makes the weights NaN and leaves `rho` alone.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void gradvac(Team const& team, int n, int64_t steps, double const* gram,
                                              int64_t const* orders, double beta, double* rho, double* weights,
                                              double* workspace) {
  if (surgery::count_faults(team, n, gram) + surgery::count_faults(team, n, rho) > 0) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }
  double* const length = workspace;
  SurgeryWork const work(workspace + n, n, team.group(), team.groups());
  for (int k = team.rank(); k < n; k += team.size()) length[k] = sqrt(fmax(gram[int64_t{k} * n + k], 0.0));
  surgery::clear(team, n, work);
  team.barrier();
  // A group without a task in the last round keeps the others company at the barriers.
  for (int first = 0; first < n; first += team.groups()) {
    int const i = first + team.group();
    Vaccinated p{};
    if (i < n) {
      surgery::begin(team, n, gram, i, work);
      p = {length[i], length[i], length[i] * length[i]};
    }
    team.barrier();
    for (int64_t step = 0; step < steps; ++step) {
      int64_t const j = i < n ? orders[i * steps + step] : -1;
      bool const meets = j >= 0 && j < n && j != i;
      double cosine = 0;
      double amount = 0;
      double average = 0;
      if (meets) {
        average = rho[int64_t{i} * n + j];
        if (length[j] > 0 && p.resolved()) {
          double const product = work.image[j];
          cosine = fmin(fmax(product / (sqrt(p.square) * length[j]), -1.0), 1.0);
          amount = p.amount(cosine, average, length[j]);
          p.add(amount, product, length[j]);
        }
      }
      team.barrier();
      if (meets && team.lane() == 0) rho[int64_t{i} * n + j] = (1 - beta) * average + beta * cosine;
      if (amount > 0) surgery::add(team, n, gram, static_cast<int>(j), amount, work);
      team.barrier();
    }
  }
  surgery::finish(team, n, work, weights);
}

}  // namespace fastmtl
