#include "register.h"

#include <utility>
#include <vector>

namespace fastmtl {
namespace {

#if defined(__CUDACC__)
constexpr char const* kDevice = "CUDA";
constexpr char const* kNamespace = "fastmtl_cuda";
#else
constexpr char const* kDevice = "CPU";
constexpr char const* kNamespace = "fastmtl_cpp";
#endif

using torch::stable::detail::StableLibrary;

std::vector<std::pair<char const*, BoxedKernel>>& kernels() {
  static std::vector<std::pair<char const*, BoxedKernel>> all;
  return all;
}

void implement(char const* space, char const* op, BoxedKernel boxed) {
  // Never deleted: taking kernels out of the dispatcher while the process ends is a race with torch's own end.
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, space, kDevice, __FILE__, __LINE__);
  library->impl(op, boxed);
}

}  // namespace

Kernel::Kernel(char const* op, BoxedKernel boxed) {
  kernels().emplace_back(op, boxed);
  implement(kNamespace, op, boxed);
}

}  // namespace fastmtl

/// Makes these kernels the ones of the namespace `fastmtl` on their device; called at most once.
extern "C" __attribute__((visibility("default"))) void fastmtl_register_default() {
  for (auto const& [op, boxed] : fastmtl::kernels()) fastmtl::implement("fastmtl", op, boxed);
}
