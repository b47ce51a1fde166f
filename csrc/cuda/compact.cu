// Physical pruning of a whole network on the GPU: result[i] = tensor[i].index_select(0, keep_out[i]).index_select(1, keep_in[i]).
//
// All tensors share a launch: a table of descriptors travels as kernel parameter (no copy to the device, safe in a captured graph), and every
// block finds its tensor by binary search. A block works out the source offset of each of its columns once and then walks down the rows, so index
// reads and divisions are spread over many rows. Where every 16-byte group of a block's columns is one aligned run in the source it moves
// 16 bytes per thread; elsewhere neighbouring threads move neighbouring elements.
// A cast to another floating-point type happens between load and store.
// Traffic: each kept element is read once and written once.

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "../stable_macros.h"

namespace wanda_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;
// Rows one thread copies. With 16 bytes per row a block moves 32 KiB, long enough to pay for its column map; 4, 16 and 32 rows were slower.
constexpr int kRowsPerThread = 8;
constexpr int kMaxRows = 512;  // of a block: their offsets are in shared memory
constexpr int kWideAhead = 4;     // rows that one thread loads before it stores, four 32-bit columns each
constexpr int kWideAhead16 = 2;   // the same for four pairs of 16-bit columns

enum Float : int { kNone = -1, kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
__host__ __device__ constexpr int cast_kind(int from, int to) { return 32 + 4 * from + to; }

Float float_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Double: return kFloat64;
    default: return kNone;
  }
}

// One tensor seen as [rows, outer, channels, inner] words: inner > 1 for contiguous convolution weights, outer > 1 for channels-last ones.
struct Gather {
  const char* src;
  char* dst;
  const int64_t* keep_out;  // null: all rows
  const int64_t* keep_in;   // null: all channels
  int64_t row_stride;       // words between source rows
  int64_t rows;             // of the result
  int64_t src_rows;
  int32_t columns;  // words per row of the result
  int32_t channels;
  int32_t out_channels;
  int32_t inner;
  int32_t first_block;
  int32_t column_blocks;
  int16_t bytes;  // of a word of the result
  int16_t kind;   // bytes of a word that is moved as it is (1, 2, 4, 8 or 16), or a cast_kind
  int16_t width;  // threads along a row, a power of two
};

// Kernel parameters end at 4 KiB before CUDA 12.1 and at 32,764 bytes since; the smaller tables cost less to send.
template <int kCapacity>
struct Table {
  int32_t count;
  Gather gather[kCapacity];
};
constexpr int kSmall = 46;
constexpr int kMedium = 120;
constexpr int kLarge = 360;
static_assert(sizeof(Table<kSmall>) <= 4096 && sizeof(Table<kLarge>) <= 32764, "the table must fit the kernel parameters");

__device__ __forceinline__ bool inside(int64_t index, int64_t limit) { return index >= 0 && index < limit; }

__device__ __noinline__ void stop(const char* name, int64_t limit) {
  printf("wanda_fast::compact: %s holds an index outside [0, %lld)\n", name, static_cast<long long>(limit));
  __trap();
}

// `bytes` of a word of the result. 16-bit words walk down twice the rows: their map has twice the columns.
__host__ __device__ __forceinline__ int32_t rows_per_block(int32_t width, int32_t bytes) {
  if (width == kThreads) return bytes == 2 ? 2 * kRowsPerThread : kRowsPerThread;
  const int32_t rows = kThreads / width * kRowsPerThread;
  return rows < kMaxRows ? rows : kMaxRows;
}

// Casts go through float, as PyTorch's do: exact from 16 bits, and from double the same two roundings.
template <class Dst, class Src>
__device__ __forceinline__ Dst convert(Src value) {
  if constexpr (std::is_same_v<Dst, Src>) {
    return value;
  } else if constexpr (std::is_same_v<Dst, double>) {
    return static_cast<double>(static_cast<float>(value));
  } else {
    return static_cast<Dst>(static_cast<float>(value));
  }
}

