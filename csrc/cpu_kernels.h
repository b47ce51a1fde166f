// Inner loops of the CPU operations, compiled once per instruction set (cpu_baseline.cpp, cpu_avx2.cpp, cpu_avx512.cpp).
//
// Only plain pointers and integers cross this interface. PyTorch's headers stay out of the instruction-set units: an inline
// function of a shared header compiled there would be merged with everybody else's and could carry AVX-512 to older machines.
#pragma once

#include <cstdint>

namespace wanda_fast {

// Element types, in the order of the function tables below.
enum Element : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3, kElements = 4 };

// x as [N, C, H, W] with strides in elements; [N, L, C] is H = 1, W = L and [N, C] is H = W = 1.
struct SqNormArgs {
  const void* x;
  int64_t C, H, W;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// dst[c - c_begin] += sum over h, w of x[n, c, h, w]^2. `scratch` holds c_end - c_begin doubles.
using SqNormFn = void (*)(const SqNormArgs& args, int64_t n, int64_t c_begin, int64_t c_end, float* dst, double* scratch);

// A weight whose rows are dense runs of K elements in some order; `norms` is ||X||_2 repeated in that same order
// (float, or double for a double weight).
struct ScoreArgs {
  const void* weight;
  int64_t row_stride, K;
  const void* norms;
};

// row[r] = sum_j |W[r, j]| * norms[j] and column[j] = sum_r |W[r, j]| for row_begin <= r < row_end; `row` is indexed from
// row_begin. `column` holds K floats (doubles for a double weight). At most kScoreRows rows per call.
using ScoreFn = void (*)(const ScoreArgs& args, int64_t row_begin, int64_t row_end, double* row, void* column);
constexpr int64_t kScoreRows = 32;

// norm[c] = sum_r row_weight[r] * sqrt(sq[r, c]) for c_begin <= c < c_end; `scratch` holds c_end - c_begin doubles.
using NormFn = void (*)(const float* sq, int64_t sq_stride, const float* row_weight, int64_t R, int64_t c_begin, int64_t c_end,
                        float* norm, double* scratch);

// Conversions of `count` neighbours, rounded to nearest even as PyTorch rounds them. Null for float itself.
using ToFloatFn = void (*)(const void* src, float* dst, int64_t count);
using FromFloatFn = void (*)(const float* src, void* dst, int64_t count);

// c[i * c_stride + j] += sum_m a[a_rows[m] + i] * b[b_rows[m] + j] for i_begin <= i < i_end and all j < columns, fp32. Rows are padded: reading
// up to kGramPad floats past i_end and `columns` is allowed, and c has as much room (what lands there means nothing).
struct GramArgs {
  const float* a;
  const float* b;
  const int64_t* a_rows;
  const int64_t* b_rows;
  int64_t count;  // pairs of rows, at most kGramRows
  int64_t i_begin, i_end, columns;
  float* c;
  int64_t c_stride;
};
using GramFn = void (*)(const GramArgs& args);
constexpr int64_t kGramRows = 128;
constexpr int64_t kGramPad = 64;
constexpr int64_t kGramTile = 12;  // i_begin must be a multiple of it

struct CpuKernels {
  const char* name;
  SqNormFn sq_norm[kElements];
  ScoreFn score[kElements];
  NormFn norm;
  ToFloatFn to_float[kElements];
  FromFloatFn from_float[kElements];
  GramFn gram;
};

// Null where the compiler or the processor has no such instructions.
const CpuKernels* cpu_kernels_avx512();
const CpuKernels* cpu_kernels_avx2();
const CpuKernels* cpu_kernels_baseline();

// The widest set that this processor runs, or the one that WANDA_FAST_CPU names (baseline, avx2, avx512); chosen once.
const CpuKernels& cpu_kernels();

}  // namespace wanda_fast
