// CPU implementations of the wanda_fast operations, registered under the CPU dispatch key only: schemas, shape checks and
// the reference for every other device live in wanda_fast/ops.py. Built on PyTorch's stable ABI (torch >= 2.10).
//
// Repeatability: every sum is split by shape alone, never by thread count, and partial sums are joined in a fixed order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "stable_macros.h"

namespace wanda_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;

Element element_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": dtype must be float32, float64, float16 or bfloat16");
  }
}

bool is_element(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// The element type of a dtype argument, and PyTorch's own number for it.
std::pair<Element, int32_t> wanted_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return {kFloat32, aoti_torch_dtype_float32()};
    case ScalarType::Double: return {kFloat64, aoti_torch_dtype_float64()};
    case ScalarType::Half: return {kFloat16, aoti_torch_dtype_float16()};
    case ScalarType::BFloat16: return {kBFloat16, aoti_torch_dtype_bfloat16()};
    default:
      STD_TORCH_CHECK(false, "dtype: must be float32, float64, float16 or bfloat16");
  }
}

// One C call; the dispatcher would cost more than filling a small tensor.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_float(int64_t size) { return empty_strided({size}, {1}, aoti_torch_dtype_float32()); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_indices(const int64_t* index, int64_t count, int64_t limit, const char* name, int64_t position) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < limit, name, "[", position, "]: index ", index[i], " is outside [0, ", limit, ")");
  }
}

// ---- channel_sq_norm ----------------------------------------------------------------------------------------------

void channel_sq_norm(const Tensor& x, const Tensor& rows, Tensor out) {
  const Element element = element_of(x, "x");
  const int64_t dim = x.dim();
  const int64_t N = x.size(0);
  SqNormArgs args{};
  args.x = x.const_data_ptr();
  args.stride_n = x.stride(0);
  if (dim == 4) {
    args.C = x.size(1), args.H = x.size(2), args.W = x.size(3);
    args.stride_c = x.stride(1), args.stride_h = x.stride(2), args.stride_w = x.stride(3);
  } else {
    STD_TORCH_CHECK(dim == 3 || dim == 2, "x: must have 2, 3 or 4 dimensions, not ", dim);
    args.C = x.size(dim - 1), args.H = 1, args.W = dim == 3 ? x.size(1) : 1;
    args.stride_c = x.stride(dim - 1), args.stride_h = 0, args.stride_w = dim == 3 ? x.stride(1) : 0;
  }
  const int64_t C = args.C;
  const int64_t R = out.size(0);
  STD_TORCH_CHECK(rows.dim() == 1 && rows.size(0) == N && rows.scalar_type() == ScalarType::Long, "rows: must be [N] int64");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(1) == C && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
                  "out: must be [R, C] float32, contiguous");
  std::vector<int64_t> row(N);
  const int64_t* row_data = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t row_stride = rows.stride(0);
  for (int64_t n = 0; n < N; ++n) {
    row[n] = row_data[n * row_stride];
    STD_TORCH_CHECK(row[n] >= 0 && row[n] < R, "rows[", n, "]: row ", row[n], " is outside [0, ", R, ")");
  }
  const int64_t positions = args.H * args.W;
  if (N == 0 || C == 0 || positions == 0) return;

  const SqNormFn kernel = cpu_kernels().sq_norm[element];
  float* const out_data = static_cast<float*>(out.mutable_data_ptr());
  if (N * C * positions <= kGrain) {
    std::vector<double> scratch(C);
    for (int64_t n = 0; n < N; ++n) kernel(args, n, 0, C, out_data + row[n] * C, scratch.data());
    return;
  }
  // First the sum of every (n, c) on its own, then the rows in the order of n: any number of threads gives the same bits.
  // Samples are divided first: where channels are neighbours in memory, half a row is read no faster than a whole one.
  // Blocks are multiples of 64 channels, so that a channel meets the same instructions wherever the cut is.
  const int64_t wanted = ceil_div(2 * static_cast<int64_t>(torch::stable::get_num_threads()), N);
  const int64_t block = std::min(C, ceil_div(ceil_div(C, wanted), 64) * 64);
  const int64_t blocks = ceil_div(C, block);
  std::vector<float> partial(N * C, 0.0f);
  torch::stable::parallel_for(0, N * blocks, std::max<int64_t>(1, kGrain / (block * positions)), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks;
      const int64_t c = task % blocks * block;
      kernel(args, n, c, std::min(C, c + block), partial.data() + n * C + c, scratch.data());
    }
  });
  torch::stable::parallel_for(0, C, std::max<int64_t>(64, kGrain / N), [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N; ++n) {
      float* const dst = out_data + row[n] * C;
      const float* const src = partial.data() + n * C;
      for (int64_t c = begin; c < end; ++c) dst[c] += src[c];
    }
  });
}