// Keeps the compiler from taking a hoisted address apart again, which made four instructions per element of one addition.
__device__ __forceinline__ const char* opaque(const char* pointer) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// The sources are not written while the kernel runs. `opaque` hides from the compiler that they lie in global memory; __ldg says it again.
template <class T>
__device__ __forceinline__ T load(const char* from) {
  using Raw = std::conditional_t<sizeof(T) == 2, unsigned short, std::conditional_t<sizeof(T) == 4, unsigned int, unsigned long long>>;
  const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
  T value;
  memcpy(&value, &raw, sizeof(T));
  return value;
}

template <class Word>
struct alignas(2 * sizeof(Word)) Pair {
  Word low, high;
};

// Wide rows: `kColumns` columns of a thread, kThreads apart so that neighbouring threads store neighbouring words; 16-bit results in pairs, one
// 32-bit store each. Nothing is checked per row: the columns a block lacks are predicates, and rows left over take a loop of their own.
template <class Src, class Dst>
__device__ __forceinline__ void copy_wide(const Src* src, Dst* dst, int64_t row_length, int32_t columns, int32_t rows,
                                          const int32_t* column_map, const int64_t* row_map) {
  constexpr int kPack = sizeof(Dst) == 2 ? 2 : 1;
  constexpr int kColumns = kVectorBytes / sizeof(Dst) / kPack;
  constexpr int kAhead = kPack == 2 ? kWideAhead16 : kWideAhead;
  const int32_t start = static_cast<int32_t>(threadIdx.x) * kPack;
  const char* column[kColumns][kPack];  // bytes: a row's address is one addition away
  bool valid[kColumns];
#pragma unroll
  for (int w = 0; w < kColumns; ++w) {
    valid[w] = start + w * kThreads * kPack < columns;
#pragma unroll
    for (int p = 0; p < kPack; ++p)
      column[w][p] = opaque(reinterpret_cast<const char*>(src + (valid[w] ? column_map[start + w * kThreads * kPack + p] : 0)));
  }
  Dst* to = dst + start;
  const auto copy = [&](int32_t row, auto ahead) {
    constexpr int kRows = decltype(ahead)::value;
    Src value[kRows][kColumns][kPack];
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const int64_t bytes = row_map[row + a] * static_cast<int64_t>(sizeof(Src));
#pragma unroll
      for (int w = 0; w < kColumns; ++w)
        if (valid[w]) {
#pragma unroll
          for (int p = 0; p < kPack; ++p) value[a][w][p] = load<Src>(column[w][p] + bytes);
        }
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
#pragma unroll
      for (int w = 0; w < kColumns; ++w)
        if (valid[w]) {
          if constexpr (kPack == 2) {
            const Pair<Dst> both{convert<Dst>(value[a][w][0]), convert<Dst>(value[a][w][1])};
            *reinterpret_cast<Pair<Dst>*>(to + w * kThreads * kPack) = both;
          } else {
            to[w * kThreads] = convert<Dst>(value[a][w][0]);
          }
        }
      to += row_length;
    }
  };
  int32_t row = 0;
  for (; row + kAhead <= rows; row += kAhead) copy(row, std::integral_constant<int, kAhead>());
#pragma unroll 1
  for (; row < rows; ++row) copy(row, std::integral_constant<int, 1>());
}

