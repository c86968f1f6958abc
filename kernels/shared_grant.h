// The leave to launch a kernel with more shared memory than every block may have.
//
// It is an attribute of a kernel on a device, the same for all threads of the process: set to what one launch needs, it
// could fall between the check and the launch of another thread. So it is set once, to the most there is.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

namespace fastmtl {

/// The dynamic shared memory that kernels may have on devices. `Runtime` is the CUDA runtime's part in it:
/// `static_bytes(kernel)`, `most_bytes(device)` of a block with its static memory, and `allow(kernel, bytes)` on the
/// current device.
class SharedGrants {
 public:
  /// Whether a block of `kernel` gets `bytes` of dynamic shared memory on `device`, which is the current one.
  template <class Runtime>
  bool grant(Runtime const& runtime, void const* kernel, int device, size_t bytes) {
    // Every block may have 48 KB, its static memory included; no kernel has more than 32 KB of that.
    constexpr size_t granted_to_all = 48 * 1024;
    constexpr size_t most_static = 32 * 1024;
    if (bytes + most_static <= granted_to_all) return true;
    std::scoped_lock const lock(mutex_);
    auto found = granted_.find({kernel, device});
    if (found == granted_.end()) {
      size_t const most = runtime.most_bytes(device) - runtime.static_bytes(kernel);
      runtime.allow(kernel, most);
      found = granted_.insert({{kernel, device}, most}).first;
    }
    return bytes <= found->second;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<void const*, int>, size_t> granted_;
};

}  // namespace fastmtl