// ---- wanda_score --------------------------------------------------------------------------------------------------

// Row-dense weight: [C_out] rows of K = inner * (C_in / groups) elements; channels are the fast index in channels-last.
template <class Scalar>
void score_into(const Tensor& weight, Element element, bool channels_last, const float* act_norm, int64_t groups, float* row,
                float* col) {
  const int64_t rows = weight.size(0);
  const int64_t channels = weight.size(1);
  int64_t inner = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) inner *= weight.size(d);
  const int64_t K = channels * inner;
  const int64_t group_rows = rows / groups;
  const int64_t chunks = ceil_div(group_rows, kScoreRows);  // of one group: a chunk reads one slice of the norms

  std::vector<Scalar> norms(groups * K);
  for (int64_t g = 0; g < groups; ++g) {
    Scalar* p = norms.data() + g * K;
    const float* n = act_norm + g * channels;
    if (channels_last) {
      for (int64_t k = 0; k < inner; ++k)
        for (int64_t i = 0; i < channels; ++i) *p++ = n[i];
    } else {
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t k = 0; k < inner; ++k) *p++ = n[i];
    }
  }

  const ScoreFn kernel = cpu_kernels().score[element];
  std::vector<Scalar> partial(groups * chunks * channels);
  const int64_t chunk_work = std::min(group_rows, kScoreRows) * K;
  torch::stable::parallel_for(0, groups * chunks, std::max<int64_t>(1, kGrain / chunk_work), [&](int64_t begin, int64_t end) {
    std::vector<Scalar> column(K);
    double row_sum[kScoreRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / chunks;
      const int64_t first = g * group_rows + task % chunks * kScoreRows;
      const int64_t last = std::min((g + 1) * group_rows, first + kScoreRows);
      const ScoreArgs args{weight.const_data_ptr(), weight.stride(0), K, norms.data() + g * K};
      kernel(args, first, last, row_sum, column.data());
      for (int64_t r = first; r < last; ++r) row[r] = static_cast<float>(row_sum[r - first]);
      Scalar* const sum = partial.data() + task * channels;
      if (channels_last || inner == 1) {
        for (int64_t i = 0; i < channels; ++i) sum[i] = column[i];
        for (int64_t k = 1; k < inner; ++k)
          for (int64_t i = 0; i < channels; ++i) sum[i] += column[k * channels + i];
      } else {
        for (int64_t i = 0; i < channels; ++i) {
          Scalar s = 0;
          for (int64_t k = 0; k < inner; ++k) s += column[i * inner + k];
          sum[i] = s;
        }
      }
    }
  });
  // Blocks of neighbouring channels: down one channel, every partial would be in another cache line.
  constexpr int64_t kBlock = 64;
  const int64_t blocks = ceil_div(channels, kBlock);  // of one group
  torch::stable::parallel_for(0, groups * blocks, std::max<int64_t>(1, kGrain / (kBlock * chunks)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b % blocks * kBlock;
      const int64_t count = std::min(kBlock, channels - first);
      const Scalar* p = partial.data() + b / blocks * chunks * channels + first;
      double sum[kBlock] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk, p += channels)
        for (int64_t i = 0; i < count; ++i) sum[i] += p[i];
      const int64_t c = b / blocks * channels + first;
      for (int64_t i = 0; i < count; ++i) col[c + i] = static_cast<float>(sum[i] * act_norm[c + i]);
    }
  });
}