template <class Src, class Dst>
__device__ __forceinline__ void copy_rows(const Gather& g, int32_t local, int32_t* column_map, int64_t* row_map) {
  constexpr bool kCast = !std::is_same_v<Src, Dst>;
  constexpr int kWords = kVectorBytes / sizeof(Dst);  // columns per thread
  const int32_t width = g.width;
  const int32_t height = kThreads / width;
  const int32_t lane = threadIdx.x % width;
  const int32_t level = threadIdx.x / width;
  const int32_t first_column = local % g.column_blocks * width * kWords;
  const int64_t first_row = static_cast<int64_t>(local / g.column_blocks) * rows_per_block(width, sizeof(Dst));
  const int32_t rows = static_cast<int32_t>(min(g.rows - first_row, static_cast<int64_t>(rows_per_block(width, sizeof(Dst)))));
  const Src* const src = reinterpret_cast<const Src*>(g.src);
  Dst* const dst = reinterpret_cast<Dst*>(g.dst) + first_row * g.columns + first_column;
  const int32_t columns = min(g.columns - first_column, width * kWords);

  // Source offsets of the block's rows and columns, worked out once and kept in shared memory.
  bool run = !kCast && g.columns % kWords == 0 && g.row_stride % kWords == 0 && reinterpret_cast<uintptr_t>(g.src) % kVectorBytes == 0 &&
             reinterpret_cast<uintptr_t>(g.dst) % kVectorBytes == 0;
  if (static_cast<int32_t>(threadIdx.x) < width) {
    // All index loads are issued before the first is used or checked: one after the other they took as long as the copy.
    // One division per thread: its columns follow each other, so the rest is counting.
    int64_t channel[kWords];
    int32_t base[kWords];
    int32_t column = first_column + lane * kWords;
    int32_t outer = 0, kept = 0, tap = column;
    if (g.keep_in != nullptr) {
      const int32_t c = column / g.inner;
      tap = column - c * g.inner;
      outer = c / g.out_channels;
      kept = c - outer * g.out_channels;
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w, ++column) {
      channel[w] = 0;
      base[w] = column;
      if (g.keep_in != nullptr && column < g.columns) {
        channel[w] = g.keep_in[kept];
        base[w] = outer * g.channels * g.inner + tap;
        if (++tap == g.inner) {
          tap = 0;
          if (++kept == g.out_channels) kept = 0, ++outer;
        }
      }
    }
    bool good = true;
    int32_t mine[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      good = good && (g.keep_in == nullptr || inside(channel[w], g.channels));
      mine[w] = base[w] + static_cast<int32_t>(channel[w]) * g.inner;  // a source row has fewer than 2^31 words
    }
    if (!good) stop("keep_in", g.channels);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      column_map[lane * kWords + w] = mine[w];
      run = run && mine[w] == mine[0] + w;
    }
    run = run && mine[0] % kWords == 0;
  }
  for (int32_t r = threadIdx.x; r < rows; r += kThreads) {
    int64_t index = first_row + r;
    if (g.keep_out != nullptr) {
      index = g.keep_out[index];
      if (!inside(index, g.src_rows)) stop("keep_out", g.src_rows);
    }
    row_map[r] = index * g.row_stride;
  }

  // Sixteen bytes at a time if that is legal for every thread of the block.
  if (__syncthreads_and(run)) {
    if constexpr (!kCast) {
      const int32_t column = lane * kWords;
      if (column >= columns) return;
      const Src* const from = src + column_map[column];
      constexpr int kAhead = 4;
      for (int32_t row = level; row < rows; row += kAhead * height) {
        uint4 value[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (row + a * height < rows) value[a] = __ldcs(reinterpret_cast<const uint4*>(from + row_map[row + a * height]));
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (row + a * height < rows)
            __stcs(reinterpret_cast<uint4*>(dst + static_cast<int64_t>(row + a * height) * g.columns + column), value[a]);
      }
    }
    return;
  }
  if constexpr (sizeof(Dst) == 2 || sizeof(Dst) == 4) {
    // Pairs need an even row: then every row of the result, and with it every pair, is aligned.
    if (width == kThreads && (sizeof(Dst) == 4 || g.columns % 2 == 0)) {
      copy_wide(src, dst, g.columns, columns, rows, column_map, row_map);
      return;
    }
  }

  // Columns of one thread at a time: bytes take two passes, so that their offsets stay in registers. Up to 16 loads are in flight.
  constexpr int kColumns = kWords < 8 ? kWords : 8;
  constexpr int kAhead = kColumns < 4 ? 4 : 16 / kColumns;
  for (int pass = 0; pass < kWords; pass += kColumns) {
    const int32_t start = lane + pass * width;
    int32_t offset[kColumns];
#pragma unroll
    for (int w = 0; w < kColumns; ++w) offset[w] = start + w * width < columns ? column_map[start + w * width] : -1;
    for (int32_t row = level; row < rows; row += kAhead * height) {
      Src value[kAhead][kColumns];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (row + a * height < rows) {
          const Src* const from = src + row_map[row + a * height];
#pragma unroll
          for (int w = 0; w < kColumns; ++w)
            if (offset[w] >= 0) value[a][w] = from[offset[w]];
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (row + a * height < rows) {
          Dst* const to = dst + static_cast<int64_t>(row + a * height) * g.columns + start;
#pragma unroll
          for (int w = 0; w < kColumns; ++w)
            if (offset[w] >= 0) to[w * width] = convert<Dst>(value[a][w]);
        }
      }
    }
  }
}

