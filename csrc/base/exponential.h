// exp(x) for x <= 0, all that a softmax or a sigmoid needs, in plain arithmetic that compilers turn into vectors.
//
//   n = round(x / ln 2),  r = x - n ln 2,  exp(x) = 2^n (1 + r + r^2 q(r))
//
// q has degree 4, fitted to a relative error of 3.3e-9 on |r| <= ln 2 / 2; rounding adds about a unit of the last
// digit. Below -87, where it would soon be denormal and slow, it is 0; a NaN stays one. ln 2 is
// taken in two parts, the first short enough that its product with n is exact. Adding 1.5 * 2^23 rounds to a
// whole number, which then stands in the low bits of the sum.
//
// A GPU has an instruction for 2^t, off by at most two units of the last digit. Alone it would magnify the rounding of
// t = x / ln 2 to 30 units at -87; so what t lacks, r = x - t ln 2, is made good: exp(x) = 2^t (1 + r), within three.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/launch.h"

namespace megatron_lite {

MEGATRON_LITE_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f, kLn2Rest = -1.90465421e-9f;
  const float t = x * kLog2E, power = exp2f(t);
  const float r = fmaf(-t, kLn2Rest, fmaf(-t, kLn2, x));
  return x < -87.0f ? 0.0f : fmaf(power, r, power);
#else
  constexpr float kRound = 12582912.0f, kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  const float q = 0.49999994f + r * (0.16666515f + r * (0.041668456f + r * (0.008369417f + r * 0.0013813095f)));
  const float mantissa = 1.0f + (r + r * r * q);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : mantissa * power;
#endif
}

// 1 / (1 + e^-x), by the exponential of -|x|: it cannot overflow, and small results keep their digits.
MEGATRON_LITE_INLINE float sigmoid(float x) {
  const float e = exponential(-fabsf(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace megatron_lite