// Whether each row (everything but dimension 0) is one dense run in the given format.
bool rows_dense(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool ok = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return ok;
  };
  if (channels_last && !fits(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return channels_last || t.dim() < 2 || fits(1);
}

std::tuple<Tensor, Tensor> score_tensors(const Tensor& weight, const float* act_norm, int64_t channels_in) {
  const Element element = element_of(weight, "weight");
  STD_TORCH_CHECK(weight.dim() >= 2, "weight: must have at least 2 dimensions, not ", weight.dim());
  const int64_t rows = weight.size(0);
  const int64_t channels = weight.size(1);
  Tensor row = empty_float(rows);
  Tensor col = empty_float(channels_in);
  float* const row_data = static_cast<float*>(row.mutable_data_ptr());
  float* const col_data = static_cast<float*>(col.mutable_data_ptr());
  if (weight.numel() == 0 || channels_in == 0) {
    std::fill_n(row_data, rows, 0.0f);
    std::fill_n(col_data, channels_in, 0.0f);
    return {row, col};
  }
  STD_TORCH_CHECK(channels_in % channels == 0 && rows % (channels_in / channels) == 0, "act_norm: ", channels_in,
                  " channels do not fit a weight of ", rows, " rows and ", channels, " input channels per group");
  Tensor dense = weight;
  bool channels_last = false;
  if (!rows_dense(dense, false)) {
    channels_last = rows_dense(dense, true);
    if (!channels_last) dense = torch::stable::contiguous(weight);
  }
  const int64_t groups = channels_in / channels;
  if (element == kFloat64) {
    score_into<double>(dense, element, channels_last, act_norm, groups, row_data, col_data);
  } else {
    score_into<float>(dense, element, channels_last, act_norm, groups, row_data, col_data);
  }
  return {row, col};
}

std::tuple<Tensor, Tensor> wanda_score(const Tensor& weight, const Tensor& act_norm) {
  STD_TORCH_CHECK(act_norm.dim() == 1 && act_norm.scalar_type() == ScalarType::Float, "act_norm: must be [C_in] float32");
  const Tensor dense = torch::stable::contiguous(act_norm);
  return score_tensors(weight, static_cast<const float*>(dense.const_data_ptr()), act_norm.size(0));
}

std::tuple<Tensor, Tensor> wanda_score_stats(const Tensor& weight, const Tensor& sq, const Tensor& row_weight) {
  STD_TORCH_CHECK(sq.dim() == 2 && sq.scalar_type() == ScalarType::Float, "sq: must be [R, C_in] float32");
  STD_TORCH_CHECK(row_weight.dim() == 1 && row_weight.size(0) == sq.size(0) && row_weight.scalar_type() == ScalarType::Float,
                  "row_weight: must be [R] float32");
  const Tensor table = torch::stable::contiguous(sq);
  const Tensor scale = torch::stable::contiguous(row_weight);
  const int64_t R = sq.size(0);
  const int64_t C = sq.size(1);
  std::vector<float> act_norm(C);
  const float* const table_data = static_cast<const float*>(table.const_data_ptr());
  const float* const scale_data = static_cast<const float*>(scale.const_data_ptr());
  // Blocks of whole vectors, so that a channel meets the same instructions however many threads there are.
  constexpr int64_t block = 64;
  const int64_t grain = std::max<int64_t>(1, kGrain / (block * std::max<int64_t>(1, R)));
  torch::stable::parallel_for(0, ceil_div(C, block), grain, [&](int64_t begin, int64_t end) {
    double scratch[block];
    for (int64_t b = begin; b < end; ++b) {
      cpu_kernels().norm(table_data, C, scale_data, R, b * block, std::min(C, (b + 1) * block), act_norm.data(), scratch);
    }
  });
  return score_tensors(weight, act_norm.data(), C);
}

// ---- compact ------------------------------------------------------------------------------------------------------

// One tensor of the job, as [rows, outer, channels, inner] in memory: inner > 1 for contiguous convolution weights,
// outer > 1 for channels-last ones.
struct Gather {
  const char* src;
  char* dst;
  int64_t row_bytes;      // between rows of the source
  int64_t out_row_bytes;  // of one row of the result
  int64_t outer, channel_bytes, channels, out_channels;
  const int64_t* keep_out;  // null: all
  const int64_t* keep_in;
  std::vector<std::pair<int64_t, int64_t>> runs;  // (offset, length) in bytes of neighbours in keep_in, when they are long
  bool cast;
  Element from, to;
  int64_t cast_row_bytes;  // of one row of the result, after the cast
};

template <class T>
void gather_elements(const T* src, T* dst, const int64_t* index, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[index[i]];
}

void gather_row(const Gather& g, const char* src, char* dst) {
  if (!g.keep_in) {
    std::memcpy(dst, src, g.out_row_bytes);
    return;
  }
  for (int64_t o = 0; o < g.outer; ++o, src += g.channels * g.channel_bytes, dst += g.out_channels * g.channel_bytes) {
    if (!g.runs.empty()) {
      char* p = dst;
      for (const auto& [offset, length] : g.runs) {
        std::memcpy(p, src + offset, length);
        p += length;
      }
    } else if (g.channel_bytes == 4) {
      gather_elements(reinterpret_cast<const uint32_t*>(src), reinterpret_cast<uint32_t*>(dst), g.keep_in, g.out_channels);
    } else if (g.channel_bytes == 2) {
      gather_elements(reinterpret_cast<const uint16_t*>(src), reinterpret_cast<uint16_t*>(dst), g.keep_in, g.out_channels);
    } else if (g.channel_bytes == 8) {
      gather_elements(reinterpret_cast<const uint64_t*>(src), reinterpret_cast<uint64_t*>(dst), g.keep_in, g.out_channels);
    } else if (g.channel_bytes == 1) {
      gather_elements(reinterpret_cast<const uint8_t*>(src), reinterpret_cast<uint8_t*>(dst), g.keep_in, g.out_channels);
    } else {
      for (int64_t i = 0; i < g.out_channels; ++i)
        std::memcpy(dst + i * g.channel_bytes, src + g.keep_in[i] * g.channel_bytes, g.channel_bytes);
    }
  }
}

// Through float, as PyTorch's casts between these types go (float64 to a half type rounds twice there too).
void cast_row(const Gather& g, const char* src, char* dst) {
  constexpr int64_t kBlock = 1024;
  constexpr int64_t kSize[kElements] = {4, 8, 2, 2};
  const ToFloatFn to_float = cpu_kernels().to_float[g.from];
  const FromFloatFn from_float = cpu_kernels().from_float[g.to];
  const int64_t count = g.out_row_bytes / kSize[g.from];
  float block[kBlock];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t n = std::min(kBlock, count - i);
    const char* const from = src + i * kSize[g.from];
    char* const to = dst + i * kSize[g.to];
    const float* values = to_float ? block : reinterpret_cast<const float*>(from);
    if (to_float) to_float(from, from_float ? block : reinterpret_cast<float*>(to), n);
    if (from_float) from_float(values, to, n);
  }
}

