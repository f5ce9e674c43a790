// SwiGLU (Shazeer 2020) of rows that hold a gate and then as many values to be gated:
//
//   y = g s(g) u,    s(g) = 1 / (1 + e^-g)
//
//   dg = dy u s (1 + g (1 - s)),    du = dy g s
//
// s is computed again for the gradient: the exponential costs less than keeping it. Arithmetic is fp32, rounded
// once at the end.

#pragma once

#include "base/exponential.h"
#include "base/launch.h"

namespace megatron_lite {

struct SwigluForward {
  Dtype dtype;
  const void* input;  // [rows, 2 length], the gate first
  void* output;       // [rows, length]
  int64_t rows, length;
};

struct SwigluBackward {
  Dtype dtype;
  const void* gradient;  // [rows, length], of the output
  const void* input;     // [rows, 2 length]
  void* input_gradient;  // [rows, 2 length]
  int64_t rows, length;
};

MEGATRON_LITE_LAUNCHERS(SwigluForward)
MEGATRON_LITE_LAUNCHERS(SwigluBackward)

MEGATRON_LITE_INLINE float swiglu_output(float gate, float up) { return gate * sigmoid(gate) * up; }

MEGATRON_LITE_INLINE void swiglu_gradients(float gradient, float gate, float up, float& gate_gradient,
                                           float& up_gradient) {
  const float s = sigmoid(gate);
  gate_gradient = gradient * up * s * (1.0f + gate * (1.0f - s));
  up_gradient = gradient * gate * s;
}

}  // namespace megatron_lite
