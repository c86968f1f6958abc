// The leave for shared memory, against a runtime that refuses a launch beyond what was last allowed.
#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../kernels/shared_grant.h"
#include "check.h"

namespace {

constexpr size_t kMost = 227 * 1024;
constexpr size_t kStatic = 25 * 1024;

/// One kernel's attribute on each of two devices.
struct FakeRuntime {
  int device;
  std::atomic<size_t>* allowed;
  std::atomic<int>* calls;

  static size_t static_bytes(void const*) { return kStatic; }
  static size_t most_bytes(int) { return kMost; }
  void allow(void const*, size_t bytes) const {
    allowed[device] = bytes;
    ++*calls;
  }
  bool launches(size_t bytes) const { return bytes + kStatic <= 48 * 1024 || bytes <= allowed[device]; }
};

void test_sizes() {
  fastmtl::SharedGrants grants;
  std::atomic<size_t> allowed[2] = {0, 0};
  std::atomic<int> calls = 0;
  int const kernel = 0;
  for (size_t const bytes : {kMost - kStatic, size_t{66 * 1024}, size_t{1024}, size_t{40 * 1024}, kMost - kStatic}) {
    for (int const device : {0, 1}) {
      FakeRuntime const runtime{device, allowed, &calls};
      check(grants.grant(runtime, &kernel, device, bytes) && runtime.launches(bytes),
            std::to_string(bytes) + " bytes on device " + std::to_string(device));
      check(!grants.grant(runtime, &kernel, device, kMost - kStatic + 1), "more than there is");
    }
  }
  check(calls == 2, "asked once for each device");
}

void test_threads() {
  fastmtl::SharedGrants grants;
  std::atomic<size_t> allowed[2] = {0, 0};
  std::atomic<int> calls = 0;
  std::atomic<int> refused = 0;
  int const kernel = 0;
  {
    std::vector<std::jthread> threads;
    for (size_t t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        for (size_t round = 0; round < 500; ++round) {
          int const device = static_cast<int>(round % 2);
          FakeRuntime const runtime{device, allowed, &calls};
          size_t const bytes = (20 + 20 * ((t + round) % 10)) * 1024;
          refused += !(grants.grant(runtime, &kernel, device, bytes) && runtime.launches(bytes));
        }
      });
    }
  }
  check(refused == 0, std::to_string(refused) + " launches of threads side by side were refused");
  check(calls == 2, "asked once for each device by all threads");
}

}  // namespace

int main() {
  test_sizes();
  test_threads();
  return finish("shared_grant");
}
