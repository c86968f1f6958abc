// Runs tasks on torch's own threads, as many as torch.set_num_threads() allows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastmtl {

/// Calls body(i) once for each i in [0, count). Threads take the next index when they are done with one, so a thread
/// that the system interrupts does not hold up the rest. `body` must not throw.
template <class Body>
void run_parallel(int64_t count, Body const& body) {
  int64_t const threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  });
}

/// Calls body(i, next) instead, where `next` is what the same thread does after i, or at least `count`.
template <class Body>
void run_parallel_ahead(int64_t count, Body const& body) {
  int64_t const threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, i + 1);
    return;
  }
  std::atomic<int64_t> unclaimed{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = unclaimed.fetch_add(1); i < count;) {
      int64_t const next = unclaimed.fetch_add(1);
      body(i, next);
      i = next;
    }
  });
}

}  // namespace fastmtl
