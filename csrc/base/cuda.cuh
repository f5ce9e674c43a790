// What CUDA kernels share: 16-byte packs of elements, a row spread over threads, sums in a fixed order.
//
// A row belongs to the blockDim.x threads of one threadIdx.y. Thread x takes packs x, x + blockDim.x, ... of it. Where
// the row is short enough for registers they hold these, up to kPacks (> 0); each pass over a longer row (kPacks =
// kLooped) reads it again. In a row that is not 16-byte aligned (kPacks = 0) a pack is one element, read each time.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "base/launch.h"

namespace megatron_lite::cuda {

__device__ __forceinline__ float load(float element) { return element; }
__device__ __forceinline__ float load(__nv_bfloat16 element) { return __bfloat162float(element); }
__device__ __forceinline__ float load(__half element) { return __half2float(element); }
__device__ __forceinline__ void store(float& element, float value) { element = value; }
__device__ __forceinline__ void store(__nv_bfloat16& element, float value) { element = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half& element, float value) { element = __float2half_rn(value); }

constexpr int kLooped = -1;

template <class Element, int kPacks>
constexpr int kWidth = kPacks ? 16 / static_cast<int>(sizeof(Element)) : 1;

template <class Element, int kCount>
struct alignas(sizeof(Element) * kCount) Pack {
  Element elements[kCount];

  __device__ __forceinline__ float operator[](int index) const { return load(elements[index]); }
  __device__ __forceinline__ void set(int index, float value) { store(elements[index], value); }
};

template <class Element, int kPacks>
using PackOf = Pack<Element, kWidth<Element, kPacks>>;

// Reads a pack that nobody else needs, past the caches that hold what all rows share.
template <class Element, int kCount>
__device__ __forceinline__ Pack<Element, kCount> read_once(const Element* from) {
  Pack<Element, kCount> pack;
  if constexpr (sizeof pack == 16) {
    *reinterpret_cast<uint4*>(&pack) = __ldcs(reinterpret_cast<const uint4*>(from));
  } else {
    pack = *reinterpret_cast<const Pack<Element, kCount>*>(from);
  }
  return pack;
}

template <class Element, int kCount>
__device__ __forceinline__ Pack<Element, kCount> read(const Element* from) {
  return *reinterpret_cast<const Pack<Element, kCount>*>(from);
}

template <class Element, int kCount>
__device__ __forceinline__ void write(Element* to, const Pack<Element, kCount>& pack) {
  *reinterpret_cast<Pack<Element, kCount>*>(to) = pack;
}

// Calls body(register, index) for this thread's packs of a row: `register` numbers them, `index` is the first
// element's.
template <class Element, int kPacks, class Body>
__device__ __forceinline__ void each_pack(int64_t length, const Body& body) {
  if constexpr (kPacks > 0) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int64_t index = static_cast<int64_t>(pack * blockDim.x + threadIdx.x) * kWidth<Element, kPacks>;
      if (index < length) body(pack, index);
    }
  } else {
    constexpr int kCount = kWidth<Element, kPacks>;
#pragma unroll 2
    for (int64_t index = threadIdx.x * kCount; index < length; index += blockDim.x * kCount) body(0, index);
  }
}

// This thread's packs of a row: held in registers, or read again from the nearest cache each time.
template <class Element, int kPacks, bool kHeld = (kPacks > 0)>
class Row {
 public:
  using Values = PackOf<Element, kPacks>;

  __device__ __forceinline__ Row(const Element* row, int64_t length) : row_(row) {
    if constexpr (kHeld) {
      each_pack<Element, kPacks>(length, [&](int pack, int64_t index) {
        held_[pack] = read_once<Element, kWidth<Element, kPacks>>(row + index);
      });
    }
  }

  // Becomes row + residual, rounded, and writes that to `sum` if `mine`.
  __device__ __forceinline__ void add(const Element* residual, Element* sum, int64_t length, bool mine) {
    each_pack<Element, kPacks>(length, [&](int pack, int64_t index) {
      Values total = (*this)(pack, index);
      const auto added = read_once<Element, kWidth<Element, kPacks>>(residual + index);
#pragma unroll
      for (int i = 0; i < kWidth<Element, kPacks>; ++i) total.set(i, total[i] + added[i]);
      if constexpr (kHeld) held_[pack] = total;
      if (mine) write(sum + index, total);
    });
    row_ = sum;
  }

  __device__ __forceinline__ Values operator()(int pack, int64_t index) const {
    if constexpr (kHeld) return held_[pack];
    else return read<Element, kWidth<Element, kPacks>>(row_ + index);
  }

 private:
  const Element* row_;
  Values held_[kHeld ? kPacks : 1];
};

