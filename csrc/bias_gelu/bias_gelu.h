// GELU (Hendrycks and Gimpel 2016) of z = input + bias, not rounded in between:
//
//   exact:  y = z P(z), where P is the normal distribution function;    dy/dz = P(z) + z p(z)
//   tanh:   y = z s(u), u = 2 sqrt(2/pi) (z + 0.044715 z^3);            dy/dz = s + z s (1 - s) du/dz
//
// where p(z) = exp(-z^2 / 2) / sqrt(2 pi) and s(u) = 1 / (1 + e^-u), since (1 + tanh(u / 2)) / 2 = s(u). The
// bias's gradient is the sum of dz over rows. Arithmetic is fp32, rounded once at the end.
//
// P(-|z|) is exp(-z^2 / 2) times a polynomial in t = 1 / (1 + |z| / 4), a minimax fit of degree 10 without a
// constant term (relative error 9e-9 before rounding, for |z| up to 14.5 where it is below what fp32 holds). So
// one exponential serves P and p, and values far to the left keep digits that 1 + erf(z) loses.

#pragma once

#include <cmath>

#include "base/exponential.h"
#include "base/launch.h"

namespace megatron_lite {

struct BiasGeluForward {
  Dtype dtype;
  const void* input;  // [rows, length]
  const void* bias;   // [length], or null
  void* output;       // [rows, length]
  int64_t rows, length;
  bool tanh;
};

struct BiasGeluBackward {
  Dtype dtype;
  const void* gradient;  // [rows, length], of the output
  const void* input;     // [rows, length]
  const void* bias;      // [length], or null
  void* input_gradient;  // [rows, length]
  void* bias_gradient;   // [length], or null without a bias
  float* bias_partials;  // [parts, length], or null without a bias
  int64_t rows, length, parts;
  bool tanh;
};

MEGATRON_LITE_LAUNCHERS(BiasGeluForward)
MEGATRON_LITE_LAUNCHERS(BiasGeluBackward)

constexpr float kGeluSlope = 1.59576912f, kGeluCubic = 0.044715f;

MEGATRON_LITE_INLINE float gelu_tanh_output(float z) {
  return z * sigmoid(kGeluSlope * z * (1.0f + kGeluCubic * z * z));
}

// Beyond 30 the slope is 0 or 1; squares of larger numbers would only overflow.
MEGATRON_LITE_INLINE float gelu_bounded(float z) {
  z = z < -30.0f ? -30.0f : z;
  return z > 30.0f ? 30.0f : z;
}

// s (1 - s) by e = exp(-|u|): the difference itself would lose the digits that z^3 then magnifies.
MEGATRON_LITE_INLINE float gelu_tanh_slope(float z) {
  z = gelu_bounded(z);
  const float square = z * z, u = kGeluSlope * z * (1.0f + kGeluCubic * square);
  const float e = exponential(-fabsf(u)), larger = 1.0f / (1.0f + e), smaller = e * larger;
  return (u < 0.0f ? smaller : larger) + z * smaller * larger * kGeluSlope * (1.0f + 3.0f * kGeluCubic * square);
}

// P(z), given exp(-z^2 / 2).
MEGATRON_LITE_INLINE float normal_distribution(float z, float bell) {
  const float t = 1.0f / (1.0f + 0.25f * fabsf(z));
  float tail = 0.016892523f;
  tail = tail * t - 0.064537808f;
  tail = tail * t + 0.055880979f;
  tail = tail * t + 0.022608897f;
  tail = tail * t + 0.017736377f;
  tail = tail * t + 0.083850339f;
  tail = tail * t + 0.073013112f;
  tail = tail * t + 0.095287792f;
  tail = tail * t + 0.099521466f;
  tail = tail * t + 0.099746332f;
  tail *= t * bell;
  return z < 0.0f ? tail : 1.0f - tail;
}

MEGATRON_LITE_INLINE float gelu_exact_output(float z) {
  return z * normal_distribution(z, exponential(-0.5f * z * z));
}

MEGATRON_LITE_INLINE float gelu_exact_slope(float z) {
  z = gelu_bounded(z);
  const float bell = exponential(-0.5f * z * z);
  return normal_distribution(z, bell) + z * 0.398942280f * bell;
}

}  // namespace megatron_lite
