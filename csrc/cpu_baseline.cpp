// The CPU operations for any processor: SSE2 on x86-64, NEON on AArch64.

#include "cpu_kernels.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>

#define WANDA_VECTOR_BYTES 16
#define WANDA_NAME "baseline"
#include "cpu_kernels.inc"

namespace wanda_fast {

const CpuKernels* cpu_kernels_baseline() { return &kTable; }

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const best = [] {
    const char* const limit = std::getenv("WANDA_FAST_CPU");
    const CpuKernels* const wider[] = {cpu_kernels_avx512(), cpu_kernels_avx2()};
    for (const CpuKernels* k : wider) {
      if (k && (!limit || std::strcmp(limit, k->name) == 0)) return k;
    }
    return cpu_kernels_baseline();
  }();
  return *best;
}

}  // namespace wanda_fast
