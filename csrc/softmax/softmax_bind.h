#pragma once

#include "base/binding.h"
#include "softmax/softmax.h"

namespace megatron_lite {

// Leaves out dims of size 1 and joins those that lie in memory like one; where more than four remain, `held` keeps
// a contiguous copy.
inline SoftmaxMask softmax_mask(const Tensor& mask, const Tensor& input, Tensor& held) {
  STD_TORCH_CHECK(mask.device() == input.device(), "softmax wants the mask on the input's device");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "softmax wants a mask of booleans");
  STD_TORCH_CHECK(mask.dim() == input.dim(), "softmax wants the mask expanded to the input's shape");
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    STD_TORCH_CHECK(mask.size(dim) == input.size(dim), "softmax wants the mask expanded to the input's shape");
  SoftmaxMask rows;
  if (mask.numel() == 0) return rows;
  const int64_t last = mask.dim() - 1;
  rows.one_column = mask.stride(last) == 0;
  int at = SoftmaxMask::kDims;
  bool fits = rows.one_column || mask.stride(last) == 1 || mask.size(last) == 1;
  for (int64_t dim = last - 1; dim >= 0 && fits; --dim) {
    const int64_t size = mask.size(dim), stride = mask.stride(dim);
    if (size == 1) continue;
    if (at < SoftmaxMask::kDims && stride == rows.strides[at] * rows.sizes[at]) {
      rows.sizes[at] *= size;
    } else if (at > 0) {
      rows.sizes[--at] = size;
      rows.strides[at] = stride;
    } else {
      fits = false;
    }
  }
  if (!fits) {
    held = torch::stable::contiguous(mask);
    return softmax_mask(held, input, held);
  }
  rows.data = static_cast<const uint8_t*>(held.const_data_ptr());
  return rows;
}

template <class Device>
Tensor softmax_forward(const Tensor& input, const std::optional<Tensor>& mask, double scale, bool causal) {
  const Rows shape(input);
  STD_TORCH_CHECK(!causal || input.dim() > 1, "a causal softmax wants at least two dims");
  const Tensor x = prepared(input, input);
  Tensor output = torch::stable::empty_like(x), held = mask ? *mask : x;
  run<Device>(x, SoftmaxForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .output = output.mutable_data_ptr(),
                     .mask = mask ? softmax_mask(*mask, x, held) : SoftmaxMask{},
                     .causal = causal,
                     .queries = causal ? x.size(x.dim() - 2) : 1,
                     .rows = shape.rows,
                     .length = shape.length,
                     .scale = static_cast<float>(scale),
                 });
  return output;
}

template <class Device>
Tensor softmax_backward(const Tensor& gradient, const Tensor& output, double scale, bool causal) {
  const Rows shape(output);
  STD_TORCH_CHECK(!causal || output.dim() > 1, "a causal softmax wants at least two dims");
  const Tensor y = prepared(output, output), dy = prepared(gradient, output);
  check_elements(dy, y.numel(), "gradient");
  Tensor dx = torch::stable::empty_like(y);
  run<Device>(y, SoftmaxBackward{
                     .dtype = dtype_of(y),
                     .gradient = dy.const_data_ptr(),
                     .output = y.const_data_ptr(),
                     .input_gradient = dx.mutable_data_ptr(),
                     .causal = causal,
                     .queries = causal ? y.size(y.dim() - 2) : 1,
                     .rows = shape.rows,
                     .length = shape.length,
                     .scale = static_cast<float>(scale),
                 });
  return dx;
}

template <class Device>
void register_softmax(torch::stable::detail::StableLibrary& library) {
  library.impl("softmax", TORCH_BOX(&softmax_forward<Device>));
  library.impl("softmax_backward", TORCH_BOX(&softmax_backward<Device>));
}

}  // namespace megatron_lite
