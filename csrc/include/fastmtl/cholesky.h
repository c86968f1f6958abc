// Cholesky factor of a small matrix that gains and loses rows, by a team of lanes. Its diagonal is kept as reciprocals,
// so that a triangular solve, whose steps wait for each other, has no division.
//
// Each function takes memory that all lanes see alike (a barrier was passed since the last write) and leaves it so.
#pragma once

#include <cmath>

#include "fastmtl/team.h"

namespace fastmtl {

/// A lower triangle packed by columns: entry (row, column), row >= column, is column(column)[row]; of a factor, the
/// diagonal's entries are 1 / L_cc.
struct PackedLower {
  double* data;
  int capacity;

  FASTMTL_HD static int64_t storage(int capacity) { return int64_t{capacity} * (capacity + 1) / 2; }
  FASTMTL_HD double* column(int index) const { return data + index * (2 * capacity - index - 1) / 2; }
};

/// Overwrites the leading `size` rows of a symmetric matrix by its Cholesky factor. Stops before the first pivot that
/// is not above `floor` and returns the number of rows that are factored.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD int factor(Team const& team, PackedLower matrix, int size, double floor) {
  for (int c = 0; c < size; ++c) {
    double* const column = matrix.column(c);
    double const pivot = column[c];
    if (!(pivot > floor)) return c;
    double const inverse = 1 / sqrt(pivot);
    team.barrier();
    for (int r = c + team.rank(); r < size; r += team.size()) column[r] = r == c ? inverse : column[r] * inverse;
    team.barrier();
    for (int s = c + 1 + team.group(); s < size; s += team.groups()) {
      double const multiplier = column[s];
      double* const target = matrix.column(s);
      for (int r = s + team.lane(); r < size; r += team.lanes()) target[r] -= multiplier * column[r];
    }
    team.barrier();
  }
  return size;
}

/// x <- L^-1 x.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve_lower(Team const& team, PackedLower lower, int size, double* x) {
  for (int c = 0; c < size; ++c) {
    double const* const column = lower.column(c);
    double const value = x[c] * column[c];
    for (int r = c + 1 + team.rank(); r < size; r += team.size()) x[r] -= column[r] * value;
    team.barrier();
  }
  for (int c = team.rank(); c < size; c += team.size()) x[c] *= lower.column(c)[c];
  team.barrier();
}

/// x <- L^-T x.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve_upper(Team const& team, PackedLower lower, int size, double* x) {
  for (int c = size - 1; c >= 0; --c) {
    double const value = x[c] * lower.column(c)[c];
    for (int r = team.rank(); r < c; r += team.size()) x[r] -= lower.column(r)[c] * value;
    team.barrier();
  }
  for (int c = team.rank(); c < size; c += team.size()) x[c] *= lower.column(c)[c];
  team.barrier();
}

/// Adds a last row to the factor: `row` = L^-1 a for the matrix's new row a, `pivot` > 0 what is left of its diagonal.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void append_row(Team const& team, PackedLower lower, int size, double const* row,
                                                 double pivot) {
  for (int c = team.rank(); c < size; c += team.size()) lower.column(c)[size] = row[c];
  if (team.rank() == 0) lower.column(size)[size] = 1 / sqrt(pivot);
  team.barrier();
}

/// Takes one row and column out of the factored matrix: plane rotations of neighbouring columns restore the triangle.
FASTMTL_TEAM_TEMPLATE FASTMTL_HD void remove_row(Team const& team, PackedLower lower, int size, int position) {
  for (int c = position; c + 1 < size; ++c) {
    double* const left = lower.column(c);
    double* const right = lower.column(c + 1);
    double const diagonal = 1 / right[c + 1];
    double const inverse = 1 / sqrt(left[c + 1] * left[c + 1] + diagonal * diagonal);
    double const cosine = left[c + 1] * inverse;
    double const sine = diagonal * inverse;
    team.barrier();
    if (team.rank() == 0) left[c + 1] = inverse;
    for (int r = c + 2 + team.rank(); r < size; r += team.size()) {
      double const old = left[r];
      left[r] = cosine * old + sine * right[r];
      right[r] = cosine * right[r] - sine * old;
    }
    team.barrier();
  }
  for (int c = team.rank(); c + 1 < size; c += team.size()) {
    double* const column = lower.column(c);
    for (int r = c < position ? position : c; r + 1 < size; ++r) column[r] = column[r + 1];
  }
  team.barrier();
}

}  // namespace fastmtl
