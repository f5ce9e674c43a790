// AdamW (adamw/adamw.h) whose moments are kept as bytes (quantize_blockwise/quantize_blockwise.h; Dettmers et al.
// 2022), a tensor at a time in blocks of 256 elements: dequantise, update the moments and with them, still in fp32,
// the parameter, then quantise the moments again by their block's new absmax.
//
// By the nearest code alone, a v far below its block's largest would become 0 while its m does not, and the next
// update would be m / epsilon: on gradients like an embedding's it moves a parameter by 2.0 where lr is 1e-3. So a v
// above 0 keeps code 1 at least (`keep_second_moments`); without that the codes are bitsandbytes' and torchao's.

#pragma once

#include "adamw/adamw.h"
#include "quantize_blockwise/quantize_blockwise.h"

namespace megatron_lite {

struct Adamw8bitTensor {
  Dtype dtype, gradient_dtype;
  void* parameter;         // [length]
  const void* gradient;    // [length]
  uint8_t* first_codes;    // [length], m by the signed map
  float* first_absmax;     // [blocks]
  uint8_t* second_codes;   // [length], v by the unsigned map
  float* second_absmax;    // [blocks]
  int64_t length;
  int64_t first_block;  // the number of blocks of all tensors before this one
};

struct Adamw8bit {
  const Adamw8bitTensor* tensors;  // [count], in the caller's memory
  int64_t count;
  int64_t blocks;  // of all tensors
  bool keep_second_moments;
  AdamwRule rule;
};

MEGATRON_LITE_LAUNCHERS(Adamw8bit)

}  // namespace megatron_lite
