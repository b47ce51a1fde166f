// The CPU operations for x86-64 processors with AVX-512 (F, BW, VL, DQ). Headers come before the target options: see cpu_kernels.h.

#include "cpu_kernels.h"

#include <cstddef>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#define WANDA_VECTOR_BYTES 64
#define WANDA_NAME "avx512"
#include "cpu_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace wanda_fast {

const CpuKernels* cpu_kernels_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") ? &kTable : nullptr;
}

}  // namespace wanda_fast

#else

namespace wanda_fast {

const CpuKernels* cpu_kernels_avx512() { return nullptr; }

}  // namespace wanda_fast

#endif