// Rows `begin` to `end` of the result. A cast row is gathered into `scratch` first, which stays in the cache.
void gather_rows(const Gather& g, int64_t begin, int64_t end, std::vector<char>& scratch) {
  if (g.cast && g.keep_in) scratch.resize(g.out_row_bytes);
  for (int64_t row = begin; row < end; ++row) {
    const char* const src = g.src + (g.keep_out ? g.keep_out[row] : row) * g.row_bytes;
    if (!g.cast) {
      gather_row(g, src, g.dst + row * g.out_row_bytes);
    } else {
      if (g.keep_in) gather_row(g, src, scratch.data());
      cast_row(g, g.keep_in ? scratch.data() : src, g.dst + row * g.cast_row_bytes);
    }
  }
}

// Copying runs beats copying elements when they are long, or when an element is not a machine word.
void find_runs(Gather& g) {
  int64_t count = 0;
  for (int64_t i = 0; i < g.out_channels; ++i) count += i == 0 || g.keep_in[i] != g.keep_in[i - 1] + 1;
  const bool word = g.channel_bytes == 1 || g.channel_bytes == 2 || g.channel_bytes == 4 || g.channel_bytes == 8;
  if (word && g.out_channels < 16 * count) return;
  g.runs.reserve(count);
  for (int64_t i = 0; i < g.out_channels; ++i) {
    if (i == 0 || g.keep_in[i] != g.keep_in[i - 1] + 1) g.runs.emplace_back(g.keep_in[i] * g.channel_bytes, 0);
    g.runs.back().second += g.channel_bytes;
  }
}

