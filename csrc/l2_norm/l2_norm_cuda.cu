#include "l2_norm/l2_norm.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

// As many tensors as the arguments of one launch (4 KiB) hold.
struct Table {
  static constexpr int kMost = 120;
  L2NormTensor tensors[kMost];
  int count;
};

constexpr int kThreads = 512;

// The squares of a range, each thread's in turn, in packs where the range is 16-byte aligned.
template <class Element>
__device__ float squares(const Element* data, int64_t count) {
  constexpr int kCount = kWidth<Element, 1>;
  float sum = 0;
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    done = count / kCount * kCount;
#pragma unroll 4
    for (int64_t index = threadIdx.x * kCount; index < done; index += kThreads * kCount) {
      const auto values = read_once<Element, kCount>(data + index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += values[i] * values[i];
    }
  }
  for (int64_t index = done + threadIdx.x; index < count; index += kThreads) sum += load(data[index]) * load(data[index]);
  return sum;
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(const Table table, double* partials) {
  const int64_t chunk = table.tensors[0].first_chunk + blockIdx.x;
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.tensors[middle].first_chunk <= chunk) low = middle;
    else high = middle - 1;
  }
  const L2NormTensor& tensor = table.tensors[low];
  const int64_t begin = (chunk - tensor.first_chunk) * kL2NormChunk, rest = tensor.length - begin;
  const int64_t count = rest < kL2NormChunk ? rest : kL2NormChunk;
  float sum[1];
  switch (tensor.dtype) {
    case Dtype::float32: sum[0] = squares(static_cast<const float*>(tensor.data) + begin, count); break;
    case Dtype::bfloat16: sum[0] = squares(static_cast<const __nv_bfloat16*>(tensor.data) + begin, count); break;
    case Dtype::float16: sum[0] = squares(static_cast<const __half*>(tensor.data) + begin, count); break;
  }
  row_sums(sum);
  if (threadIdx.x == 0) partials[chunk] = sum[0];
}

__global__ void __launch_bounds__(kThreads) total_kernel(const double* partials, int64_t chunks, float* norm) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) sum += partials[chunk];
  sums[threadIdx.x] = sum;
  for (int width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sums[0]));
}

}  // namespace

Status launch(const Context& context, const L2Norm& a) {
  Table table{};
  for (int64_t tensor = 0; tensor < a.count; ++tensor) {
    if (a.tensors[tensor].length) table.tensors[table.count++] = a.tensors[tensor];
    if (table.count < Table::kMost && tensor + 1 < a.count) continue;
    if (table.count == 0) break;
    const L2NormTensor& last = table.tensors[table.count - 1];
    const int64_t chunks = last.first_chunk + l2_norm_chunks(last.length) - table.tensors[0].first_chunk;
    chunk_kernel<<<grid_of(chunks), kThreads, 0, stream_of(context)>>>(table, a.partials);
    table.count = 0;
  }
  total_kernel<<<1, kThreads, 0, stream_of(context)>>>(a.partials, a.chunks, a.norm);
  return static_cast<Status>(cudaGetLastError());
}

}  // namespace megatron_lite::cuda