// The last descriptor whose first block is not after this one.
template <int kCapacity>
__device__ __forceinline__ const Gather& gather_of_block(const Table<kCapacity>& table) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.gather[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return table.gather[low];
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 4) compact_kernel(const __grid_constant__ Table<kCapacity> table) {
  __shared__ int32_t column_map[kThreads * kVectorBytes];
  __shared__ int64_t row_map[kMaxRows];
  const Gather& g = gather_of_block(table);
  const int32_t local = static_cast<int32_t>(blockIdx.x) - g.first_block;
  switch (g.kind) {
    case 1: copy_rows<uint8_t, uint8_t>(g, local, column_map, row_map); break;
    case 2: copy_rows<uint16_t, uint16_t>(g, local, column_map, row_map); break;
    case 4: copy_rows<uint32_t, uint32_t>(g, local, column_map, row_map); break;
    case 8: copy_rows<uint64_t, uint64_t>(g, local, column_map, row_map); break;
    default: copy_rows<uint4, uint4>(g, local, column_map, row_map); break;
  }
}

// Casts are a kernel of their own: the twelve pairs of types would cost the plain gather registers.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 4) cast_kernel(const __grid_constant__ Table<kCapacity> table) {
  __shared__ int32_t column_map[kThreads * kVectorBytes / 2];
  __shared__ int64_t row_map[kMaxRows];
  const Gather& g = gather_of_block(table);
  const int32_t local = static_cast<int32_t>(blockIdx.x) - g.first_block;
  switch (g.kind) {
    case cast_kind(kFloat32, kFloat16): copy_rows<float, Half>(g, local, column_map, row_map); break;
    case cast_kind(kFloat32, kBFloat16): copy_rows<float, BFloat16>(g, local, column_map, row_map); break;
    case cast_kind(kFloat32, kFloat64): copy_rows<float, double>(g, local, column_map, row_map); break;
    case cast_kind(kFloat16, kFloat32): copy_rows<Half, float>(g, local, column_map, row_map); break;
    case cast_kind(kFloat16, kBFloat16): copy_rows<Half, BFloat16>(g, local, column_map, row_map); break;
    case cast_kind(kFloat16, kFloat64): copy_rows<Half, double>(g, local, column_map, row_map); break;
    case cast_kind(kBFloat16, kFloat32): copy_rows<BFloat16, float>(g, local, column_map, row_map); break;
    case cast_kind(kBFloat16, kFloat16): copy_rows<BFloat16, Half>(g, local, column_map, row_map); break;
    case cast_kind(kBFloat16, kFloat64): copy_rows<BFloat16, double>(g, local, column_map, row_map); break;
    case cast_kind(kFloat64, kFloat32): copy_rows<double, float>(g, local, column_map, row_map); break;
    case cast_kind(kFloat64, kFloat16): copy_rows<double, Half>(g, local, column_map, row_map); break;
    default: copy_rows<double, BFloat16>(g, local, column_map, row_map); break;
  }
}

template <int kCapacity>
Table<kCapacity> table_of(const std::vector<Gather>& jobs, size_t begin, size_t end) {
  Table<kCapacity> table;
  table.count = static_cast<int32_t>(end - begin);
  std::copy(jobs.begin() + begin, jobs.begin() + end, table.gather);
  return table;
}

