#pragma once

#include "base/binding.h"
#include "rotary/rotary.h"

namespace megatron_lite {

inline HeadStrides head_strides(const Tensor& heads) { return {heads.stride(0), heads.stride(1), heads.stride(2)}; }

template <class Device>
void rotate_heads(const Tensor& input, Tensor& output, const Tensor& cosines, const Tensor& sines, bool interleaved,
                  bool inverse) {
  const Tensor c = prepared(cosines, input, ScalarType::Float), s = prepared(sines, input, ScalarType::Float);
  STD_TORCH_CHECK(input.dim() == 4 && c.dim() == 3, "rotary wants 4 dims of heads and 3 of cosines");
  const int64_t positions = input.size(0), batch = input.size(1), size = input.size(3), pairs = c.size(2);
  STD_TORCH_CHECK(c.size(0) == positions && (c.size(1) == batch || c.size(1) == 1), "cosines are of [", c.size(0), ", ",
                  c.size(1), "] positions where heads are of [", positions, ", ", batch, "]");
  STD_TORCH_CHECK(2 * pairs <= size, pairs, " pairs do not fit into a head of ", size);
  check_elements(s, c.numel(), "sines");
  run<Device>(input, Rotary{
                         .dtype = dtype_of(input),
                         .input = input.const_data_ptr(),
                         .output = output.mutable_data_ptr(),
                         .cosines = static_cast<const float*>(c.const_data_ptr()),
                         .sines = static_cast<const float*>(s.const_data_ptr()),
                         .input_strides = head_strides(input),
                         .output_strides = head_strides(output),
                         .table_batch_stride = c.size(1) == 1 ? 0 : pairs,
                         .table_position_stride = c.size(1) * pairs,
                         .positions = positions,
                         .batch = batch,
                         .heads = input.size(2),
                         .size = size,
                         .width = 2 * pairs,
                         .interleaved = interleaved,
                         .inverse = inverse,
                     });
}

template <class Device>
Tensor rotary(const Tensor& heads, const Tensor& cosines, const Tensor& sines, bool interleaved, bool inverse,
              bool /* overwrite_gradient */) {
  STD_TORCH_CHECK(heads.dim() == 4, "rotary wants 4 dims of heads, not ", heads.dim());
  const Tensor input = heads.stride(3) == 1 ? heads : torch::stable::contiguous(heads);
  Tensor output = torch::stable::new_empty(heads, {heads.size(0), heads.size(1), heads.size(2), heads.size(3)});
  rotate_heads<Device>(input, output, cosines, sines, interleaved, inverse);
  return output;
}

template <class Device>
void rotary_in_place(Tensor heads, const Tensor& cosines, const Tensor& sines, bool interleaved, bool inverse) {
  STD_TORCH_CHECK(heads.is_contiguous(), "rotary_ wants contiguous heads");
  rotate_heads<Device>(heads, heads, cosines, sines, interleaved, inverse);
}

template <class Device>
void register_rotary(torch::stable::detail::StableLibrary& library) {
  library.impl("rotary", TORCH_BOX(&rotary<Device>));
  library.impl("rotary_", TORCH_BOX(&rotary_in_place<Device>));
}

}  // namespace megatron_lite
