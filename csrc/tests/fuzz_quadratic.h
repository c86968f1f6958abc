// Cases of the solvers over the simplex and the orthant: min_norm, dual_cone, nonneg_qp and upgrad, held to the
// optimality conditions that their specifications state.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "fastmtl/dual_cone.h"
#include "fastmtl/min_norm.h"
#include "fastmtl/nonneg_qp.h"
#include "fastmtl/upgrad.h"
#include "fuzz_trial.h"

namespace fuzz {

/// The longest that a weighted sum of the rows could be.
inline Wide mass_of(Gram const& gram, Vector const& weights) {
  Wide mass = 0;
  for (int i = 0; i < gram.n; ++i) mass += std::fabs(weights[i]) * gram.length(i);
  return mass;
}

inline void check_simplex(Trial& trial, Vector const& weights, std::string const& where) {
  Wide total = 0;
  bool nonnegative = true;
  for (double w : weights) {
    total += w;
    nonnegative = nonnegative && w >= 0;
  }
  trial.check(nonnegative && std::fabs(total - 1) <= 1e-14L, "not on the simplex, " + where);
}

inline void fuzz_min_norm(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  Vector const warm = draw_warm(trial);
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::min_norm_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::min_norm(team, n, gram.entries.data(), data_or_null(warm), weights, memory);
    });
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite())) return;
    check_simplex(trial, weights, where);
    int zeros = 0;
    for (int i = 0; i < n; ++i) zeros += gram.zero(i);
    for (int i = 0; i < n && zeros > 0; ++i) {
      trial.check(weights[i] == (gram.zero(i) ? 1.0 / zeros : 0), "zero rows do not share, " + where);
    }
    if (!trial.exact() || zeros > 0) return;
    std::vector<Wide> const image = image_of(gram, weights);
    Wide square = 0;
    for (int i = 0; i < n; ++i) square += weights[i] * image[i];
    Wide worst = 0;
    for (int i = 0; i < n; ++i) {
      Wide const granted = 1e-12L * gram.length(i) * mass_of(gram, weights);
      worst = std::max(worst, ((1 - 1e-6L) * square - image[i]) / granted);
    }
    trial.within(worst, "optimality, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    // What two points may differ by of which each meets the bound.
    Wide const granted = 1e-6L * (apart(gram, one, Vector(n)) + apart(gram, many, Vector(n))) +
                         4e-12L * mass_of(gram, one) * mass_of(gram, many);
    trial.check(apart(gram, one, many) <= granted, "lanes disagree");
  };
  on_one_and_many(trial, solve, check, agree);
}

/// The largest violation by v of the conditions of the projection of u, in units of what is granted.
inline Wide dual_cone_excess(Gram const& gram, Vector const& u, Vector const& v) {
  Wide mass = 0;
  for (int i = 0; i < gram.n; ++i) {
    if (!(v[i] >= u[i]) || (gram.zero(i) && v[i] != u[i])) return INFINITY;
    mass += gram.length(i) * (std::fabs(u[i]) + v[i] - u[i]);
  }
  std::vector<Wide> const image = image_of(gram, v);
  Wide worst = 0;
  for (int i = 0; i < gram.n; ++i) {
    Wide const wrong = v[i] > u[i] ? std::fabs(image[i]) : -image[i];
    if (wrong > 0) worst = std::max(worst, wrong / (1e-12L * mass * gram.length(i)));
  }
  return worst;
}

/// Whether two points differ by what each may be off: `mass` is the sum of both scales s.
inline void check_orthant_agrees(Trial& trial, Gram const& gram, Vector const& one, Vector const& many, Wide mass) {
  Wide way = 0;
  for (int i = 0; i < gram.n; ++i) way += std::fabs(static_cast<Wide>(one[i]) - many[i]) * gram.length(i);
  trial.check(apart(gram, one, many) <= 1e-12L * mass * way * (1 + 1e-6L), "lanes disagree");
}

inline void fuzz_dual_cone(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  Vector target(n);
  int const which = trial.draw.below(4);
  double const scale = which == 3 ? trial.draw.power(-30, 30) : 1;
  for (double& u : target) u = scale * (which == 1 ? 1.0 / n : trial.draw.normal());
  if (which == 2) std::fill(target.begin(), target.end(), 0.0);
  if (which == 2) target[trial.draw.below(n)] = trial.draw.below(3) - 0.5;
  bool const bad = trial.draw.chance(0.02);
  if (bad) target[trial.draw.below(n)] = trial.draw.among(std::array<double, 3>{NAN, INFINITY, -INFINITY});
  trial.parameters << " target " << which << (bad ? ", not finite" : "");
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::dual_cone_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::dual_cone(team, n, gram.entries.data(), target.data(), weights, memory);
    });
  };
  auto check = [&](Vector const& v, std::string const& where) {
    if (!trial.sane(v, bad || trial.not_finite())) return;
    bool above = true;
    for (int i = 0; i < n; ++i) above = above && v[i] >= target[i];
    trial.check(above, "below its target, " + where);
    if (trial.exact()) trial.within(dual_cone_excess(gram, target, v), "optimality, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    if (bad) return;
    Wide mass = 0;
    for (int i = 0; i < n; ++i) {
      mass += gram.length(i) * (2 * std::fabs(target[i]) + one[i] - target[i] + many[i] - target[i]);
    }
    check_orthant_agrees(trial, gram, one, many, mass);
  };
  on_one_and_many(trial, solve, check, agree);
}