template <int kCapacity>
void launch(const std::vector<Gather>& jobs, size_t begin, size_t end, int64_t blocks, cudaStream_t stream) {
  const Table<kCapacity> table = table_of<kCapacity>(jobs, begin, end);
  compact_kernel<kCapacity><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int kCapacity>
void launch_cast(const std::vector<Gather>& jobs, size_t begin, size_t end, int64_t blocks, cudaStream_t stream) {
  const Table<kCapacity> table = table_of<kCapacity>(jobs, begin, end);
  cast_kernel<kCapacity><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  return channels_last || (t.dim() == 1 ? fits(0) : fits(1));
}

// One C call; the dispatcher would cost more than the copy of a small tensor.
Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// Shape and place of one result.
struct Result {
  int64_t dim, sizes[8], strides[8];
  int64_t bytes, element_size;
  int32_t dtype;
  int64_t job;  // its descriptor, -1 when there is nothing to copy
};

constexpr int64_t kSmallBytes = 4 << 20;
constexpr int64_t kAlign = 512;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// An allocation takes the host microseconds, more than the copy of a small tensor. With `shared` the small results of one dtype are cut from one:
// they do not overlap and are no views of each other, and the memory is freed when the last of them is.
std::vector<Tensor> allocate(const std::vector<Result>& results, int32_t device, bool shared) {
  struct Block {
    int32_t dtype;
    int64_t tensors, bytes, used;
    std::optional<Tensor> memory;
  };
  std::vector<Block> blocks;
  const auto block_of = [&](const Result& r) -> Block& {
    for (Block& b : blocks)
      if (b.dtype == r.dtype) return b;
    return blocks.emplace_back(Block{r.dtype, 0, 0, 0, std::nullopt});
  };
  const auto small = [shared](const Result& r) { return shared && r.bytes > 0 && r.bytes <= kSmallBytes; };
  for (const Result& r : results) {
    if (!small(r)) continue;
    Block& b = block_of(r);
    ++b.tensors;
    b.bytes += aligned(r.bytes);
  }
  std::vector<Tensor> tensors;
  tensors.reserve(results.size());
  for (const Result& r : results) {
    if (!small(r) || block_of(r).tensors == 1) {
      tensors.push_back(empty_strided(r.dim, r.sizes, r.strides, r.dtype, device));
      continue;
    }
    Block& b = block_of(r);
    if (!b.memory) {
      const int64_t size = b.bytes / r.element_size, stride = 1;
      b.memory = empty_strided(1, &size, &stride, r.dtype, device);
    }
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(b.memory->get(), r.dim, r.sizes, r.strides, b.used / r.element_size, &handle));
    tensors.emplace_back(handle);
    b.used += aligned(r.bytes);
  }
  return tensors;
}

size_t table_capacity() {
  static const size_t capacity = [] {
    int driver = 0;
    STD_CUDA_CHECK(cudaDriverGetVersion(&driver));
    return static_cast<size_t>(driver >= 12010 && CUDART_VERSION >= 12010 ? kLarge : kSmall);
  }();
  return capacity;
}

