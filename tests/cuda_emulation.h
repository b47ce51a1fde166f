// Just enough of CUDA to run a kernel's own source on the CPU, one thread after the other, for test_cuda_sources.py.
//
// A block is run twice where it meets __syncthreads_and: the first pass ends every thread there and collects the votes, the second continues with
// the result. Kernels may write shared memory before that barrier, the same values in both passes, and no global memory.

#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx{}, blockIdx{};

using cudaStream_t = void*;
inline int cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, 0; }

namespace emulation {
struct AtBarrier {};
inline bool voting = false;
inline int votes = 0, yes = 0;

template <class Kernel>
void launch(int64_t blocks, int threads, Kernel kernel) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    votes = yes = 0;
    for (int pass = 0; pass < 2; ++pass) {
      voting = pass == 0;
      if (pass == 1 && votes != 0 && votes != threads) throw std::runtime_error("a barrier that not all threads reach");
      if (pass == 1 && votes == 0) break;  // no barrier: the first pass was the whole block
      for (int thread = 0; thread < threads; ++thread) {
        threadIdx.x = static_cast<unsigned>(thread);
        try {
          kernel();
        } catch (const AtBarrier&) {
        }
      }
    }
  }
}
}  // namespace emulation

inline int __syncthreads_and(bool vote) {
  if (emulation::voting) {
    ++emulation::votes;
    emulation::yes += vote;
    throw emulation::AtBarrier{};
  }
  return emulation::yes == emulation::votes;
}

template <class T>
T __ldcs(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) throw std::runtime_error("misaligned load");
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) throw std::runtime_error("misaligned store");
  *p = value;
}
template <class T>
T __ldg(const T* p) {
  return __ldcs(p);
}
inline void __trap() { throw std::runtime_error("trap"); }