/// The largest |b_i| / d_i plus the mass of y: the scale of the program's bounds.
inline Wide program_scale(Gram const& gram, Vector const& linear, Vector const& y) {
  Wide scale = 0;
  for (int i = 0; i < gram.n; ++i) {
    if (!gram.zero(i)) scale = std::max(scale, std::fabs(linear[i]) / gram.length(i));
  }
  return scale + mass_of(gram, y);
}

inline void fuzz_nonneg_qp(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  Vector linear(n);
  int const which = trial.draw.below(4);
  // Products with a common vector are bounded whatever G does not see; others are where all of them are negative.
  double const scale = which == 3 ? trial.draw.power(-20, 20) : 1;
  Vector common(gram.width);
  for (double& x : common) x = trial.draw.normal();
  for (int i = 0; i < n; ++i) {
    if (which == 1) {
      linear[i] = -trial.draw.uniform(0, 1) * static_cast<double>(gram.length(i));
    } else if (which == 2) {
      linear[i] = trial.draw.normal() * static_cast<double>(gram.length(i));
    } else {
      Wide product = 0;
      for (int k = 0; k < gram.width; ++k) product += static_cast<Wide>(gram.row(i)[k]) * common[k];
      linear[i] = scale * static_cast<double>(product);
    }
  }
  bool const bad = trial.draw.chance(0.02);
  if (bad) linear[trial.draw.below(n)] = trial.draw.among(std::array<double, 3>{NAN, INFINITY, -INFINITY});
  bool const bounded = which != 2 || gram.kind == "full rank" || gram.kind == "orthogonal";
  trial.parameters << " right side " << which << (bad ? ", not finite" : "");
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::nonneg_qp_workspace(n), [&](auto const& team, double* y, double* memory) {
      fastmtl::nonneg_qp(team, n, gram.entries.data(), linear.data(), y, memory);
    });
  };
  auto check = [&](Vector const& y, std::string const& where) {
    if (!trial.sane(y, bad || trial.not_finite())) return;
    bool feasible = true;
    for (int i = 0; i < n; ++i) feasible = feasible && y[i] >= 0 && (!gram.zero(i) || y[i] == 0);
    trial.check(feasible, "infeasible, " + where);
    if (!trial.exact() || !bounded) return;
    std::vector<Wide> const image = image_of(gram, y);
    Wide const mass = program_scale(gram, linear, y);
    Wide worst = 0;
    for (int i = 0; i < n; ++i) {
      Wide const slope = image[i] - linear[i];
      Wide const wrong = y[i] > 0 ? std::fabs(slope) : -slope;
      if (wrong > 0 && !gram.zero(i)) worst = std::max(worst, wrong / (1e-12L * mass * gram.length(i)));
    }
    trial.within(worst, "optimality, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    if (bad || !bounded) return;
    check_orthant_agrees(trial, gram, one, many, program_scale(gram, linear, one) + program_scale(gram, linear, many));
  };
  on_one_and_many(trial, solve, check, agree);
}

/// The matrix in whose dual cone UPGrad projects.
inline Gram upgrad_reference_matrix(Gram const& gram, double norm_eps, double reg_eps) {
  Wide trace = 0;
  for (int i = 0; i < gram.n; ++i) trace += gram(i, i);
  bool const dropped = trace < norm_eps || trace == 0;
  Gram matrix = gram;
  for (int i = 0; i < gram.n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double const scaled = dropped ? 0 : static_cast<double>(gram(i, j) / trace);
      matrix.set(i, j, scaled + (i == j ? reg_eps : 0));
    }
  }
  return matrix;
}

/// The projections one by one, as CUDA takes them, and their sum, as a CPU does.
inline void fuzz_upgrad(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  double const norm_eps = trial.draw.among(std::array<double, 4>{0, 0, 1e-4, 1e300});
  double const reg_eps = trial.draw.among(std::array<double, 3>{0, 1e-4, 0.1});
  trial.parameters << " norm_eps " << norm_eps << " reg_eps " << reg_eps;
  Gram const matrix = upgrad_reference_matrix(gram, norm_eps, reg_eps);
  auto solve = [&](Shape shape) {
    Vector weights = trial.solve(shape, fastmtl::upgrad_workspace(n), [&](auto const& team, double* w, double* memory) {
      fastmtl::upgrad(team, n, norm_eps, reg_eps, gram.entries.data(), w, memory);
    });
    int64_t const doubles = int64_t{n} * n + fastmtl::upgrad_project_workspace(n);
    Vector sum(n);
    for (int task = 0; task < n; ++task) {
      Vector const v = trial.solve(shape, doubles, [&](auto const& team, double* projected, double* memory) {
        fastmtl::upgrad_matrix(team, n, norm_eps, reg_eps, gram.entries.data(), memory);
        fastmtl::upgrad_project(team, n, task, memory, projected, memory + int64_t{n} * n);
      });
      Vector target(n);
      target[task] = 1.0 / n;
      if (trial.exact()) trial.within(dual_cone_excess(matrix, target, v), "projection " + std::to_string(task));
      for (int i = 0; i < n; ++i) sum[i] += v[i];
    }
    trial.check(trial.not_finite() || sum == weights, "the sum is not that of the projections");
    return weights;
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite())) return;
    for (double w : weights) trial.check(w >= 1.0 / n, "less than 1/T, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    check_orthant_agrees(trial, matrix, one, many, n * (mass_of(matrix, one) + mass_of(matrix, many)));
  };
  on_one_and_many(trial, solve, check, agree);
}

}  // namespace fuzz