std::vector<Tensor> compact(std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> keep_out,
                            std::vector<std::optional<Tensor>> keep_in, std::optional<ScalarType> dtype) {
  const size_t count = tensors.size();
  STD_TORCH_CHECK(keep_out.size() == count && keep_in.size() == count, "keep_out and keep_in: must have one entry per tensor, ",
                  count, "; they have ", keep_out.size(), " and ", keep_in.size());
  Element wanted = kFloat32;
  int32_t wanted_dtype = 0;
  if (dtype) std::tie(wanted, wanted_dtype) = wanted_type(*dtype);
  std::vector<Tensor> results, alive;  // alive: contiguous copies, needed until the gather is done
  std::vector<Gather> jobs(count);
  results.reserve(count);
  const auto index_of = [&](std::optional<Tensor>& keep, int64_t limit, const char* name, size_t i, int64_t& length) -> const int64_t* {
    length = limit;
    if (!keep) return nullptr;
    STD_TORCH_CHECK(keep->dim() == 1 && keep->scalar_type() == ScalarType::Long && keep->is_cpu(), name, "[", i, "]: must be 1-D int64");
    if (!keep->is_contiguous()) keep = torch::stable::contiguous(*keep);
    length = keep->size(0);
    const int64_t* data = static_cast<const int64_t*>(keep->const_data_ptr());
    check_indices(data, length, limit, name, static_cast<int64_t>(i));
    return data;
  };
  for (size_t i = 0; i < count; ++i) {
    Tensor t = tensors[i];
    const int64_t dim = t.dim();
    STD_TORCH_CHECK(dim >= 1, "tensors[", i, "]: must have at least one dimension");
    STD_TORCH_CHECK(dim >= 2 || !keep_in[i], "keep_in[", i, "]: must be None for a 1-D tensor");
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    std::vector<int64_t> strides(dim);
    Gather& g = jobs[i];
    g.keep_out = index_of(keep_out[i], sizes[0], "keep_out", i, sizes[0]);
    g.channels = dim >= 2 ? t.size(1) : 1;
    g.out_channels = g.channels;
    g.keep_in = dim >= 2 ? index_of(keep_in[i], g.channels, "keep_in", i, g.out_channels) : nullptr;
    if (dim >= 2) sizes[1] = g.out_channels;
    int64_t inner = 1;
    for (int64_t d = 2; d < dim; ++d) inner *= sizes[d];
    bool channels_last = false;
    const bool rows_follow = t.size(0) == 1 || t.stride(0) == g.channels * inner;  // the stride of a single row means nothing
    if (!rows_follow || !rows_dense(t, false)) {
      channels_last = (dim == 4 || dim == 5) && rows_follow && rows_dense(t, true);
      if (!channels_last) {
        t = torch::stable::contiguous(t);
        alive.push_back(t);
      }
    }
    int64_t stride = 1;
    if (channels_last) stride *= sizes[1], strides[1] = 1;
    for (int64_t d = dim - 1; d >= (channels_last ? 2 : 0); --d) {
      strides[d] = stride;
      stride *= sizes[d];
    }
    if (channels_last) strides[0] = stride;
    int32_t result_dtype = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &result_dtype));
    g.cast = dtype && t.scalar_type() != *dtype && is_element(t.scalar_type());
    if (g.cast) {
      g.from = element_of(t, "tensors");
      g.to = wanted;
      result_dtype = wanted_dtype;
    }
    Tensor result = empty_strided(sizes, strides, result_dtype);
    const int64_t size = static_cast<int64_t>(t.element_size());
    g.src = static_cast<const char*>(t.const_data_ptr());
    g.dst = static_cast<char*>(result.mutable_data_ptr());
    g.outer = channels_last ? inner : 1;
    g.channel_bytes = channels_last ? size : inner * size;
    g.row_bytes = g.channels * inner * size;
    g.out_row_bytes = g.out_channels * inner * size;
    g.cast_row_bytes = g.out_channels * inner * static_cast<int64_t>(result.element_size());
    if (g.keep_in) find_runs(g);
    results.push_back(result);
  }
  // Tasks of about kTaskBytes: many small tensors share a thread, a large one is spread over all of them.
  constexpr int64_t kTaskBytes = 1 << 17;
  struct Task {
    size_t job;
    int64_t begin, end;
  };
  std::vector<Task> tasks;
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t rows = results[i].size(0);
    if (results[i].numel() == 0) continue;
    total += rows * jobs[i].out_row_bytes;
    const int64_t step = std::max<int64_t>(1, kTaskBytes / jobs[i].out_row_bytes);
    for (int64_t r = 0; r < rows; r += step) tasks.push_back({i, r, std::min(rows, r + step)});
  }
  const int64_t task_count = static_cast<int64_t>(tasks.size());
  const int64_t grain = total < kTaskBytes ? std::max<int64_t>(1, task_count) : 1;
  torch::stable::parallel_for(0, task_count, grain, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch;
    for (int64_t i = begin; i < end; ++i) gather_rows(jobs[tasks[i].job], tasks[i].begin, tasks[i].end, scratch);
  });
  return results;
}