// Sums of kCount values over the threads of a row, the same in all of them. All threads of the block must call
// it together where a row has more than one warp.
template <int kCount, class Value>
__device__ __forceinline__ void row_sums(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int step = 16; step; step /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
  if (blockDim.x == 32) return;
  __shared__ Value of_warps[kCount][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (lane == 0) of_warps[i][first + warp] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = lane < warps ? of_warps[i][first + lane] : 0;
#pragma unroll
    for (int step = 16; step; step /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
  }
}

// The largest of one value of each thread of a row, the same in all of them; called like row_sums.
__device__ __forceinline__ float row_largest(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (blockDim.x == 32) return value;
  __shared__ float of_warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  __syncthreads();
  if (lane == 0) of_warps[first + warp] = value;
  __syncthreads();
  value = lane < warps ? of_warps[first + lane] : -INFINITY;
#pragma unroll
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// How rows are spread: `packs` of a thread (kPacks above), `block.x` threads a row, `block.y` rows a block.
struct RowPlan {
  int packs;
  dim3 block;
};

// More than four packs a thread spill out of registers.
constexpr int kMostPacks = 4;

// At most `most_threads` a row; rows of up to a warp's worth share a block of `least_threads`.
inline RowPlan plan_rows(int64_t length, int element_bytes, bool aligned, int most_threads, int least_threads) {
  const int width = 16 / element_bytes;
  const int64_t packs = length / width;
  if (!aligned || length % width) return {0, dim3(512, 1)};
  if (packs > kMostPacks * most_threads) return {kLooped, dim3(512, 1)};
  int each = 1;
  while (each < kMostPacks && packs > each * 32) each *= 2;
  const int threads = packs ? static_cast<int>((packs + each * 32 - 1) / (each * 32)) * 32 : 32;
  return {each, dim3(threads, threads < least_threads ? least_threads / threads : 1)};
}

// How rows are spread where nothing is summed along them: a long one is cut into strips of columns, blockIdx.y's
// each, short enough for registers.
struct StripPlan {
  int64_t strip;  // columns of a strip
  unsigned strips;
  RowPlan rows;
};

inline StripPlan plan_strips(int64_t length, int element_bytes, bool aligned, int most_threads, int least_threads) {
  const int width = 16 / element_bytes, most = kMostPacks * most_threads;
  const int64_t packs = length / width, strips = (packs + most - 1) / most;
  // A grid is at most 65,535 blocks high; a row longer than that many strips is looped over.
  const bool cut = aligned && length % width == 0 && strips > 1 && strips <= 65535;
  const int64_t strip = cut ? (packs + strips - 1) / strips * width : length;
  return {strip, cut ? static_cast<unsigned>(strips) : 1,
          plan_rows(strip, element_bytes, aligned, most_threads, least_threads)};
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return true;
}

inline unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < INT32_MAX ? blocks : INT32_MAX);
}

inline cudaStream_t stream_of(const Context& context) { return static_cast<cudaStream_t>(context.stream); }

// Calls run(Number<packs>()).
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

template <class Run>
void with_packs(int packs, const Run& run) {
  switch (packs) {
    case 1: return run(Number<1>());
    case 2: return run(Number<2>());
    case 4: return run(Number<4>());
    case kLooped: return run(Number<kLooped>());
    default: return run(Number<0>());
  }
}

// Calls run(Element()) with the type that a dtype code stands for; a launch that failed is the status.
template <class Run>
Status with_element(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32: run(float()); break;
    case Dtype::bfloat16: run(__nv_bfloat16()); break;
    case Dtype::float16: run(__half()); break;
    default: return kUnknownDtype;
  }
  return static_cast<Status>(cudaGetLastError());
}

// A row's worth of sums over the rows of a part, each thread its own columns: in registers, or in the part's line.
template <class Element, int kPacks>
struct ColumnSums {
  static constexpr int kCount = kWidth<Element, kPacks>;

  float* line;
  float sums[kPacks > 0 ? kPacks : 1][kCount] = {};

  __device__ __forceinline__ ColumnSums(float* of_part, int64_t length) : line(of_part) {
    if constexpr (kPacks <= 0)
      each_pack<Element, kPacks>(length, [&](int, int64_t index) { write(line + index, Pack<float, kCount>{}); });
  }

  __device__ __forceinline__ void add(int pack, int64_t index, const float (&values)[kCount]) {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[pack][i] += values[i];
    } else {
      auto of_pack = read<float, kCount>(line + index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) of_pack.elements[i] += values[i];
      write(line + index, of_pack);
    }
  }

  // Writes the line: the sums of the block's rows threadIdx.y = 0, 1, ... added in this order.
  __device__ __forceinline__ void finish(int64_t length) {
    if constexpr (kPacks > 0) {
      __shared__ float of_rows[1024];
      each_element([&](int pack, int element) {
        float sum = sums[pack][element];
        if (blockDim.y > 1) {
          of_rows[threadIdx.y * blockDim.x + threadIdx.x] = sum;
          __syncthreads();
          sum = 0;
          if (threadIdx.y == 0)
            for (int y = 0; y < blockDim.y; ++y) sum += of_rows[y * blockDim.x + threadIdx.x];
          __syncthreads();
        }
        const int64_t index = static_cast<int64_t>(pack * blockDim.x + threadIdx.x) * kCount + element;
        if (threadIdx.y == 0 && index < length) line[index] = sum;
      });
    }
  }

 private:
  template <class Body>
  __device__ __forceinline__ void each_element(const Body& body) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack)
#pragma unroll
      for (int element = 0; element < kCount; ++element) body(pack, element);
  }
};

// Adds the lines of a [parts, length] buffer and rounds once: 32 threads a column take every 32nd line in order,
// and their sums are added in order.
template <class Element>
__global__ void __launch_bounds__(1024) sum_parts_kernel(const float* partials, int64_t parts, int64_t length,
                                                         Element* result) {
  __shared__ float sums[32][33];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0;
  if (column < length)
    for (int64_t part = threadIdx.y; part < parts; part += 32) sum += partials[part * length + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  // Each warp takes a column now, and the same tree adds its 32 sums in every run.
  sum = sums[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && mine < length) store(result[mine], sum);
}

template <class Element>
void sum_parts(const Context& context, const float* partials, int64_t parts, int64_t length, void* result) {
  const dim3 block(32, 32);
  sum_parts_kernel<<<grid_of((length + 31) / 32), block, 0, stream_of(context)>>>(partials, parts, length,
                                                                                 static_cast<Element*>(result));
}

}  // namespace megatron_lite::cuda
