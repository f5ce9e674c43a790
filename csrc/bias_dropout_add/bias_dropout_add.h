// Dropout (Srivastava et al. 2014) of a sum with a bias, added to the residual:
//
//   y = residual + m (input + bias),    dinput = m dy,    dbias = the sum of dinput over rows,    dresidual = dy
//
// m is 0 with a probability p and else 1 / (1 - p). Element i of a tensor is dropped if its word is less than
// p 2^32: word i % 4 of Philox's counter i / 4 with the seed as key. So the mask is a function of the seed
// alone: it is never kept, and the same on every device, by however many threads, and when computed again. A tensor
// may be a part of another one, whose elements it counts from `first`. What is dropped is 0, be it NaN.
// Arithmetic is fp32, rounded once at the end.

#pragma once

#include "base/launch.h"
#include "bias_dropout_add/philox.h"

namespace megatron_lite {

struct Dropout {
  bool drops;
  uint32_t threshold;
  float scale;
  uint64_t seed;
  int64_t first;

  Dropout(double probability, int64_t seed, int64_t first)
      : drops(probability > 0),
        threshold(probability * 0x1p32 < 0xffffffffu ? static_cast<uint32_t>(probability * 0x1p32) : 0xffffffffu),
        scale(static_cast<float>(1 / (1 - probability))),
        seed(static_cast<uint64_t>(seed)),
        first(first) {}
};

struct BiasDropoutAddForward {
  Dtype dtype;
  const void* input;     // [rows, length]
  const void* bias;      // [length], or null
  const void* residual;  // [rows, length], or null
  void* output;          // [rows, length]
  int64_t rows, length;
  Dropout dropout;
};

// With a bias; without one the input's gradient is the forward pass of the output's.
struct BiasDropoutAddBackward {
  Dtype dtype;
  const void* gradient;  // [rows, length], of the output
  void* input_gradient;  // [rows, length]; not written unless something is dropped
  void* bias_gradient;   // [length]
  float* bias_partials;  // [parts, length]
  int64_t rows, length, parts;
  Dropout dropout;
};

MEGATRON_LITE_LAUNCHERS(BiasDropoutAddForward)
MEGATRON_LITE_LAUNCHERS(BiasDropoutAddBackward)

MEGATRON_LITE_INLINE float dropped(const Dropout& dropout, uint32_t word, float value) {
  return word < dropout.threshold ? 0.0f : value * dropout.scale;
}

}  // namespace megatron_lite