std::vector<Tensor> gather(std::vector<Tensor>& tensors, std::vector<std::optional<Tensor>>& keep_out,
                           std::vector<std::optional<Tensor>>& keep_in, std::optional<ScalarType> dtype, bool shared) {
  const int wanted = dtype ? float_of(*dtype) : kNone;
  STD_TORCH_CHECK(!dtype || wanted != kNone, "dtype: must be float32, float64, float16 or bfloat16");
  int32_t wanted_code = 0;
  int64_t wanted_size = 0;
  if (dtype) {
    wanted_code = static_cast<int32_t>(*dtype);
    wanted_size = wanted == kFloat64 ? 8 : wanted == kFloat32 ? 4 : 2;
  }
  const size_t count = tensors.size();
  STD_TORCH_CHECK(keep_out.size() == count && keep_in.size() == count, "keep_out and keep_in: must have one entry per tensor, ",
                  count, "; they have ", keep_out.size(), " and ", keep_in.size());
  if (count == 0) return {};
  const int32_t device = tensors[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  std::vector<Tensor> alive;  // dense copies; freed in stream order, after the gather
  std::vector<Result> results(count);
  std::vector<Gather> jobs;
  jobs.reserve(count);
  const auto index_of = [&](std::optional<Tensor>& keep, int64_t limit, const char* name, size_t i, int64_t& length) -> const int64_t* {
    length = limit;
    if (!keep) return nullptr;
    STD_TORCH_CHECK(keep->dim() == 1 && keep->scalar_type() == ScalarType::Long, name, "[", i, "]: must be 1-D int64");
    STD_TORCH_CHECK(keep->is_cuda() && keep->get_device_index() == device, name, "[", i, "]: must be on cuda:", device, " like the tensors");
    length = keep->size(0);
    if (length > 1 && keep->stride(0) != 1) {
      alive.push_back(torch::stable::contiguous(*keep));
      return static_cast<const int64_t*>(alive.back().const_data_ptr());
    }
    return static_cast<const int64_t*>(keep->const_data_ptr());
  };

  for (size_t i = 0; i < count; ++i) {
    Tensor t = tensors[i];
    const int64_t dim = t.dim();
    STD_TORCH_CHECK(dim >= 1 && dim <= 8, "tensors[", i, "]: must have 1 to 8 dimensions, not ", dim);
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, "tensors[", i, "]: must be on cuda:", device, " like tensors[0]");
    STD_TORCH_CHECK(dim >= 2 || !keep_in[i], "keep_in[", i, "]: must be None for a 1-D tensor");
    bool channels_last = false;
    if (!rows_dense(t, false)) {
      channels_last = (dim == 4 || dim == 5) && (t.size(0) == 1 || t.stride(0) * t.size(0) == t.numel()) && rows_dense(t, true);
      if (!channels_last) {
        t = torch::stable::contiguous(t);
        alive.push_back(t);
      }
    }
    Result& result = results[i];
    int64_t* const sizes = result.sizes;
    int64_t* const strides = result.strides;
    for (int64_t d = 0; d < dim; ++d) sizes[d] = t.size(d);
    const int64_t src_rows = sizes[0];
    const int64_t channels = dim >= 2 ? sizes[1] : 1;
    const int64_t* const rows_kept = index_of(keep_out[i], src_rows, "keep_out", i, sizes[0]);
    const int64_t* const channels_kept = dim >= 2 ? index_of(keep_in[i], channels, "keep_in", i, sizes[1]) : nullptr;
    int64_t inner = 1;
    for (int64_t d = 2; d < dim; ++d) inner *= sizes[d];
    int64_t stride = 1;
    if (channels_last) strides[1] = 1, stride = std::max<int64_t>(sizes[1], 1);
    for (int64_t d = dim - 1; d >= (channels_last ? 2 : 0); --d) {
      strides[d] = stride;
      stride *= std::max<int64_t>(sizes[d], 1);
    }
    if (channels_last) strides[0] = stride;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &result.dtype));
    const int64_t size = static_cast<int64_t>(t.element_size());
    const int have = dtype ? float_of(t.scalar_type()) : kNone;
    const bool cast = have != kNone && have != wanted;
    if (cast) result.dtype = wanted_code;
    result.dim = dim;
    result.element_size = cast ? wanted_size : size;
    result.job = -1;
    const int64_t out_channels = dim >= 2 ? sizes[1] : 1;
    result.bytes = sizes[0] * out_channels * inner * result.element_size;
    if (result.bytes == 0) continue;
    result.job = static_cast<int64_t>(jobs.size());

    Gather g{};
    g.src = static_cast<const char*>(t.const_data_ptr());
    int64_t unit;  // bytes that stay together; the words that are copied may be as wide as it allows
    int64_t columns, row_stride;
    if (dim == 1 || (channels * inner == 1 && channels_kept == nullptr && t.stride(0) == 1)) {
      // A vector is one row, its entries the channels.
      g.keep_in = rows_kept;
      g.rows = g.src_rows = 1;
      g.inner = 1;
      columns = sizes[0];
      g.channels = static_cast<int32_t>(src_rows);
      g.out_channels = static_cast<int32_t>(columns);
      row_stride = src_rows;
      // The stride of a single entry means nothing: of a slice it may be anything.
      STD_TORCH_CHECK(src_rows <= std::numeric_limits<int32_t>::max() && (src_rows == 1 || t.stride(0) == 1), "tensors[", i,
                      "]: a vector must be dense");
      unit = rows_kept == nullptr ? columns * size : size;
    } else {
      g.keep_out = rows_kept;
      g.keep_in = channels_kept;
      g.rows = sizes[0];
      g.src_rows = src_rows;
      row_stride = t.stride(0);
      columns = out_channels * inner;
      g.channels = static_cast<int32_t>(channels);
      g.out_channels = static_cast<int32_t>(out_channels);
      g.inner = static_cast<int32_t>(channels_last ? 1 : inner);
      unit = channels_kept == nullptr ? columns * size : g.inner * size;
    }
    STD_TORCH_CHECK(channels * inner <= std::numeric_limits<int32_t>::max(), "tensors[", i, "]: rows are limited to 2^31 - 1 elements");
    int64_t word = size;
    const uint64_t common = static_cast<uint64_t>(unit) | static_cast<uint64_t>(row_stride * size) | reinterpret_cast<uintptr_t>(g.src);  // results start at multiples of 512 bytes
    while (!cast && word < kVectorBytes && common % (2 * word) == 0) word *= 2;
    STD_TORCH_CHECK(word == 1 || word == 2 || word == 4 || word == 8 || word == 16, "tensors[", i, "]: elements of ", size, " bytes");
    g.kind = static_cast<int16_t>(cast ? cast_kind(have, wanted) : word);
    g.inner = static_cast<int32_t>(std::max<int64_t>(1, g.inner * size / word));
    g.columns = static_cast<int32_t>(columns * size / word);
    g.row_stride = row_stride * size / word;
    const int64_t per_thread = kVectorBytes / (cast ? wanted_size : word);
    int32_t width = 1;
    while (width < kThreads && width * per_thread < g.columns) width *= 2;
    g.width = static_cast<int16_t>(width);
    g.bytes = static_cast<int16_t>(cast ? wanted_size : word);
    g.column_blocks = static_cast<int32_t>(ceil_div(g.columns, width * per_thread));
    jobs.push_back(g);
  }

  std::vector<Tensor> tensors_out = allocate(results, device, shared);
  for (size_t i = 0; i < count; ++i)
    if (results[i].job >= 0) jobs[results[i].job].dst = static_cast<char*>(tensors_out[i].mutable_data_ptr());

  // Casts after plain gathers, each in as few launches as their tables allow.
  const size_t plain = static_cast<size_t>(
      std::stable_partition(jobs.begin(), jobs.end(), [](const Gather& g) { return g.kind <= kVectorBytes; }) - jobs.begin());
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  for (size_t begin = 0; begin < jobs.size();) {
    const bool cast = begin >= plain;
    // Casts have one size of table, the one that every driver takes: twelve pairs of types compile long enough once.
    const size_t limit = std::min(cast ? jobs.size() : plain, begin + (cast ? static_cast<size_t>(kSmall) : table_capacity()));
    int64_t blocks = 0;
    size_t end = begin;
    for (; end < limit; ++end) {
      const int64_t more = jobs[end].column_blocks * ceil_div(jobs[end].rows, rows_per_block(jobs[end].width, jobs[end].bytes));
      if (blocks + more > kMaxBlocks) break;
      jobs[end].first_block = static_cast<int32_t>(blocks);
      blocks += more;
    }
    STD_TORCH_CHECK(end > begin, "tensors: one tensor needs more blocks than a launch has");
    const size_t used = end - begin;
    const auto queue = static_cast<cudaStream_t>(stream);
    if (cast) {
      launch_cast<kSmall>(jobs, begin, end, blocks, queue);
    } else if (used <= kSmall) {
      launch<kSmall>(jobs, begin, end, blocks, queue);
    } else if (used <= kMedium) {
      launch<kMedium>(jobs, begin, end, blocks, queue);
    } else {
      launch<kLarge>(jobs, begin, end, blocks, queue);
    }
    begin = end;
  }
  return tensors_out;
}

std::vector<Tensor> compact(std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> keep_out,
                            std::vector<std::optional<Tensor>> keep_in, std::optional<ScalarType> dtype) {
  return gather(tensors, keep_out, keep_in, dtype, false);
}

// The same for eager code: results may lie in one allocation, which an operation that takes part in compilation must not return.
std::vector<Tensor> compact_shared(std::vector<Tensor> tensors, std::vector<std::optional<Tensor>> keep_out,
                                   std::vector<std::optional<Tensor>> keep_in, std::optional<ScalarType> dtype) {
  return gather(tensors, keep_out, keep_in, dtype, true);
}

}  // namespace
}  // namespace wanda_fast

STABLE_TORCH_LIBRARY_IMPL(wanda_fast, CUDA, m) {
  m.impl("compact", TORCH_BOX(&wanda_fast::compact));
  m.impl("compact_shared", TORCH_BOX(&wanda_fast::compact_shared));
}
