// The direction onto which T gradients project equally once they have unit length (IMTL-G, ConFIG), from their Gram
// matrix alone: sum_i x_i g_i / d_i with d_i = sqrt(G_ii), C = G / (d d') and x = pinv(C) 1.
#pragma once

#include <cmath>

#include "fastmtl/eigh.h"
#include "fastmtl/team.h"

namespace fastmtl {

/// Float32 gradients leave an entry of C uncertain by this, its eigenvalues by T times as much at most.
constexpr double kCosineTolerance = 0x1p-23;

/// The direction; all vectors have one entry per gradient, zero where the gradient is.
struct EqualProjection {
  double* inverse;  // 1 / d
  double* weight;   // x
  double* image;    // C x, the cosines up to a factor: ones where C has no eigenvalue within the tolerance
  double* share;    // work, by eigenvalue
  double* memory;   // work, Eigh::storage

  FASTMTL_HD static int64_t storage(int size) { return Eigh::storage(size) + 4 * int64_t{size}; }

  FASTMTL_HD EqualProjection(double* workspace, int size) : inverse(workspace) {
    weight = inverse + size;
    image = weight + size;
    share = image + size;
    memory = share + size;
  }
};

/// Computes the direction for a finite matrix `gram`. Eigenvalues of C up to n times the tolerance count as zero. Where
/// the ones lie in the space of those, no direction has equal cosines with all gradients, and x is zero.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve_equal_projection(Team const& team, int n, double const* gram,
                                                             EqualProjection const& projection) {
  double count = 0;
  for (int i = team.rank(); i < n; i += team.size()) {
    double const square = gram[int64_t{i} * n + i];
    projection.inverse[i] = square > 0 ? 1 / sqrt(square) : 0;
    count += square > 0;
  }
  count = team.sum(count);
  team.barrier();
  Eigh const eigh = solve_eigh(team, n, gram, projection.inverse, projection.memory);

  double const floor = n * kCosineTolerance;
  double reached = 0;
  for (int k = team.rank(); k < eigh.rank; k += team.size()) {
    double total = 0;
    for (int i = 0; i < n; ++i) total += eigh.row(k)[i];
    projection.share[k] = eigh.value[k] > floor ? total / eigh.value[k] : 0;
    reached += projection.share[k] * total;
  }
  reached = team.sum(reached);
  team.barrier();
  for (int i = team.rank(); i < n; i += team.size()) {
    double weight = 0;
    double image = 0;
    for (int k = 0; k < eigh.rank; ++k) {
      double const part = projection.share[k] * eigh.row(k)[i];
      weight += part / eigh.value[k];
      image += part;
    }
    projection.weight[i] = reached > floor * count ? weight : 0;
    projection.image[i] = reached > floor * count ? image : 0;
  }
  team.barrier();
}

}  // namespace fastmtl
