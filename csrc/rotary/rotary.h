// Rotary position embedding (Su et al. 2021): the first `width` values of each head turn in pairs, the rest stay.
//
//   y1 = x1 c - x2 s,    y2 = x2 c + x1 s
//
// A pair is (i, i + width / 2), or neighbours (2i, 2i + 1) if interleaved; c and s belong to the position and the
// pair. The gradient is the inverse rotation, by -s. Arithmetic is fp32, rounded once at the end.

#pragma once

#include "base/launch.h"

namespace megatron_lite {

// Elements from one position, batch row and head to the next; the values of a head are neighbours.
struct HeadStrides {
  int64_t position, batch, head;
};

struct Rotary {
  Dtype dtype;
  const void* input;                   // [positions, batch, heads, size] by its strides
  void* output;                        // the same, by its own; or `input` itself
  const float *cosines, *sines;        // [positions, batch or 1, width / 2]
  HeadStrides input_strides, output_strides;
  int64_t table_batch_stride;          // 0 where all of a batch have the same positions
  int64_t table_position_stride;
  int64_t positions, batch, heads, size, width;
  bool interleaved, inverse;
};

MEGATRON_LITE_LAUNCHERS(Rotary)

MEGATRON_LITE_INLINE void rotate(float first, float second, float cosine, float sine, float& first_out,
                                 float& second_out) {
  first_out = first * cosine - second * sine;
  second_out = second * cosine + first * sine;
}

}  // namespace megatron_lite
