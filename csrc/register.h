// How a CPU kernel reaches the dispatcher: one line in the op's file. The schema is declared in Python.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastmtl {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

/// Registers a kernel as `fastmtl_cpp::<op>` when the library is loaded, and keeps it for `fastmtl_register_default`.
struct CpuKernel {
  CpuKernel(char const* op, BoxedKernel boxed);
};

}  // namespace fastmtl

#define FASTMTL_CPU_KERNEL(op, function) \
  static const ::fastmtl::CpuKernel fastmtl_cpu_kernel_##op(#op, TORCH_BOX(&function))
