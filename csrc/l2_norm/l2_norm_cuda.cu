#include "l2_norm/l2_norm.h"

#include "base/table.cuh"

namespace megatron_lite::cuda {
namespace {

constexpr int kThreads = 512;

// The squares of a range, each thread's in turn, in packs where the range is 16-byte aligned: in fp32 within a pack.
template <class Element>
__device__ double squares(const Element* data, int64_t count) {
  constexpr int kCount = kWidth<Element, 1>;
  double sum = 0;
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    done = count / kCount * kCount;
#pragma unroll 4
    for (int64_t index = threadIdx.x * kCount; index < done; index += kThreads * kCount) {
      const auto values = read_once<Element, kCount>(data + index);
      float of_pack = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) of_pack += values[i] * values[i];
      sum += of_pack;
    }
  }
  for (int64_t index = done + threadIdx.x; index < count; index += kThreads) {
    const float value = load(data[index]);
    sum += value * value;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(const Table<L2NormTensor> table, double* partials) {
  const auto mine = table.mine();
  const L2NormTensor& tensor = mine.tensor;
  const int64_t begin = mine.chunk * kL2NormChunk, rest = tensor.length - begin;
  const int64_t count = rest < kL2NormChunk ? rest : kL2NormChunk;
  double sum[1];
  switch (tensor.dtype) {
    case Dtype::float32: sum[0] = squares(static_cast<const float*>(tensor.data) + begin, count); break;
    case Dtype::bfloat16: sum[0] = squares(static_cast<const __nv_bfloat16*>(tensor.data) + begin, count); break;
    case Dtype::float16: sum[0] = squares(static_cast<const __half*>(tensor.data) + begin, count); break;
  }
  row_sums(sum);
  if (threadIdx.x == 0) partials[tensor.first_chunk + mine.chunk] = sum[0];
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
  const auto all = [](const L2NormTensor&) { return true; };
  for_tables(a.tensors, a.count, kL2NormChunk, all, [&](const Table<L2NormTensor>& table, int64_t chunks) {
    chunk_kernel<<<grid_of(chunks), kThreads, 0, stream_of(context)>>>(table, a.partials);
  });
  total_kernel<<<1, kThreads, 0, stream_of(context)>>>(a.partials, a.chunks, a.norm);
  return static_cast<Status>(cudaGetLastError());
}

}  // namespace megatron_lite::cuda
