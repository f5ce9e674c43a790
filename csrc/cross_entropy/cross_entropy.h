// Cross-entropy over a vocabulary of which a row holds the part [first, first + held), so that ranks, or pieces of
// a vocabulary, join what they found:
//
//   peak = max x,    partition = sum of exp(x - peak),    target = x_t if t is here,    sum = sum of x
//
// all in one pass over the logits: where a larger peak is found, the partition so far is multiplied by
// exp(old - new) (Milakov and Gimelshein 2018). With the peak `top` and the partition of the whole vocabulary,
// and label smoothing s over its V ids, the gradient of a token's loss is
//
//   dx = g (factor exp(x - top) - s / V - (1 - s) [x is the target's])
//
// where factor is 1 / partition, times what a further term of the loss that depends on the partition asks for.
// It is written over the logits. Arithmetic is fp32, rounded once at the end.

#pragma once

#include <cfloat>

#include "base/exponential.h"
#include "base/launch.h"

namespace megatron_lite {

struct CrossEntropyStatistics {
  Dtype dtype;
  const void* logits;     // [rows, length]; what is beyond `held` is not read
  const int64_t* labels;  // [rows]
  float* statistics;      // [4, rows]: peak, partition, target, sum
  int64_t first, held;
  int64_t rows, length;
};

struct CrossEntropyGradient {
  Dtype dtype;
  void* logits;           // [rows, length], becomes its gradient; 0 beyond `held`
  const int64_t* labels;  // [rows]; a row with a negative one becomes 0
  const float* top;       // [rows]
  const float* factor;    // [rows]
  const float* gradient;  // [rows], of the losses; a row where it is 0 becomes 0
  int64_t first, held;
  int64_t rows, length;
  float at_target;   // 1 - s
  float everywhere;  // s / V
};

MEGATRON_LITE_LAUNCHERS(CrossEntropyStatistics)
MEGATRON_LITE_LAUNCHERS(CrossEntropyGradient)

// The column of a label, or -1 where it is not here.
template <class Arguments>
MEGATRON_LITE_INLINE int64_t cross_entropy_column(const Arguments& a, int64_t label) {
  return label >= a.first && label - a.first < a.held ? label - a.first : -1;
}

MEGATRON_LITE_INLINE bool cross_entropy_has_gradient(int64_t label, float gradient) {
  return label >= 0 && gradient != 0.0f;
}

MEGATRON_LITE_INLINE float cross_entropy_gradient(float x, float top, float factor, float gradient, float taken) {
  return gradient * (factor * exponential(x - top) - taken);
}

}  // namespace megatron_lite
