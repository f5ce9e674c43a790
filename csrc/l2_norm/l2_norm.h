// The L2 norm of a list of tensors as if they were one vector: sqrt(sum of x^2), for clipping gradients.
//
// Each tensor is cut into chunks of 65,536 elements, a chunk into blocks of 2,048 (on a GPU: packs of 16 bytes). A
// block's squares are summed in fp32, a few in each of many lanes, the sums of blocks and of chunks in fp64 and in
// order: so the result does not depend on the number of threads, and its error does not grow with the length. A block
// whose squares sum to more than 3.4e38 makes it infinite: one element of 1.8e19, or 2,048 of 4.1e17. torch's norm of
// fp32 overflows likewise.

#pragma once

#include "base/launch.h"

namespace megatron_lite {

constexpr int64_t kL2NormChunk = 65536;
constexpr int64_t kL2NormBlock = 2048;

struct L2NormTensor {
  Dtype dtype;
  const void* data;
  int64_t length;
  int64_t first_chunk;  // the number of chunks of all tensors before this one
};

struct L2Norm {
  const L2NormTensor* tensors;  // [count], in the caller's memory
  int64_t count;
  int64_t chunks;    // of all tensors
  double* partials;  // [chunks]
  float* norm;       // [1]
};

MEGATRON_LITE_LAUNCHERS(L2Norm)

MEGATRON_LITE_INLINE int64_t l2_norm_chunks(int64_t length) { return (length + kL2NormChunk - 1) / kL2NormChunk; }

}  // namespace megatron_lite
