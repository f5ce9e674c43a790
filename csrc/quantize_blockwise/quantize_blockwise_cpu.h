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

// Values divided by what a block has in common, rounded as a division rounds them.
//
// A division takes as long as all the rest of a code. Where multiplication and addition fuse, it is replaced by the
// product with the divisor's reciprocal: kept in two parts, that gives a quotient within a unit of its last digit, and
// then one step of correction rounds as division does (Markstein 1990). It asks that nothing but negligible quotients
// leaves the normal range; for other divisors a division it is.
template <class Body>
inline __attribute__((always_inline)) void with_quotient(float divisor, const Body& body) {
#if defined(__FMA__)
  if (divisor > 0x1p-60f && divisor < 0x1p60f) {
    const float reciprocal = 1 / divisor;
    const float rest = __builtin_fmaf(-reciprocal, divisor, 1) * reciprocal;
    return body([=](float value) {
      const float quotient = __builtin_fmaf(value, reciprocal, value * rest);
      return __builtin_fmaf(__builtin_fmaf(-quotient, divisor, value), reciprocal, quotient);
    });
  }
#endif
  body([=](float value) { return value / divisor; });
}

// Codes are whole numbers of 32 bits in between: a loop over bytes and numbers alike would be cut by the bytes, and
// its table look-ups taken one by one.
inline void quantize(bool is_signed, const float* values, float absmax, uint8_t* codes, int64_t count) {
  alignas(64) int32_t wide[kQuantizeBlock];
  with_quotient(absmax, [&](const auto& quotient) {
    if (is_signed) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) wide[i] = quantize_signed(quotient(values[i]), kSignedSteps);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) wide[i] = quantize_unsigned(quotient(values[i]), kUnsignedSteps);
    }
  });
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
}

inline void dequantize(bool is_signed, const uint8_t* codes, float absmax, float* values, int64_t count) {
  alignas(64) int32_t wide[kQuantizeBlock];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) wide[i] = codes[i];
  const float* map = is_signed ? kSignedMap : kUnsignedMap;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = map[wide[i]] * absmax;
}

}  // namespace
}  // namespace megatron_lite::cpu
