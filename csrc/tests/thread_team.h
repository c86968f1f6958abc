// A team whose lanes are threads, so that what a GPU would do wrong, a CPU test sees: a missing barrier is a data race.
#pragma once

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

#include "fastmtl/team.h"

namespace fastmtl {

/// One lane of a team of groups x lanes threads.
class ThreadTeam {
 public:
  /// Runs body(team) on every lane and waits for all.
  template <class Body>
  static void run(int groups, int lanes, Body const& body) {
    Shared shared(groups * lanes);
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < groups * lanes; ++rank) {
      threads.emplace_back([&, rank] { body(ThreadTeam(&shared, rank, lanes)); });
    }
  }

  int rank() const { return rank_; }
  int size() const { return shared_->size; }
  int lane() const { return rank_ % lanes_; }
  int lanes() const { return lanes_; }
  int group() const { return rank_ / lanes_; }
  int groups() const { return size() / lanes_; }
  void barrier() const { shared_->barrier.arrive_and_wait(); }

  double sum(double value) const {
    shared_->value[rank_].store(value, std::memory_order_relaxed);
    meet();
    double total = 0;
    for (auto const& part : shared_->value) total += part.load(std::memory_order_relaxed);
    meet();
    return total;
  }

  Choice lowest(Choice choice) const {
    shared_->value[rank_].store(choice.value, std::memory_order_relaxed);
    shared_->index[rank_].store(choice.index, std::memory_order_relaxed);
    meet();
    for (int other = 0; other < size(); ++other) {
      choice = lower(choice, {shared_->value[other].load(std::memory_order_relaxed),
                              shared_->index[other].load(std::memory_order_relaxed)});
    }
    meet();
    return choice;
  }

 private:
  struct Shared {
    explicit Shared(int lanes) : size(lanes), barrier(lanes), value(lanes), index(lanes) {}
    int size;
    std::barrier<> barrier;
    std::atomic<int> arrived{0};
    std::atomic<int> epoch{0};
    std::vector<std::atomic<double>> value;
    std::vector<std::atomic<int>> index;
  };

  // A warp's shuffles order no memory. Under the thread sanitizer the collectives therefore must not either, or
  // they would hide a missing barrier; elsewhere they need an order to be right.
#if defined(__SANITIZE_THREAD__)
  static constexpr auto kOrder = std::memory_order_relaxed;
#else
  static constexpr auto kOrder = std::memory_order_seq_cst;
#endif

  ThreadTeam(Shared* shared, int rank, int lanes) : shared_(shared), rank_(rank), lanes_(lanes) {}

  void meet() const {
    int const epoch = shared_->epoch.load(kOrder);
    if (shared_->arrived.fetch_add(1, kOrder) + 1 == size()) {
      shared_->arrived.store(0, kOrder);
      shared_->epoch.fetch_add(1, kOrder);
    } else {
      while (shared_->epoch.load(kOrder) == epoch) std::this_thread::yield();
    }
  }

  Shared* shared_;
  int rank_;
  int lanes_;
};

}  // namespace fastmtl
