// Work on a list of tensors in few launches: tables of tensors travel in a launch's arguments, each tensor is cut into
// chunks, and every block takes one chunk.

#pragma once

#include "base/cuda.cuh"

namespace megatron_lite::cuda {

// As many tensors as the arguments of one launch hold: 4 KiB on every card and driver, less 128 bytes for what a kernel
// takes besides.
template <class OfTensor>
struct Table {
  static constexpr int kMost = (4096 - 128) / (sizeof(OfTensor) + sizeof(int));

  OfTensor tensors[kMost];
  int first_chunk[kMost];  // the number of chunks of all tensors before this one
  int count;

  // This block's tensor, and which chunk of it.
  struct Mine {
    const OfTensor& tensor;
    int64_t chunk;
  };

  __device__ __forceinline__ Mine mine() const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= static_cast<int>(blockIdx.x)) low = middle;
      else high = middle - 1;
    }
    return {tensors[low], static_cast<int>(blockIdx.x) - first_chunk[low]};
  }
};

// Calls run(table, chunks) for as few tables as hold all tensors that are `wanted`.
template <class OfTensor, class Wanted, class Run>
void for_tables(const OfTensor* tensors, int64_t count, int64_t chunk_length, const Wanted& wanted, const Run& run) {
  Table<OfTensor> table{};
  int64_t chunks = 0;
  for (const OfTensor* tensor = tensors; tensor < tensors + count; ++tensor) {
    if (tensor->length == 0 || !wanted(*tensor)) continue;
    if (table.count == Table<OfTensor>::kMost) {
      run(table, chunks);
      table.count = 0;
      chunks = 0;
    }
    table.first_chunk[table.count] = static_cast<int>(chunks);
    table.tensors[table.count++] = *tensor;
    chunks += (tensor->length + chunk_length - 1) / chunk_length;
  }
  if (table.count) run(table, chunks);
}

}  // namespace megatron_lite::cuda
