// Prefetches memory into the caches while other memory is worked on.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmtl {

constexpr int64_t kLineBytes = 64;

/// A stretch of memory.
struct Span {
  char const* begin;
  int64_t bytes;
};

/// Prefetches spans into the second-level cache, a share at every call, span after span: memory answers a few long
/// bursts faster than as many streams as there are spans.
class Prefetch {
 public:
  /// Prefetches everything within `calls` calls.
  Prefetch(Span const* spans, int64_t count, int64_t calls) : span_(spans), end_(spans + count) {
    int64_t lines = 0;
    for (Span const* span = span_; span != end_; ++span) lines += span->bytes / kLineBytes + 1;
    share_ = lines / std::max<int64_t>(calls, 1) + 1;
  }

  /// Prefetches one share.
  void operator()() {
    for (int64_t line = 0; line < share_ && span_ != end_; ++line) {
      __builtin_prefetch(span_->begin + at_, 0, 2);
      at_ += kLineBytes;
      if (at_ >= span_->bytes) {
        ++span_;
        at_ = 0;
      }
    }
  }

 private:
  Span const* span_;
  Span const* end_;
  int64_t at_ = 0;
  int64_t share_;
};

}  // namespace fastmtl
