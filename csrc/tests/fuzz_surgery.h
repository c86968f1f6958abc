// Cases of pcgrad and gradvac, against the papers' loops over the gradients themselves in long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "fastmtl/gradvac.h"
#include "fastmtl/pcgrad.h"
#include "fuzz_trial.h"

namespace fuzz {

struct Orders {
  int64_t steps;
  std::vector<int64_t> tasks;
};

/// Permutations, or a few tasks of any kind and what is no task.
inline Orders draw_orders(Trial& trial) {
  Draw& draw = trial.draw;
  int const n = trial.gram.n;
  bool const permuted = draw.chance(0.7);
  Orders orders{permuted ? n : draw.below(12), {}};
  std::array<int64_t, 4> const no_task{-1, n, INT64_MIN, INT64_MAX};
  for (int i = 0; i < n; ++i) {
    for (int64_t s = 0; s < orders.steps; ++s) {
      orders.tasks.push_back(permuted ? s : draw.chance(0.1) ? draw.among(no_task) : draw.below(n));
      if (permuted) std::swap(orders.tasks.back(), orders.tasks[i * int64_t{n} + draw.below(static_cast<int>(s) + 1)]);
    }
  }
  trial.parameters << (permuted ? " permutations" : " any orders of ") << (permuted ? 0 : orders.steps);
  return orders;
}

inline Wide dot(int width, Wide const* x, Wide const* y) {
  Wide sum = 0;
  for (int k = 0; k < width; ++k) sum += x[k] * y[k];
  return sum;
}

inline std::vector<Wide> wide_rows(Gram const& gram) { return {gram.rows.begin(), gram.rows.end()}; }

/// The length of `update` less sum_i w_i g_i.
inline Wide distance(Gram const& gram, std::vector<Wide> const& rows, Vector const& weights, std::vector<Wide> update) {
  for (int i = 0; i < gram.n; ++i) {
    for (int k = 0; k < gram.width; ++k) update[k] -= weights[i] * rows[static_cast<size_t>(i) * gram.width + k];
  }
  return std::sqrt(dot(gram.width, update.data(), update.data()));
}

inline void fuzz_pcgrad(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  int const width = gram.width;
  Orders const orders = draw_orders(trial);
  std::vector<Wide> const rows = wide_rows(gram);
  std::vector<Wide> update(width);
  std::vector<Wide> p(width);
  Wide lengths = 0;
  for (int i = 0; i < n; ++i) {
    std::copy_n(&rows[static_cast<size_t>(i) * width], width, p.begin());
    lengths += gram.length(i);
    for (int64_t s = 0; s < orders.steps; ++s) {
      int64_t const j = orders.tasks[i * orders.steps + s];
      if (j < 0 || j >= n) continue;
      Wide const* const other = &rows[static_cast<size_t>(j) * width];
      Wide const product = dot(width, p.data(), other);
      Wide const square = dot(width, other, other);
      if (!(product < 0 && square > 0)) continue;
      for (int k = 0; k < width; ++k) p[k] -= product / square * other[k];
    }
    for (int k = 0; k < width; ++k) update[k] += p[k];
  }
  auto solve = [&](Shape shape) {
    return trial.solve(
        shape, fastmtl::pcgrad_workspace(n, shape.groups), [&](auto const& team, double* weights, double* memory) {
          fastmtl::pcgrad(team, n, orders.steps, gram.entries.data(), orders.tasks.data(), weights, memory);
        });
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (gram.kind == "indefinite" || !trial.sane(weights, trial.not_finite()) || !trial.exact()) return;
    Wide const error = distance(gram, rows, weights, update);
    trial.within(lengths > 0 ? error / (1e-12L * lengths) : error, "update, " + where);
    for (int i = 0; i < n; ++i) trial.check(weights[i] >= 1, "a weight below one, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    Vector difference(n);
    for (int i = 0; i < n; ++i) difference[i] = one[i] - many[i];
    Wide const error = distance(gram, rows, difference, std::vector<Wide>(width));
    trial.check(error <= 2e-12L * lengths, "lanes disagree");
  };
  on_one_and_many(trial, solve, check, agree);
}

/// What Gradient Vaccine makes of the gradients, and how far its averages may be off.
struct Vaccinated {
  std::vector<Wide> update;
  Wide path = 0;
  std::vector<Wide> rho;
  std::vector<Wide> doubt;
  // Averages that move with each visit can leave the targets for which there is a bound.
  bool granted = true;
};

/// The update and the averages on the gradients. Vectors p may be off by 1e-6 of their path, their squares by 1e-13.
inline Vaccinated vaccinate(Gram const& gram, Orders const& orders, Vector const& rho, double beta) {
  int const n = gram.n;
  int const width = gram.width;
  std::vector<Wide> const rows = wide_rows(gram);
  Vaccinated result{std::vector<Wide>(width), 0, {rho.begin(), rho.end()}, std::vector<Wide>(rho.size(), 1e-15L)};
  std::vector<Wide> p(width);
  for (int i = 0; i < n; ++i) {
    std::copy_n(&rows[static_cast<size_t>(i) * width], width, p.begin());
    Wide path = std::sqrt(dot(width, p.data(), p.data()));
    for (int64_t s = 0; s < orders.steps; ++s) {
      int64_t const j = orders.tasks[i * orders.steps + s];
      if (j < 0 || j >= n || j == i) continue;
      Wide const* const other = &rows[static_cast<size_t>(j) * width];
      Wide const length = std::sqrt(dot(width, other, other));
      Wide const norm = std::sqrt(dot(width, p.data(), p.data()));
      Wide& average = result.rho[static_cast<size_t>(i) * n + j];
      Wide& doubt = result.doubt[static_cast<size_t>(i) * n + j];
      Wide cosine = 0;
      Wide unsure = 0;
      if (length > 0 && norm > 0x1p-22L * path) {
        cosine = std::clamp(dot(width, p.data(), other) / (norm * length), -1.0L, 1.0L);
        unsure = 1e-6L * path / norm + 1e-13L * (path / norm) * (path / norm);
        if (cosine < average) {
          result.granted = result.granted && std::fabs(average) <= 0.9L;
          Wide const sine = std::sqrt(1 - average * average);
          Wide const added = norm * (average * std::sqrt(1 - cosine * cosine) - cosine * sine) / sine;
          for (int k = 0; k < width; ++k) p[k] += added / length * other[k];
          path += added;
        }
      }
      average = (1 - static_cast<Wide>(beta)) * average + beta * cosine;
      doubt = (1 - static_cast<Wide>(beta)) * doubt + beta * unsure + 1e-15L;
    }
    for (int k = 0; k < width; ++k) result.update[k] += p[k];
    result.path += path;
  }
  return result;
}

inline void fuzz_gradvac(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  int const entries = n * n;
  Orders const orders = draw_orders(trial);
  bool const extreme = trial.draw.chance(0.25);
  double const most = extreme ? 1.5 : 0.9;
  double const beta = trial.draw.chance(0.2) ? trial.draw.below(2) : trial.draw.uniform(0, 1);
  Vector rho(entries);
  for (double& r : rho) r = extreme && trial.draw.chance(0.3) ? trial.draw.sign() : trial.draw.uniform(-most, most);
  bool const bad = trial.draw.chance(0.02);
  if (bad) rho[trial.draw.below(entries)] = trial.draw.among(std::array<double, 3>{NAN, INFINITY, -INFINITY});
  trial.parameters << " beta " << beta << (extreme ? ", extreme targets" : "") << (bad ? ", not finite" : "");
  bool const bound = trial.exact() && !extreme && !bad;
  Vaccinated const wanted = bound ? vaccinate(gram, orders, rho, beta) : Vaccinated{};
  // The averages lie behind the weights.
  auto solve = [&](Shape shape) {
    auto body = [&](auto const& team, double* result, double* memory) {
      double* const averages = result + n;
      if (team.rank() == 0) std::copy(rho.begin(), rho.end(), averages);
      team.barrier();
      fastmtl::gradvac(team, n, orders.steps, gram.entries.data(), orders.tasks.data(), beta, averages, result, memory);
    };
    return trial.solve(shape, fastmtl::gradvac_workspace(n, shape.groups), body, n + entries);
  };
  auto check = [&](Vector const& result, std::string const& where) {
    if (gram.kind == "indefinite") return;
    Vector const weights(result.begin(), result.begin() + n);
    Vector const averages(result.begin() + n, result.end());
    bool const lost = bad || trial.not_finite();
    if (lost) {
      for (int k = 0; k < entries; ++k) {
        trial.check(averages[k] == rho[k] || std::isnan(rho[k]), "averages beside what is not finite, " + where);
      }
    }
    if (!trial.sane(weights, lost) || !trial.sane(averages, false) || !bound || !wanted.granted) return;
    Wide const error = distance(gram, wide_rows(gram), weights, wanted.update);
    trial.within(wanted.path > 0 ? error / (1e-6L * wanted.path) : error, "update, " + where);
    Wide worst = 0;
    for (int k = 0; k < entries; ++k) worst = std::max(worst, std::fabs(averages[k] - wanted.rho[k]) / wanted.doubt[k]);
    trial.within(worst, "averages, " + where);
  };
  auto agree = [&](Vector const& one, Vector const& many) {
    if (!bound || !wanted.granted) return;
    Vector const alone(one.begin(), one.begin() + n);
    Vector const together(many.begin(), many.begin() + n);
    trial.check(apart(gram, alone, together) <= 4e-12L * wanted.path * wanted.path, "lanes disagree");
  };
  on_one_and_many(trial, solve, check, agree);
}

}  // namespace fuzz
