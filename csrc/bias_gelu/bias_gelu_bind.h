#pragma once

#include "base/binding.h"
#include "bias_gelu/bias_gelu.h"

namespace megatron_lite {

template <class Device>
Tensor bias_gelu_forward(const Tensor& input, const std::optional<Tensor>& bias, bool tanh) {
  const Rows shape(input);
  const Tensor x = prepared(input, input), b = bias ? prepared(*bias, input) : x;
  if (bias) check_elements(b, shape.length, "bias");
  Tensor output = torch::stable::empty_like(x);
  run<Device>(x, BiasGeluForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .bias = bias ? b.const_data_ptr() : nullptr,
                     .output = output.mutable_data_ptr(),
                     .rows = shape.rows,
                     .length = shape.length,
                     .tanh = tanh,
                 });
  return output;
}

// Without a bias its gradient has no elements.
template <class Device>
std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& gradient, const Tensor& input,
                                              const std::optional<Tensor>& bias, bool tanh) {
  const Rows shape(input);
  const Tensor x = prepared(input, input), dy = prepared(gradient, input), b = bias ? prepared(*bias, input) : x;
  check_elements(dy, x.numel(), "gradient");
  if (bias) check_elements(b, shape.length, "bias");
  const int64_t parts = Device::row_parts(x, shape.rows, shape.length);
  Tensor dx = torch::stable::empty_like(x), db = torch::stable::new_empty(x, {bias ? shape.length : 0});
  Tensor partials = new_float(x, {parts, bias ? shape.length : 0});
  run<Device>(x, BiasGeluBackward{
                     .dtype = dtype_of(x),
                     .gradient = dy.const_data_ptr(),
                     .input = x.const_data_ptr(),
                     .bias = bias ? b.const_data_ptr() : nullptr,
                     .input_gradient = dx.mutable_data_ptr(),
                     .bias_gradient = bias ? db.mutable_data_ptr() : nullptr,
                     .bias_partials = bias ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr,
                     .rows = shape.rows,
                     .length = shape.length,
                     .parts = parts,
                     .tanh = tanh,
                 });
  return {dx, db};
}

template <class Device>
void register_bias_gelu(torch::stable::detail::StableLibrary& library) {
  library.impl("bias_gelu", TORCH_BOX(&bias_gelu_forward<Device>));
  library.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward<Device>));
}

}  // namespace megatron_lite
