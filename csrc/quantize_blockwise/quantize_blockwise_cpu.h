// Loops over a block's codes, for every CPU kernel that keeps 8-bit state.

#pragma once

#include "base/cpu.h"
#include "quantize_blockwise/quantize_blockwise.h"

namespace megatron_lite::cpu {
namespace {

inline int64_t block_length(int64_t length, int64_t block) {
  const int64_t rest = length - block * kQuantizeBlock;
  return rest < kQuantizeBlock ? rest : kQuantizeBlock;
}

// The largest magnitude. As bits a NaN is above infinity, and infinity above all numbers.
inline float largest_magnitude(const float* values, int64_t count) {
  int32_t absmax = 0;
#pragma omp simd reduction(max : absmax)
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(bits_of(values[i]) & 0x7fffffff);
    absmax = absmax > bits ? absmax : bits;
  }
  return float_of(static_cast<uint32_t>(absmax));
}

inline void quantize(bool is_signed, const float* values, float absmax, uint8_t* codes, int64_t count) {
  if (is_signed) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      codes[i] = static_cast<uint8_t>(quantize_signed(values[i], absmax, kSignedSteps));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      codes[i] = static_cast<uint8_t>(quantize_unsigned(values[i], absmax, kUnsignedSteps));
  }
}

inline void dequantize(bool is_signed, const uint8_t* codes, float absmax, float* values, int64_t count) {
  const float* map = is_signed ? kSignedMap : kUnsignedMap;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = map[codes[i]] * absmax;
}

}  // namespace
}  // namespace megatron_lite::cpu