// ---- conv_gram ----------------------------------------------------------------------------------------------------

// A map [N, C, H, W] as fp32 rows, one per position, with zeros up to `stride`.
struct RowTable {
  int64_t columns, stride;
  std::vector<float> data;
};

// An odd number of cache lines, so that the same column of neighbouring rows falls into different cache sets.
int64_t gram_stride(int64_t columns) { return (ceil_div(columns, 16) | 1) * 16; }

void fill_rows(const Tensor& x, Element element, const float* weight, int64_t first, int64_t count, RowTable& table) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), P = H * W;
  constexpr int64_t kSize[kElements] = {4, 8, 2, 2};
  const int64_t sn = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const char* const source = static_cast<const char*>(x.const_data_ptr());
  const ToFloatFn convert = cpu_kernels().to_float[element];
  table.columns = C;
  table.stride = gram_stride(table.columns);
  table.data.assign(count * P * table.stride + 2 * kGramPad, 0.0f);
  torch::stable::parallel_for(0, count * H, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, W * C)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 64;
    float block[kBlock];
    for (int64_t line = begin; line < end; ++line) {
      const int64_t n = line / H;
      const char* const from = source + ((first + n) * sn + line % H * sh) * kSize[element];
      float* const to = table.data.data() + line * W * table.stride;
      const float scale = weight ? weight[first + n] : 1.0f;
      // Reads run along whichever dimension is dense.
      const bool along_channels = sc == 1 || sw != 1;
      const int64_t inner = along_channels ? C : W, outer = along_channels ? W : C;
      const int64_t inner_stride = along_channels ? sc : sw, outer_stride = along_channels ? sw : sc;
      const int64_t inner_to = along_channels ? 1 : table.stride, outer_to = along_channels ? table.stride : 1;
      for (int64_t i = 0; i < inner; i += kBlock) {
        const int64_t length = std::min(kBlock, inner - i);
        for (int64_t o = 0; o < outer; ++o) {
          const char* const p = from + (o * outer_stride + i * inner_stride) * kSize[element];
          const float* values = reinterpret_cast<const float*>(p);
          if (inner_stride != 1) {
            for (int64_t k = 0; k < length; ++k) {
              const char* const q = p + k * inner_stride * kSize[element];
              if (convert) {
                convert(q, block + k, 1);
              } else {
                block[k] = *reinterpret_cast<const float*>(q);
              }
            }
            values = block;
          } else if (convert) {
            convert(p, block, length);
            values = block;
          }
          float* const q = to + o * outer_to + i * inner_to;
          for (int64_t k = 0; k < length; ++k) q[k * inner_to] = values[k] * scale;
        }
      }
    }
  });
}

// One product: the sum over all samples of the outer products of row pairs (a, b), positions within a sample; or with `ones`
// the sum of the rows a alone.
struct RowProduct {
  const RowTable* left;
  const RowTable* right;
  bool ones;
  std::vector<std::pair<int64_t, int64_t>> pairs;
  float* out;
  int64_t out_stride;
};

