// AdamW (Loshchilov and Hutter 2019) in place, over a list of tensors:
//
//   m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//
// m and v are fp32. What is the same for all elements is computed in fp64 and rounded once; a 16-bit parameter is
// widened, updated in fp32 and rounded once.

#pragma once

#include "base/launch.h"

namespace megatron_lite {

// How many elements a thread takes at a time; few, so that loading the next overlaps with computing these.
constexpr int64_t kAdamwBlock = 256;

struct AdamwRule {
  float beta1, rest1;     // rest = 1 - beta
  float beta2, rest2;
  float decay;            // 1 - lr weight_decay
  float rate;             // lr / (1 - beta1^t)
  float root_correction;  // 1 / sqrt(1 - beta2^t)
  float epsilon;
};

struct AdamwTensor {
  Dtype dtype, gradient_dtype;
  void* parameter;       // [length]
  const void* gradient;  // [length]
  float* first_moment;   // [length], m
  float* second_moment;  // [length], v
  int64_t length;
  int64_t first_block;  // the number of blocks of all tensors before this one
};

struct Adamw {
  const AdamwTensor* tensors;  // [count], in the caller's memory
  int64_t count;
  int64_t blocks;  // of all tensors
  AdamwRule rule;
};

MEGATRON_LITE_LAUNCHERS(Adamw)

MEGATRON_LITE_INLINE float adamw_first_moment(const AdamwRule& rule, float m, float g) {
  return rule.beta1 * m + rule.rest1 * g;
}

MEGATRON_LITE_INLINE float adamw_second_moment(const AdamwRule& rule, float v, float g) {
  return rule.beta2 * v + rule.rest2 * g * g;
}

// `root` is the square root of v.
MEGATRON_LITE_INLINE float adamw_parameter(const AdamwRule& rule, float p, float m, float root) {
  return p * rule.decay - rule.rate * (m / (root * rule.root_correction + rule.epsilon));
}

}  // namespace megatron_lite
