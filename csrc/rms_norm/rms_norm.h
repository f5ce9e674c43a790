// RMS norm over the last dim (Zhang and Sennrich 2019), alone or of a sum:
//
//   x = input, or input + residual rounded to their dtype (what the next layer sees is what is normalised)
//   y = x r w,    r = 1 / sqrt(mean of x^2 + epsilon)
//
// Where the sum of squares overflows fp32, r is NaN: by a 0 the output would be 0, and nobody would see that training
// diverged. With x^ = x r and g = dy w:
//
//   dx = r (g - x^ mean(g x^)) (+ the gradient of the sum),    dw = sum of dy x^
//
// The r of each row is kept in fp32 for the gradient. Arithmetic is fp32, rounded once at the end.
//
// Instead of x, y may be kept: x^ = y / w, as exact as y, and NaN where w is 0.

#pragma once

#include <cmath>

#include "base/launch.h"

namespace megatron_lite {

struct RmsNormForward {
  Dtype dtype;
  const void* input;     // [rows, length]
  const void* residual;  // [rows, length], or null
  const void* weight;    // [length]
  void* sum;             // [rows, length], or null without a residual
  void* output;          // [rows, length]
  float* inverse;        // [rows], r
  int64_t rows, length;
  float epsilon;
};

struct RmsNormBackward {
  Dtype dtype;
  const void* gradient;      // [rows, length], of the output
  const void* sum_gradient;  // [rows, length], added to the input's; or null
  const void* kept;          // [rows, length]: x above, or y
  bool from_output;          // y is kept
  const void* weight;        // [length]
  const float* inverse;      // [rows]
  void* input_gradient;      // [rows, length]
  void* weight_gradient;     // [length]
  float* weight_partials;    // [parts, length]
  int64_t rows, length, parts;
};

MEGATRON_LITE_LAUNCHERS(RmsNormForward)
MEGATRON_LITE_LAUNCHERS(RmsNormBackward)

// `squares` is the row's sum of x^2.
MEGATRON_LITE_INLINE float rms_norm_mean_square(float squares, int64_t length) {
  return squares < INFINITY ? squares / length : NAN;
}

// Of one value, or of many at once.
template <class Value>
MEGATRON_LITE_INLINE Value rms_norm_output(Value x, float inverse, Value weight) { return x * inverse * weight; }

// `mean_g_normal` is the row's mean of g x^, where g = dy w.
template <class Value>
MEGATRON_LITE_INLINE Value rms_norm_gradient(Value g, Value normal, float inverse, float mean_g_normal) {
  return inverse * (g - normal * mean_g_normal);
}

}  // namespace megatron_lite