// Adds the products of `samples` samples with P positions each to their results, in tasks that depend on the shapes alone.
void add_products(const std::vector<RowProduct>& products, int64_t samples, int64_t P) {
  struct Task {
    const RowProduct* product;
    int64_t begin, end;  // rows of the result
  };
  std::vector<Task> tasks;
  constexpr int64_t kWork = 1 << 22;  // multiplications
  for (const RowProduct& p : products) {
    const int64_t per_tile = std::max<int64_t>(1, samples * static_cast<int64_t>(p.pairs.size()) * (p.ones ? 1 : p.right->stride) * kGramTile);
    const int64_t step = std::max<int64_t>(1, kWork / per_tile) * kGramTile;
    for (int64_t i = 0; i < p.left->columns; i += step) tasks.push_back({&p, i, std::min(p.left->columns, i + step)});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums;
    int64_t a_rows[kGramRows], b_rows[kGramRows];
    for (int64_t t = begin; t < end; ++t) {
      const Task& task = tasks[t];
      const RowProduct& p = *task.product;
      const RowTable &left = *p.left, &right = *p.right;
      const int64_t pairs = static_cast<int64_t>(p.pairs.size()), rows = task.end - task.begin;
      const int64_t c_stride = right.stride + kGramPad;
      sums.assign(p.ones ? 2 * rows : (rows + kGramTile) * c_stride + kGramPad, 0.0f);
      GramArgs args{left.data.data() + task.begin, right.data.data(), a_rows, b_rows, 0, 0, rows, right.columns, sums.data(), c_stride};
      int64_t n = 0, k = 0;
      for (int64_t done = 0; done < samples * pairs; done += args.count) {
        args.count = std::min(kGramRows, samples * pairs - done);
        for (int64_t m = 0; m < args.count; ++m) {
          a_rows[m] = (n * P + p.pairs[k].first) * left.stride;
          b_rows[m] = (n * P + p.pairs[k].second) * right.stride;
          if (++k == pairs) k = 0, ++n;
        }
        if (p.ones) {
          float* const block = sums.data() + rows;  // short sums first
          std::fill_n(block, rows, 0.0f);
          for (int64_t m = 0; m < args.count; ++m)
            for (int64_t i = 0; i < rows; ++i) block[i] += args.a[a_rows[m] + i];
          for (int64_t i = 0; i < rows; ++i) sums[i] += block[i];
        } else {
          cpu_kernels().gram(args);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* const out = p.out + (task.begin + i) * p.out_stride;
        if (p.ones) {
          out[0] += sums[i];
          continue;
        }
        for (int64_t j = 0; j < right.columns; ++j) out[j] += sums[i * c_stride + j];
      }
    }
  });
}

