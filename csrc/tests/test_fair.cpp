// The fair weights against their equation, on one lane and on teams of threads.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/fair.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;

/// Gram matrix of n rows whose lengths lie `spread` powers of ten apart; `opposite` makes pairs that cancel.
Vector gram_of(int n, double spread, bool opposite) {
  std::mt19937_64 random(n);
  std::normal_distribution<double> normal;
  int const m = n + 3;
  Vector rows(n * m);
  for (double& x : rows) x = normal(random);
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < m; ++k) {
      if (opposite && i % 2 == 1) rows[i * m + k] = -rows[(i - 1) * m + k];
    }
  }
  Vector gram(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < m; ++k) gram[i * n + j] += rows[i * m + k] * rows[j * m + k];
      gram[i * n + j] *= std::pow(10.0, spread * (i % 2 + j % 2));
    }
  }
  return gram;
}

Vector solve(int n, double p, Vector const& gram, Vector const* warm, int groups, int lanes) {
  Vector weights(n, NAN);
  Vector workspace(fastmtl::fair_workspace(n), NAN);
  auto run = [&](auto const& team) {
    fastmtl::fair(team, n, p, gram.data(), warm ? warm->data() : nullptr, weights.data(), workspace.data());
  };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return weights;
}

/// The largest residual of a row, in units of what the specification grants.
double excess(int n, double p, Vector const& gram, Vector const& weights) {
  double worst = 0;
  for (int i = 0; i < n; ++i) {
    long double image = 1e-10L * gram[i * n + i] * weights[i];
    long double magnitude = 0;
    for (int j = 0; j < n; ++j) {
      image += static_cast<long double>(gram[i * n + j]) * weights[j];
      magnitude += std::fabs(static_cast<long double>(gram[i * n + j]) * weights[j]);
    }
    long double const inverse = std::pow(static_cast<long double>(weights[i]), static_cast<long double>(p));
    long double const residual = std::fabs(image * inverse - 1) / (1e-10L + 1e-14L * magnitude * inverse);
    if (!(residual <= worst)) worst = static_cast<double>(residual);
  }
  return worst;
}

void test_bound(int groups, int lanes) {
  for (int n : {1, 2, 5, 12}) {
    for (double p : {0.2, 0.5, 1.0, 2.0}) {
      for (double spread : {0.0, 6.0}) {
        for (bool opposite : {false, true}) {
          Vector const gram = gram_of(n, spread, opposite);
          Vector const weights = solve(n, p, gram, nullptr, groups, lanes);
          std::string const name =
              "T=" + std::to_string(n) + " p=" + std::to_string(p) + " on " + std::to_string(groups * lanes) + " lanes";
          check(excess(n, p, gram, weights) <= 1, name);
          check(excess(n, p, gram, solve(n, p, gram, &weights, groups, lanes)) <= 1, name + " from a warm start");
        }
      }
    }
  }
}

void test_zero_rows(int groups, int lanes) {
  Vector const weights = solve(3, 1, {0, 0, 0, 0, 4, 0, 0, 0, 0}, nullptr, groups, lanes);
  check(weights[0] == 0 && std::fabs(weights[1] - 0.5) < 1e-10 && weights[2] == 0, "zero rows have weight zero");
}

void test_non_finite(int groups, int lanes) {
  Vector gram = gram_of(9, 0, false);
  gram[5 * 9 + 2] = INFINITY;
  for (double weight : solve(9, 1, gram, nullptr, groups, lanes)) check(std::isnan(weight), "non-finite G");
}

}  // namespace

int main() {
  for (auto const& [groups, lanes] : {std::pair{1, 1}, std::pair{2, 2}, std::pair{1, 5}}) {
    test_bound(groups, lanes);
    test_zero_rows(groups, lanes);
    test_non_finite(groups, lanes);
  }
  return finish("fair");
}
