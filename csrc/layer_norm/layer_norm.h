// Layer norm over the last dim (Ba et al. 2016), alone or of a sum:
//
//   x = input, or input + residual rounded to their dtype (what the next layer sees is what is normalised)
//   y = (x - mean) r w + b,    r = 1 / sqrt(variance + epsilon),    variance = mean of (x - mean)^2
//
// The variance is taken in a second pass over the row, which is in cache by then: the mean of squares less the
// square of the mean loses every digit where the mean is large. Where the sum of squares overflows fp32, r is
// NaN: by a 0 the output would be b, and nobody would see that training diverged.
// With x^ = (x - mean) r and g = dy w:
//
//   dx = r (g - mean(g) - x^ mean(g x^)) (+ the gradient of the sum),    dw = sum of dy x^,    db = sum of dy
//
// The mean and r of each row are kept in fp32 for the gradient. Arithmetic is fp32, rounded once at the end.
//
// Instead of x, y may be kept: x^ = (y - b) / w, with an error of half a digit of y over w, and NaN where w is 0.

#pragma once

#include <cmath>

#include "base/launch.h"

namespace megatron_lite {

struct LayerNormForward {
  Dtype dtype;
  const void* input;       // [rows, length]
  const void* residual;    // [rows, length], or null
  const void* weight;      // [length]
  const void* bias;        // [length]
  void* sum;               // [rows, length], or null without a residual
  void* output;            // [rows, length]
  float* mean;             // [rows]
  float* inverse;          // [rows], r
  int64_t rows, length;
  float epsilon;
};

struct LayerNormBackward {
  Dtype dtype;
  const void* gradient;      // [rows, length], of the output
  const void* sum_gradient;  // [rows, length], added to the input's; or null
  const void* kept;          // [rows, length]: x above, or y with a bias
  const void* weight;        // [length]
  const void* bias;          // [length]; null where x is kept
  const float* mean;         // [rows]
  const float* inverse;      // [rows]
  void* input_gradient;      // [rows, length]
  void* weight_gradient;     // [length]
  void* bias_gradient;       // [length]
  float* weight_partials;    // [parts, length]
  float* bias_partials;      // [parts, length]
  int64_t rows, length, parts;
};

MEGATRON_LITE_LAUNCHERS(LayerNormForward)
MEGATRON_LITE_LAUNCHERS(LayerNormBackward)

// `squares` is the row's sum of (x - mean)^2.
MEGATRON_LITE_INLINE float layer_norm_variance(float squares, int64_t length) {
  return squares < INFINITY ? squares / length : NAN;
}

// Of one value, or of many at once.
template <class Value>
MEGATRON_LITE_INLINE Value layer_norm_output(Value x, float mean, float inverse, Value weight, Value bias) {
  return (x - mean) * inverse * weight + bias;
}

// `mean_g` and `mean_g_normal` are the row's means of g = dy w and of g x^.
template <class Value>
MEGATRON_LITE_INLINE Value layer_norm_gradient(Value g, Value normal, float inverse, float mean_g,
                                               float mean_g_normal) {
  return inverse * (g - mean_g - normal * mean_g_normal);
}

}  // namespace megatron_lite
