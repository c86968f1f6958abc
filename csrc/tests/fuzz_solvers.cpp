// All T x T solvers on random Gram matrices of every kind and of every size from 1 to 128, against the bounds that
// their specifications state. `fuzz_solvers CASES SEED FIRST` runs the given number of cases of a seed from number
// FIRST on; each is drawn on its own, so that a failing one is repeated by `fuzz_solvers 1 SEED CASE`.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "fuzz_fair.h"
#include "fuzz_quadratic.h"
#include "fuzz_spectral.h"
#include "fuzz_surgery.h"
#include "fuzz_trial.h"
#include "fuzz_zoo.h"

namespace {

constexpr int64_t kDefaultCases = 1500;
/// One case in so many is solved by a team of threads as well.
constexpr int64_t kTeamEvery = 16;
/// Teams wait at thousands of barriers: large matrices are left to few of them.
constexpr int kMostOnTeams = 34;

struct Solver {
  char const* name;
  void (*run)(fuzz::Trial&);
  int most_on_team;  // Tasks, on a team.
};

constexpr std::array kSolvers{
    Solver{"min_norm", fuzz::fuzz_min_norm, 128},
    Solver{"dual_cone", fuzz::fuzz_dual_cone, 128},
    Solver{"nonneg_qp", fuzz::fuzz_nonneg_qp, 128},
    Solver{"upgrad", fuzz::fuzz_upgrad, 6},
    Solver{"pcgrad", fuzz::fuzz_pcgrad, 128},
    Solver{"gradvac", fuzz::fuzz_gradvac, 128},
    Solver{"cagrad", fuzz::fuzz_cagrad, 64},
    Solver{"fair", fuzz::fuzz_fair, 64},
    Solver{"eigh", fuzz::fuzz_eigh, 64},
    Solver{"aligned", fuzz::fuzz_aligned, 64},
    Solver{"config", fuzz::fuzz_config, 64},
    Solver{"imtl", fuzz::fuzz_imtl, 64},
};

constexpr std::array<fuzz::Shape, 9> kShapes{{{1, 2}, {1, 3}, {1, 8}, {2, 1}, {2, 2}, {3, 2}, {2, 4}, {8, 1}, {1, 32}}};

/// Well mixed bits of three numbers.
uint64_t mix(uint64_t seed, uint64_t index, uint64_t part) {
  uint64_t bits = seed;
  for (uint64_t next : {index, part}) {
    bits = (bits ^ (next + 0x9e3779b97f4a7c15)) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ (bits >> 29)) * 0x94d049bb133111eb;
    bits ^= bits >> 32;
  }
  return bits;
}

}  // namespace

int main(int count, char** arguments) {
  int64_t const cases = count > 1 ? std::atoll(arguments[1]) : kDefaultCases;
  uint64_t const seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  int64_t const first = count > 3 ? std::atoll(arguments[3]) : 0;
  int64_t failures = 0;
  std::array<int64_t, kSolvers.size()> runs{};
  std::array<int64_t, kSolvers.size()> on_teams{};
  for (int64_t index = first; index < first + cases && failures < 20; ++index) {
    fuzz::Draw draw(mix(seed, index, kSolvers.size()));
    bool const team = index % kTeamEvery == 0;
    int const n = fuzz::draw_size(draw, team && index % (16 * kTeamEvery) != 0 ? kMostOnTeams : 128);
    fuzz::Shape const shape = draw.among(kShapes);
    fuzz::Gram const gram = fuzz::draw_gram(draw, n);
    for (size_t s = 0; s < kSolvers.size(); ++s) {
      bool const together = team && n <= kSolvers[s].most_on_team;
      fuzz::Trial trial{
          seed, index, gram, together ? shape : fuzz::Shape{}, fuzz::Draw(mix(seed, index, s)), kSolvers[s].name};
      kSolvers[s].run(trial);
      failures += trial.failures;
      ++runs[s];
      on_teams[s] += together;
    }
  }
  if (failures > 0) return 1;
  std::printf("solvers: seed %llu,", static_cast<unsigned long long>(seed));
  for (size_t s = 0; s < kSolvers.size(); ++s) {
    std::printf(" %s %lld (%lld on teams)", kSolvers[s].name, static_cast<long long>(runs[s]),
                static_cast<long long>(on_teams[s]));
  }
  std::puts(": all checks passed");
  return 0;
}
