// What a test's program counts: the checks that fail, which are its exit code.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void check(bool holds, std::string const& what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

/// The exit code of the test `name`.
inline int finish(char const* name) {
  if (failures == 0) std::printf("%s: all checks passed\n", name);
  return failures == 0 ? 0 : 1;
}