// The sums that conv_gram.py assembles for a 3 x 3 convolution of stride 1 and padding 1, see conv_gram_shift there: [13, C, C] over the map by
// offset difference, [12, C, C] over border lines, [4, C, C] over corners, [9, C, C_out + 1] with y. Nothing is padded: pairs of
// positions of which one lies outside the map are left out, where the composition of GEMMs multiplies zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_gram_sums(const Tensor& x, const Tensor& y, std::optional<Tensor> weight) {
  const Element element_x = element_of(x, "x"), element_y = element_of(y, "y");
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && x.size(0) == y.size(0) && x.size(2) == y.size(2) && x.size(3) == y.size(3),
                  "y: must have the samples, height and width of x, both [N, C, H, W]");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = H * W;
  std::vector<float> scales;
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == N && weight->scalar_type() == ScalarType::Float, "weight: must be [N] float32");
    const float* const w = static_cast<const float*>(weight->const_data_ptr());
    for (int64_t n = 0; n < N; ++n) scales.push_back(w[n * weight->stride(0)]);
  }
  const float* const scale = weight ? scales.data() : nullptr;
  const auto zeros = [&](int64_t count, int64_t columns) {
    Tensor t = empty_strided({count, C, columns}, {C * columns, columns, 1}, aoti_torch_dtype_float32());
    std::fill_n(static_cast<float*>(t.mutable_data_ptr()), count * C * columns, 0.0f);
    return t;
  };
  const int64_t columns_y = y.size(1) + 1;
  Tensor full = zeros(13, C), lines = zeros(12, C), corners = zeros(4, C), cross = zeros(9, columns_y);
  if (N == 0 || C == 0 || P == 0) return {full, lines, corners, cross};

  RowTable z, weighted, v;
  std::vector<RowProduct> products;
  // Pairs of positions p and p + (dy, dx) inside the map.
  const auto shifted = [&](int64_t dy, int64_t dx) {
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int64_t h = std::max<int64_t>(0, -dy); h < H - std::max<int64_t>(0, dy); ++h)
      for (int64_t w = std::max<int64_t>(0, -dx); w < W - std::max<int64_t>(0, dx); ++w) pairs.emplace_back(h * W + w, (h + dy) * W + w + dx);
    return pairs;
  };
  const RowTable* const right = weight ? &weighted : &z;
  const auto add = [&](Tensor& out, int64_t index, const RowTable* table, int64_t columns, std::vector<std::pair<int64_t, int64_t>> pairs) {
    products.push_back({&z, table, false, std::move(pairs), static_cast<float*>(out.mutable_data_ptr()) + index * C * columns, columns});
  };
  int64_t index = 0;
  for (int64_t dy = 0; dy <= 2; ++dy)
    for (int64_t dx = dy == 0 ? 0 : -2; dx <= 2; ++dx) add(full, index++, right, C, shifted(dy, dx));
  index = 0;
  for (int64_t ty = -1; ty <= 1; ++ty)
    for (int64_t tx = -1; tx <= 1; ++tx) {
      auto pairs = shifted(-ty, -tx);  // (p + tap, p)
      float* const last = static_cast<float*>(cross.mutable_data_ptr()) + index * C * columns_y + columns_y - 1;
      products.push_back({right, right, true, pairs, last, columns_y});
      add(cross, index++, &v, columns_y, std::move(pairs));
    }
  index = 0;
  for (const bool row : {true, false})
    for (const bool last : {true, false})
      for (int64_t shift = 0; shift < 3; ++shift) {
        std::vector<std::pair<int64_t, int64_t>> pairs;
        const int64_t length = row ? W : H, fixed = last ? (row ? H : W) - 1 : 0;
        for (int64_t i = 0; i + shift < length; ++i)
          pairs.emplace_back(row ? fixed * W + i : i * W + fixed, row ? fixed * W + i + shift : (i + shift) * W + fixed);
        add(lines, index++, right, C, std::move(pairs));
      }
  index = 0;
  for (const int64_t h : {H - 1, static_cast<int64_t>(0)})
    for (const int64_t w : {W - 1, static_cast<int64_t>(0)}) add(corners, index++, right, C, {{h * W + w, h * W + w}});

  // Samples whose tables fit a few MiB at a time: memory stays bounded, and a table is read from the cache by all its products.
  constexpr int64_t kTableBytes = 8 << 20;
  const int64_t per_sample = P * 4 * (gram_stride(C) * (weight ? 2 : 1) + gram_stride(y.size(1)));
  const int64_t step = std::max<int64_t>(1, kTableBytes / per_sample);
  for (int64_t first = 0; first < N; first += step) {
    const int64_t samples = std::min(step, N - first);
    fill_rows(x, element_x, nullptr, first, samples, z);
    if (weight) fill_rows(x, element_x, scale, first, samples, weighted);
    fill_rows(y, element_y, scale, first, samples, v);
    add_products(products, samples, P);
  }
  return {full, lines, corners, cross};
}

}  // namespace
}  // namespace wanda_fast

STABLE_TORCH_LIBRARY_IMPL(wanda_fast, CPU, m) {
  m.impl("channel_sq_norm", TORCH_BOX(&wanda_fast::channel_sq_norm));
  m.impl("wanda_score", TORCH_BOX(&wanda_fast::wanda_score));
  m.impl("wanda_score_stats", TORCH_BOX(&wanda_fast::wanda_score_stats));
  m.impl("compact", TORCH_BOX(&wanda_fast::compact));
  m.impl("conv_gram_sums", TORCH_BOX(&wanda_fast::conv_gram_sums));
}
