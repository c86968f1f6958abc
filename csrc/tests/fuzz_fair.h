// Cases of the solvers that search: cagrad on the simplex, fair for a fixed point.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "fastmtl/cagrad.h"
#include "fastmtl/fair.h"
#include "fuzz_quadratic.h"

namespace fuzz {

/// F(w) = <g_w, g_0> + c |g_0| |g_w| and its scales, from G in long double.
struct Cagrad {
  Gram const& gram;
  Wide c;
  std::vector<Wide> mean;
  Wide mean_length = 0;
  Wide average_length = 0;

  Cagrad(Gram const& of, double radius) : gram(of), c(radius), mean(of.n) {
    Wide square = 0;
    for (int i = 0; i < gram.n; ++i) {
      for (int j = 0; j < gram.n; ++j) mean[i] += static_cast<Wide>(gram(i, j)) / gram.n;
      square += mean[i] / gram.n;
      average_length += gram.length(i) / gram.n;
    }
    mean_length = std::sqrt(std::fmax(square, 0.0L));
  }

  Wide length(Vector const& w) const { return std::sqrt(std::fmax(apart(gram, w, Vector(gram.n)), 0.0L)); }

  Wide value(Vector const& w) const {
    Wide along = 0;
    for (int i = 0; i < gram.n; ++i) along += w[i] * mean[i];
    return along + c * mean_length * length(w);
  }

  Wide scale(int i, Wide mass) const { return (1 + c) * mean_length * (gram.length(i) + mass); }

  /// The largest violation of the optimality condition, in units of what is granted.
  Wide excess(Vector const& w) const {
    std::vector<Wide> const image = image_of(gram, w);
    Wide const best = value(w);
    Wide const reach = c * mean_length / length(w);
    // The square of |g_0| is a sum with the rounding of the mean length's.
    Wide const ratio = average_length / mean_length;
    Wide const share = 1e-8L + 0x1p-48L * ratio * ratio;
    Wide worst = 0;
    for (int i = 0; i < gram.n; ++i) {
      Wide const granted = share * scale(i, mass_of(gram, w));
      worst = std::max(worst, (best - mean[i] - reach * image[i]) / granted);
    }
    return worst;
  }

