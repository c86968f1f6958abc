// The eigendecomposition and the solvers that rest on it, on one lane and on teams of threads.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/aligned.h"
#include "fastmtl/config.h"
#include "fastmtl/eigh.h"
#include "fastmtl/imtl.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;

template <class Run>
void on_team(int groups, int lanes, Run const& run) {
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
}

/// The Gram matrix of n normal rows of `width` numbers, each plus `shared` times a common row.
Vector gram_of(int n, int width, double shared) {
  std::mt19937_64 random(n * 1000 + width);
  std::normal_distribution<double> normal;
  Vector rows(n * width);
  for (double& x : rows) x = normal(random);
  for (int i = n - 1; i >= 0; --i) {
    for (int k = 0; k < width; ++k) rows[i * width + k] += shared * rows[k];
  }
  Vector gram(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < width; ++k) gram[i * n + j] += rows[i * width + k] * rows[j * width + k];
    }
  }
  return gram;
}

void check_decomposition(std::string const& name, int n, int rank, Vector const& gram, int groups, int lanes) {
  Vector const scale(n, 1.0);
  Vector memory(fastmtl::Eigh::storage(n), NAN);
  fastmtl::Eigh eigh(memory.data(), n);
  on_team(groups, lanes, [&](auto const& team) {
    fastmtl::Eigh const solved = fastmtl::solve_eigh(team, n, gram.data(), scale.data(), memory.data());
    if (team.rank() == 0) eigh = solved;
  });
  std::string const where = name + " T=" + std::to_string(n) + " on " + std::to_string(groups * lanes) + " lanes";
  double trace = 0;
  for (int i = 0; i < n; ++i) trace += gram[i * n + i];
  check(rank < 0 || eigh.rank == rank, where + ": rank " + std::to_string(eigh.rank));
  double apart = 0;
  double orthogonal = 0;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      double product = 0;
      for (int k = 0; k < eigh.rank; ++k) product += eigh.row(k)[i] * eigh.row(k)[j];
      apart = std::max(apart, std::fabs(product - gram[i * n + j]));
    }
  }
  for (int k = 0; k < eigh.rank; ++k) {
    for (int l = 0; l < eigh.rank; ++l) {
      double product = 0;
      for (int i = 0; i < n; ++i) product += eigh.row(k)[i] * eigh.row(l)[i];
      double const length = std::sqrt(eigh.value[k] * eigh.value[l]);
      orthogonal = std::max(orthogonal, std::fabs(product - (k == l ? eigh.value[k] : 0)) / length);
    }
  }
  check(apart <= 4 * n * 0x1p-52 * trace, where + ": product off by " + std::to_string(apart / trace));
  check(orthogonal <= 2 * (n + 8) * 0x1p-52, where + ": cosine " + std::to_string(orthogonal));
}

void test_decomposition(std::vector<int> const& sizes, int groups, int lanes) {
  for (int n : sizes) {
    check_decomposition("random", n, n, gram_of(n, n + 3, 0), groups, lanes);
    check_decomposition("parallel", n, n, gram_of(n, n + 3, 30), groups, lanes);
    check_decomposition("rank deficient", n, -1, gram_of(n, n / 3 + 1, 0), groups, lanes);
    check_decomposition("zero", n, 0, Vector(n * n, 0.0), groups, lanes);
  }
}

void test_known_eigenvalues() {
  Vector const gram{2, 1, 0, 1, 2, 0, 0, 0, 5};
  Vector const scale(3, 1.0);
  Vector memory(fastmtl::Eigh::storage(3), NAN);
  fastmtl::Eigh const eigh = fastmtl::solve_eigh(fastmtl::HostTeam{}, 3, gram.data(), scale.data(), memory.data());
  Vector values(eigh.value, eigh.value + eigh.rank);
  std::ranges::sort(values);
  for (int k = 0; k < 3; ++k) check(std::fabs(values[k] - (2 * k + 1)) < 1e-14, "eigenvalues 1, 3, 5");
}

/// Rounding coarser than float64's leaves negative eigenvalues; what is found stays within the diagonal.
void test_indefinite() {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  for (int n : {2, 5, 12, 40}) {
    Vector gram = gram_of(n, n / 3 + 1, 0);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) gram[i * n + j] = gram[j * n + i] *= 1 + 1e-7 * normal(random);
    }
    Vector const scale(n, 1.0);
    Vector memory(fastmtl::Eigh::storage(n), NAN);
    fastmtl::Eigh const eigh = fastmtl::solve_eigh(fastmtl::HostTeam{}, n, gram.data(), scale.data(), memory.data());
    for (int i = 0; i < n; ++i) {
      double square = 0;
      for (int k = 0; k < eigh.rank; ++k) square += eigh.row(k)[i] * eigh.row(k)[i];
      check(square <= gram[i * n + i] * (1 + 1e-12), "no more than the diagonal of an indefinite matrix");
    }
  }
}

template <class Solve>
void check_solver(std::string const& name, int64_t doubles, int n, Vector const& gram, Solve const& solve) {
  Vector one(n, NAN);
  Vector memory(doubles, NAN);
  solve(fastmtl::HostTeam{}, gram, one, memory);
  for (auto [groups, lanes] : {std::pair{1, 3}, {2, 2}, {4, 8}}) {
    Vector many(n, NAN);
    std::ranges::fill(memory, NAN);
    ThreadTeam::run(groups, lanes, [&](ThreadTeam const& team) { solve(team, gram, many, memory); });
    for (int i = 0; i < n; ++i) {
      bool const same = std::isnan(one[i]) ? std::isnan(many[i]) : std::fabs(one[i] - many[i]) < 1e-9;
      check(same, name + ": all lanes together find what one does");
    }
  }
}

void test_solvers_on_teams() {
  for (int n : {1, 2, 9, 24}) {
    Vector poisoned = gram_of(n, n, 0);
    poisoned[n - 1] = NAN;
    for (Vector const& gram : {gram_of(n, n + 3, 1), gram_of(n, n / 3 + 1, 0), Vector(n * n, 0.0), poisoned}) {
      check_solver("aligned", fastmtl::aligned_workspace(n), n, gram,
                   [n](auto const& team, Vector const& g, Vector& w, Vector& memory) {
                     fastmtl::aligned(team, n, g.data(), w.data(), memory.data());
                   });
      check_solver("imtl", fastmtl::imtl_workspace(n), n, gram,
                   [n](auto const& team, Vector const& g, Vector& w, Vector& memory) {
                     fastmtl::imtl(team, n, g.data(), w.data(), memory.data());
                   });
      check_solver("config", fastmtl::config_workspace(n), n, gram,
                   [n](auto const& team, Vector const& g, Vector& w, Vector& memory) {
                     fastmtl::config(team, n, g.data(), w.data(), memory.data());
                   });
    }
  }
}

}  // namespace

int main() {
  test_decomposition({1, 2, 3, 5, 8, 40, 127, 128}, 1, 1);
  test_decomposition({1, 2, 3, 16}, 2, 2);
  test_decomposition({2, 9, 24}, 4, 8);
  test_known_eigenvalues();
  test_indefinite();
  test_solvers_on_teams();
  return finish("eigh");
}
