// Aligned-MTL: the weights that combine the T gradients after their system was given condition number one, from their
// Gram matrix G = sum_k lambda_k v_k v_k' alone:
//   w = sqrt(min lambda) sum_k (1'v_k) v_k / sqrt(lambda_k) over the eigenvalues above T 2^-23 max lambda.
#pragma once

#include <cmath>

#include "fastmtl/eigh.h"
#include "fastmtl/finite.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// An eigenvalue below this times T is not known from float32 gradients.
constexpr double kAlignedTolerance = 0x1p-23;

/// Doubles of workspace that aligned needs for n tasks.
FASTMTL_HD inline int64_t aligned_workspace(int n) { return Eigh::storage(n) + 2 * int64_t{n}; }

/// Writes the n weights for the row-major n x n matrix `gram`; NaN if it has a non-finite entry, zero if it is zero.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void aligned(Team const& team, int n, double const* gram, double* weights,
                                              double* workspace) {
  if (!all_finite(team, int64_t{n} * n, gram)) {
    for (int i = team.rank(); i < n; i += team.size()) weights[i] = NAN;
    return;
  }
  double* const scale = workspace + Eigh::storage(n);
  double* const share = scale + n;
  for (int i = team.rank(); i < n; i += team.size()) scale[i] = 1;
  team.barrier();
  Eigh const eigh = solve_eigh(team, n, gram, scale, workspace);

  double largest = 0;
  for (int k = 0; k < eigh.rank; ++k) largest = fmax(largest, eigh.value[k]);
  double const floor = n * kAlignedTolerance * largest;
  double smallest = largest;
  for (int k = 0; k < eigh.rank; ++k) {
    if (eigh.value[k] > floor) smallest = fmin(smallest, eigh.value[k]);
  }
  for (int k = team.rank(); k < eigh.rank; k += team.size()) {
    double total = 0;
    for (int i = 0; i < n; ++i) total += eigh.row(k)[i];
    // A row of the decomposition is sqrt(lambda) v.
    share[k] = eigh.value[k] > floor ? total / eigh.value[k] * sqrt(smallest / eigh.value[k]) : 0;
  }
  team.barrier();
  for (int i = team.rank(); i < n; i += team.size()) {
    double weight = 0;
    for (int k = 0; k < eigh.rank; ++k) weight += share[k] * eigh.row(k)[i];
    weights[i] = weight;
  }
}

}  // namespace fastmtl