  /// How much F(w) is above F(v), in units of what it may be.
  Wide above(Vector const& w, Vector const& v) const {
    Wide granted = 0;
    for (int i = 0; i < gram.n; ++i) granted += 1e-6L * v[i] * scale(i, mass_of(gram, w));
    Wide const more = value(w) - value(v);
    return more > 0 ? more / granted : 0;
  }
};

inline void fuzz_cagrad(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  int const which = trial.draw.below(6);
  double const c = which == 0   ? trial.draw.among(std::array<double, 4>{0, 1e-9, 1e-8, 1e-7})
                   : which == 1 ? trial.draw.power(2, 9)
                                : trial.draw.power(-5, 2);
  trial.parameters << " c " << c;
  Cagrad const problem(gram, c);
  // The weights, and behind them the update's coefficients.
  auto solve = [&](Shape shape) {
    auto body = [&](auto const& team, double* result, double* memory) {
      fastmtl::cagrad(team, n, c, gram.entries.data(), result, memory);
      fastmtl::cagrad_step(team, n, c, gram.entries.data(), result, result + n);
    };
    return trial.solve(shape, fastmtl::cagrad_workspace(n), body, 2 * n);
  };
  bool const known = problem.mean_length > 2e-7L * problem.average_length;
  auto check = [&](Vector const& result, std::string const& where) {
    Vector const weights(result.begin(), result.begin() + n);
    // Far from semidefinite, |g_w| may be the root of a negative number for every w.
    if (gram.kind == "indefinite") return;
    if (!trial.sane(weights, trial.not_finite()) || !trial.sane(result, false)) return;
    check_simplex(trial, weights, where);
    if (!trial.exact() || !known) return;
    Wide const length = problem.length(weights);
    bool const clear = length > 1e-4L * mass_of(gram, weights);
    if (clear && c >= 1e-5 && c <= 100) trial.within(problem.excess(weights), "optimality, " + where);
    // From here on 1e-8 of |g_0| is known.
    if (clear && problem.mean_length > 1e-3L * problem.average_length) {
      Wide worst = 0;
      for (int i = 0; i < n; ++i) {
        Wide const wanted = 1.0L / n + c * problem.mean_length / length * weights[i];
        worst = std::max(worst, std::fabs(result[n + i] - wanted) / (1e-7L * std::fabs(wanted)));
      }
      trial.within(worst, "update, " + where);
    }
    if (c > 100) return;
    Wide worst = problem.above(weights, Vector(n, 1.0 / n));
    for (int i = 0; i < n; ++i) {
      Vector corner(n);
      corner[i] = 1;
      if (i < 8) worst = std::max(worst, problem.above(weights, corner));
    }
    trial.within(worst, "value, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    if (!known || c > 100) return;
    Vector const a(one.begin(), one.begin() + n);
    Vector const b(many.begin(), many.begin() + n);
    trial.within(std::max(problem.above(a, b), problem.above(b, a)), "lanes disagree,");
  };
  on_one_and_many(trial, solve, check, agree);
}

/// The residuals that are granted, one per row, and the largest one found in units of them.
struct FairResidual {
  std::vector<Wide> granted;
  Wide worst = 0;
};

inline FairResidual fair_residual(Gram const& gram, double power, Vector const& w) {
  FairResidual result{std::vector<Wide>(gram.n)};
  for (int i = 0; i < gram.n; ++i) {
    if (gram.zero(i)) continue;
    Wide image = 1e-10L * gram(i, i) * w[i];
    Wide magnitude = image;
    for (int j = 0; j < gram.n; ++j) {
      Wide const term = static_cast<Wide>(gram(i, j)) * w[j];
      image += term;
      magnitude += std::fabs(term);
    }
    Wide const target = std::pow(static_cast<Wide>(w[i]), -static_cast<Wide>(power));
    result.granted[i] = 1e-10L * target + 1e-14L * magnitude;
    Wide const residual = std::fabs(image - target) / result.granted[i];
    if (!(residual <= result.worst)) result.worst = residual;
  }
  return result;
}

inline void fuzz_fair(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  int const which = trial.draw.below(6);
  double const alpha = which < 2    ? 1
                       : which == 2 ? trial.draw.among(std::array<double, 4>{1e-3, 1e3, 0.05, 30})
                                    : trial.draw.power(-1, 0.69);
  double const power = 1 / alpha;
  trial.parameters << " alpha " << alpha;
  Wide shortest = INFINITY;
  Wide longest = 0;
  for (int i = 0; i < n; ++i) {
    if (gram.zero(i)) continue;
    shortest = std::min(shortest, gram.length(i));
    longest = std::max(longest, gram.length(i));
  }
  bool const bound = trial.exact() && (alpha == 1 || (which > 2 && longest <= 1e12L * shortest));
  auto solve_from = [&](Shape shape, Vector const& warm) {
    return trial.solve(shape, fastmtl::fair_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::fair(team, n, power, gram.entries.data(), data_or_null(warm), weights, memory);
    });
  };
  Vector warm = draw_warm(trial);
  if (!warm.empty() && trial.draw.chance(0.5) && !trial.not_finite()) {
    trial.parameters << " near the solution";
    warm = solve_from(Shape{}, {});
    for (double& w : warm) w *= 1 + 0.1 * trial.draw.normal();
  }
  auto solve = [&](Shape shape) { return solve_from(shape, warm); };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite())) return;
    for (int i = 0; i < n; ++i) {
      trial.check(gram.zero(i) ? weights[i] == 0 : weights[i] > 0 || !bound, "sign of a weight, " + where);
    }
    if (bound) trial.within(fair_residual(gram, power, weights).worst, "equation, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    if (!bound) return;
    std::vector<Wide> const first = fair_residual(gram, power, one).granted;
    std::vector<Wide> const second = fair_residual(gram, power, many).granted;
    // The equation is a monotone one: what its residuals may be bounds the distance.
    Wide granted = 0;
    for (int i = 0; i < n; ++i) granted += std::fabs(static_cast<Wide>(one[i]) - many[i]) * (first[i] + second[i]);
    trial.check(apart(gram, one, many) <= granted, "lanes disagree");
  };
  on_one_and_many(trial, solve, check, agree);
}

}  // namespace fuzz
