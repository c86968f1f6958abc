// How a kernel reaches the dispatcher, from every device: one line in the op's file. The schema is declared in Python.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastmtl {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

/// Registers a kernel as `fastmtl_cpp::<op>`, or `fastmtl_cuda::<op>` where nvcc compiles it, when the library is
/// loaded, and keeps it for `fastmtl_register_default`.
struct Kernel {
  Kernel(char const* op, BoxedKernel boxed);
};

}  // namespace fastmtl

#define FASTMTL_KERNEL(op, function) static ::fastmtl::Kernel const fastmtl_kernel_##op(#op, TORCH_BOX(&function))
