// A block of 256 in the registers of one warp: element lane + 32 i is value i of a lane.

#pragma once

#include "base/cuda.cuh"
#include "quantize_blockwise/quantize_blockwise.h"

namespace megatron_lite::cuda {

constexpr int kLaneValues = kQuantizeBlock / 32;
constexpr int kWarps = 8;

// Calls body(block, this lane's first element) once for each block of this warp.
template <class Body>
__device__ __forceinline__ void each_block(int64_t length, const Body& body) {
  const int64_t blocks = quantize_blocks(length), stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; block < blocks; block += stride)
    body(block, block * kQuantizeBlock + threadIdx.x);
}

inline unsigned block_grid(int64_t length) { return grid_of((quantize_blocks(length) + kWarps - 1) / kWarps); }

// The largest magnitude of a warp's values. As bits a NaN is above infinity, and infinity above all numbers.
__device__ __forceinline__ float largest_magnitude(const float (&values)[kLaneValues]) {
  unsigned absmax = 0;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) absmax = max(absmax, __float_as_uint(values[i]) & 0x7fffffffu);
  return __uint_as_float(__reduce_max_sync(0xffffffffu, absmax));
}

template <bool kSigned>
__device__ __forceinline__ uint8_t code_of(float value, float absmax) {
  if constexpr (kSigned) return static_cast<uint8_t>(quantize_signed(value / absmax, kSignedSteps));
  else return static_cast<uint8_t>(quantize_unsigned(value / absmax, kUnsignedSteps));
}

template <bool kSigned>
__device__ __forceinline__ float value_of(uint8_t code, float absmax) {
  return (kSigned ? kSignedMap : kUnsignedMap)[code] * absmax;
}

}  // namespace megatron_lite::cuda
