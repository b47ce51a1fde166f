// The error checks of PyTorch's stable ABI under their newest names: some releases of torch keep them elsewhere or lack the CUDA ones.
#pragma once

#if defined(__has_include)
#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif
#endif

#include <stdexcept>
#include <string>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#ifndef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                             \
  do {                                                                                                   \
    const cudaError_t status_ = (call);                                                                  \
    if (status_ != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status_)); \
  } while (0)
#endif

#ifndef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() STD_CUDA_CHECK(cudaGetLastError())
#endif
