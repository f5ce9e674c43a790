// Softmax over the last dim of scaled logits, of which some may be hidden:
//
//   z = scale x,    y = exp(z - max z) / sum of exp(z - max z)     over what is visible; 0 where it is not
//
// Causal: of L columns and Q queries, query q sees the columns up to q + L - Q (the last query sees all). Masked: a
// query does not see the columns where the mask is true. A row that sees nothing, or only -inf, is 0.
//
//   dx = scale y (dy - sum of y dy)
//
// so that a gradient needs the output alone. Arithmetic is fp32 (the scale too), rounded once at the end.

#pragma once

#include <cmath>

#include "base/exponential.h"
#include "base/launch.h"

namespace megatron_lite {

// A mask of bytes, read through its strides: one that broadcasts is not copied.
struct SoftmaxMask {
  static constexpr int kDims = 4;

  const uint8_t* data = nullptr;  // null: nothing is hidden
  int64_t sizes[kDims] = {1, 1, 1, 1}, strides[kDims] = {};
  bool one_column = false;  // a row is one byte that stands for all of its columns
};

struct SoftmaxForward {
  Dtype dtype;
  const void* input;  // [rows, length]
  void* output;       // [rows, length]
  SoftmaxMask mask;
  bool causal;
  int64_t queries;  // rows of one causal triangle
  int64_t rows, length;
  float scale;
};

struct SoftmaxBackward {
  Dtype dtype;
  const void* gradient;  // [rows, length], of the output
  const void* output;    // [rows, length]
  void* input_gradient;  // [rows, length]
  bool causal;
  int64_t queries;
  int64_t rows, length;
  float scale;
};

MEGATRON_LITE_LAUNCHERS(SoftmaxForward)
MEGATRON_LITE_LAUNCHERS(SoftmaxBackward)

MEGATRON_LITE_INLINE const uint8_t* mask_row(const SoftmaxMask& mask, int64_t index) {
  int64_t offset = 0;
  for (int dim = SoftmaxMask::kDims - 1; dim > 0; --dim) {
    offset += index % mask.sizes[dim] * mask.strides[dim];
    index /= mask.sizes[dim];
  }
  return mask.data + offset + index * mask.strides[0];
}

// How many columns, counted from the first, a row's query can see.
template <class Arguments>
MEGATRON_LITE_INLINE int64_t softmax_visible(const Arguments& a, int64_t row) {
  if (!a.causal) return a.length;
  const int64_t visible = row % a.queries + 1 + a.length - a.queries;
  return visible > 0 ? visible : 0;
}

// What is taken from the logits before the exponential: their largest, unless all are hidden.
MEGATRON_LITE_INLINE float softmax_shift(float largest) { return largest > -INFINITY ? largest : 0.0f; }

// What an exponential is multiplied by; a sum of 0 is of a row that sees nothing.
MEGATRON_LITE_INLINE float softmax_factor(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

template <class Value>  // one, or many at once
MEGATRON_LITE_INLINE Value softmax_gradient(Value y, Value dy, float sum_y_dy, float scale) {
  return scale * (y * (dy - sum_y_dy));
}

}  // namespace megatron_lite
