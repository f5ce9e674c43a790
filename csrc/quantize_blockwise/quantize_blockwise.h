// Block-wise 8-bit quantisation (Dettmers et al. 2022): of each 256 elements, the largest magnitude in fp32 (absmax),
// and a byte for every element, the code of the map's value nearest to element / absmax.
//
// A map has 7 decades; the one from 10^-(d+1) to 10^-d has n = 64 / 2^d codes (signed, the same for negative values)
// or 128 / 2^d (unsigned), in the middles of n cells of one width. Counted in steps from 0 (codes from the one
// of 0 on), the cell that holds x is therefore the whole part of
//
//   n (8/9 + x 10^(d+1) / 9)    (signed; one less if unsigned)
//
// The nearest code is that one, but for rounding and between decades, where widths differ: there it is up to 1/5 of
// the wider cell off. So the whole part is taken of a quarter less, which is the right step or the one before it,
// and one comparison with the table of where steps begin settles it: what a search of the table gives, to the bit.
// A tie goes to the larger value.
//
// A NaN or infinity in a block makes its absmax NaN or infinite, and all its dequantised elements NaN.

#pragma once

#include "base/launch.h"
#include "quantize_blockwise/code_maps.h"

namespace megatron_lite {

constexpr int64_t kQuantizeBlock = 256;

MEGATRON_LITE_INLINE int64_t quantize_blocks(int64_t length) { return (length + kQuantizeBlock - 1) / kQuantizeBlock; }

struct QuantizeBlockwise {
  Dtype dtype;
  bool is_signed;
  const void* input;  // [length]
  uint8_t* codes;     // [length]
  float* absmax;     // [blocks]
  int64_t length;
};

struct DequantizeBlockwise {
  Dtype dtype;
  bool is_signed;
  const uint8_t* codes;  // [length]
  const float* absmax;  // [blocks]
  void* output;          // [length]
  int64_t length;
};

MEGATRON_LITE_LAUNCHERS(QuantizeBlockwise)
MEGATRON_LITE_LAUNCHERS(DequantizeBlockwise)

// The step from 0 that x in [0, 1] has reached, or one less. `codes` is the top decade's n, `first` 1 if unsigned.
// The cell's number is continuous in x, and from decade to decade its slope falls: the decade of x is the one whose
// line is the least.
MEGATRON_LITE_INLINE int32_t quantize_guess(float x, float codes, float first) {
  float least = codes * (8.0f / 9) + x * (codes * (1e1f / 9)), line;
  line = codes / 2 * (8.0f / 9) + x * (codes / 2 * (1e2f / 9)), least = line < least ? line : least;
  line = codes / 4 * (8.0f / 9) + x * (codes / 4 * (1e3f / 9)), least = line < least ? line : least;
  line = codes / 8 * (8.0f / 9) + x * (codes / 8 * (1e4f / 9)), least = line < least ? line : least;
  line = codes / 16 * (8.0f / 9) + x * (codes / 16 * (1e5f / 9)), least = line < least ? line : least;
  line = codes / 32 * (8.0f / 9) + x * (codes / 32 * (1e6f / 9)), least = line < least ? line : least;
  line = codes / 64 * (8.0f / 9) + x * (codes / 64 * (1e7f / 9)), least = line < least ? line : least;
  return static_cast<int32_t>(least - (0.25f + first));
}

// The code of x, a value divided by its block's absmax. What is no number gets the code of 0.
MEGATRON_LITE_INLINE int32_t quantize_signed(float x, const float* steps) {
  const float magnitude = x < 0 ? -x : x;
  const float known = magnitude <= 1 ? magnitude : 0;
  const int32_t guess = quantize_guess(known, 64, 0);
  const int32_t step = guess + (known >= steps[guess + (x < 0 ? 128 : 0)] ? 1 : 0);
  return 127 + (x < 0 ? -step : step);
}

// The same for values from 0 on; one below gets the code of 0.
MEGATRON_LITE_INLINE int32_t quantize_unsigned(float x, const float* steps) {
  const float known = x > 0 && x <= 1 ? x : 0;
  const int32_t guess = quantize_guess(known, 128, 1);
  return guess + (known >= steps[guess] ? 1 : 0);
}

}  // namespace megatron_lite
