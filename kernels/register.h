// How a CUDA kernel reaches the dispatcher: one line in the op's file. The schema is declared in Python.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastmtl {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

/// Registers a kernel as `fastmtl_cuda::<op>` when the library is loaded, and keeps it for `fastmtl_register_default`.
struct CudaKernel {
  CudaKernel(char const* op, BoxedKernel boxed);
};

}  // namespace fastmtl

#define FASTMTL_CUDA_KERNEL(op, function) \
  static const ::fastmtl::CudaKernel fastmtl_cuda_kernel_##op(#op, TORCH_BOX(&function))
