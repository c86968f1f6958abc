// Calls memory into the caches while other memory is worked on.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmtl {

constexpr int64_t kLineBytes = 64;

// A stretch of memory.
struct Span {
  const char* begin;
  int64_t bytes;
};

// Calls spans into the second-level cache, a share at every beat, span after span: memory answers a few long bursts
// faster than as many streams as there are spans.
class Ahead {
 public:
  Ahead(const Span* spans, int64_t count, int64_t beats) : span_(spans), end_(spans + count) {
    int64_t lines = 0;
    for (const Span* span = span_; span != end_; ++span) lines += span->bytes / kLineBytes + 1;
    share_ = lines / std::max<int64_t>(beats, 1) + 1;
  }

  // Calls the share of one beat.
  void operator()() {
    for (int64_t called = 0; called < share_ && span_ != end_; ++called) {
      __builtin_prefetch(span_->begin + at_, 0, 2);
      at_ += kLineBytes;
      if (at_ >= span_->bytes) {
        ++span_;
        at_ = 0;
      }
    }
  }

 private:
  const Span* span_;
  const Span* end_;
  int64_t at_ = 0;
  int64_t share_;
};

}  // namespace fastmtl
