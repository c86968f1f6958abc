// Gradient surgery in coefficients: one gradient after another has multiples of the others added until it suits them.
//
// Every task i has a vector p = g_i at first, of which only the image <p, g_k> over all k is kept: adding a g_j to p
// adds a G_j. to the image. Tasks do not see each other's p, so each group of lanes takes a task of its own; what was
// added is summed by group. The functions hold no barrier, as their callers have more to order than the image.
#pragma once

#include <cfloat>
#include <cmath>

#include "fastmtl/team.h"

namespace fastmtl {

/// Memory of the calling group of lanes and, for the sum over groups, of all.
struct SurgeryWork {
  double* image;  // <p, g_k> of the group's task
  double* added;  // sum of the multiples of g_k, over the group's tasks
  double* all_added;

  FASTMTL_HD static int64_t storage(int size, int groups) { return int64_t{2} * groups * size; }

  FASTMTL_HD SurgeryWork(double* memory, int size, int group, int groups)
      : image(memory + int64_t{groups + group} * size), added(memory + int64_t{group} * size), all_added(memory) {}
};

namespace surgery {

/// The number of NaNs and infinities in a square matrix. A collective.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD double count_faults(Team const& team, int n, double const* matrix) {
  double faults = 0;
  for (int i = team.group(); i < n; i += team.groups()) {
    for (int j = team.lane(); j < n; j += team.lanes()) faults += !(fabs(matrix[int64_t{i} * n + j]) <= DBL_MAX);
  }
  return team.sum(faults);
}

FASTMTL_TEAM_TEMPLATE FASTMTL_HD void clear(Team const& team, int n, SurgeryWork const& work) {
  for (int k = team.lane(); k < n; k += team.lanes()) work.added[k] = 0;
}

/// p <- g_i.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void begin(Team const& team, int n, double const* gram, int i,
                                            SurgeryWork const& work) {
  for (int k = team.lane(); k < n; k += team.lanes()) work.image[k] = gram[int64_t{i} * n + k];
}

/// p <- p + amount g_j.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void add(Team const& team, int n, double const* gram, int j, double amount,
                                          SurgeryWork const& work) {
  double const* const row = gram + int64_t{j} * n;
  for (int k = team.lane(); k < n; k += team.lanes()) work.image[k] += amount * row[k];
  if (team.lane() == 0) work.added[j] += amount;
}

/// The coefficients of the sum of all p.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void finish(Team const& team, int n, SurgeryWork const& work, double* weights) {
  for (int k = team.rank(); k < n; k += team.size()) {
    double weight = 1;
    for (int g = 0; g < team.groups(); ++g) weight += work.all_added[int64_t{g} * n + k];
    weights[k] = weight;
  }
}

}  // namespace surgery
}  // namespace fastmtl
