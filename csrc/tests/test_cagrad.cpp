// CAGrad's weights against their optimality condition, on one lane and on teams of threads.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/cagrad.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;

/// Gram matrix of n rows, a common direction of weight `common` with alternating sign in each, scaled by `length`.
Vector gram_of(int n, double common, double length) {
  std::mt19937_64 random(n);
  std::normal_distribution<double> normal;
  int const m = n + 3;
  Vector rows(n * m);
  for (double& x : rows) x = normal(random);
  for (int i = 0; i < n; ++i) rows[i * m] += common * (1 - 1.5 * (i % 2));
  Vector gram(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < m; ++k) gram[i * n + j] += rows[i * m + k] * rows[j * m + k] * length * length;
    }
  }
  return gram;
}

Vector solve(int n, double c, Vector const& gram, int groups, int lanes) {
  Vector weights(n, NAN);
  Vector workspace(fastmtl::cagrad_workspace(n), NAN);
  auto run = [&](auto const& team) { fastmtl::cagrad(team, n, c, gram.data(), weights.data(), workspace.data()); };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return weights;
}

/// The largest excess of the optimality condition, in units of the 1e-8 s_i it may have; infinite off the simplex.
double excess(int n, double c, Vector const& gram, Vector const& weights) {
  std::vector<long double> image(n), mean(n);
  long double form = 0, mass = 0, square = 0, along = 0, total = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      image[i] += static_cast<long double>(gram[i * n + j]) * weights[j];
      mean[i] += static_cast<long double>(gram[i * n + j]) / n;
    }
    form += weights[i] * image[i];
    mass += weights[i] * std::sqrt(static_cast<long double>(gram[i * n + i]));
    square += mean[i] / n;
    along += weights[i] * mean[i];
    total += weights[i];
    if (!(weights[i] >= 0)) return INFINITY;
  }
  if (std::fabs(total - 1) > 1e-14L) return INFINITY;
  long double const radius = c * std::sqrt(square);
  long double worst = 0;
  for (int i = 0; i < n; ++i) {
    long double const scale =
        1e-8L * (1 + c) * std::sqrt(square) * (std::sqrt(static_cast<long double>(gram[i * n + i])) + mass);
    long double const improvement = mean[i] + radius / std::sqrt(form) * image[i];
    worst = std::fmax(worst, (along + radius * std::sqrt(form) - improvement) / scale);
  }
  return static_cast<double>(worst);
}

void test_bound(int groups, int lanes) {
  for (int n : {1, 2, 5, 12}) {
    for (double c : {0.01, 0.4, 1.0, 5.0}) {
      for (double common : {0.0, 4.0}) {
        for (double length : {1e-15, 1.0, 1e15}) {
          Vector const gram = gram_of(n, common, length);
          check(excess(n, c, gram, solve(n, c, gram, groups, lanes)) <= 1,
                "T=" + std::to_string(n) + " c=" + std::to_string(c) + " on " + std::to_string(groups * lanes) +
                    " lanes");
        }
      }
    }
  }
}

void test_special_cases(int groups, int lanes) {
  check(solve(2, 0.5, {1, -1, -1, 1}, groups, lanes) == Vector{0.5, 0.5}, "balanced tasks share");
  check(solve(2, 0, {1, 0, 0, 4}, groups, lanes) == Vector{1, 0}, "c = 0 takes the worst task");
  check(solve(3, 0.5, {0, 0, 0, 0, 4, 0, 0, 0, 0}, groups, lanes) == Vector{0.5, 0, 0.5}, "zero rows share");
  for (double weight : solve(2, 0.5, {1, NAN, NAN, 1}, groups, lanes)) check(std::isnan(weight), "non-finite G");
}

}  // namespace

int main() {
  for (auto const& [groups, lanes] : {std::pair{1, 1}, std::pair{2, 2}, std::pair{1, 5}}) {
    test_bound(groups, lanes);
    test_special_cases(groups, lanes);
  }
  return finish("cagrad");
}
