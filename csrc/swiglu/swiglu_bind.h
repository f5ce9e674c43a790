#pragma once

#include "base/binding.h"
#include "swiglu/swiglu.h"

namespace megatron_lite {

template <class Device>
Tensor swiglu_forward(const Tensor& input) {
  const Rows shape(input);
  STD_TORCH_CHECK(shape.length % 2 == 0, "the last dim is ", shape.length, " where an even number belongs");
  const Tensor x = prepared(input, input);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() /= 2;
  Tensor output = torch::stable::new_empty(x, sizes);
  run<Device>(x, SwigluForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .output = output.mutable_data_ptr(),
                     .rows = shape.rows,
                     .length = shape.length / 2,
                 });
  return output;
}

template <class Device>
Tensor swiglu_backward(const Tensor& gradient, const Tensor& input) {
  const Rows shape(input);
  STD_TORCH_CHECK(shape.length % 2 == 0, "the last dim is ", shape.length, " where an even number belongs");
  const Tensor x = prepared(input, input), dy = prepared(gradient, input);
  check_elements(dy, x.numel() / 2, "gradient");
  Tensor dx = torch::stable::empty_like(x);
  run<Device>(x, SwigluBackward{
                     .dtype = dtype_of(x),
                     .gradient = dy.const_data_ptr(),
                     .input = x.const_data_ptr(),
                     .input_gradient = dx.mutable_data_ptr(),
                     .rows = shape.rows,
                     .length = shape.length / 2,
                 });
  return dx;
}

template <class Device>
void register_swiglu(torch::stable::detail::StableLibrary& library) {
  library.impl("swiglu", TORCH_BOX(&swiglu_forward<Device>));
  library.impl("swiglu_backward", TORCH_BOX(&swiglu_backward<Device>));
}

}  // namespace megatron_lite
