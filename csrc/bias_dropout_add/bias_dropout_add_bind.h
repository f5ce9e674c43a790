#pragma once

#include "base/binding.h"
#include "bias_dropout_add/bias_dropout_add.h"

namespace megatron_lite {

template <class Device>
Tensor bias_dropout_add_forward(const Tensor& input, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& residual, double probability, int64_t seed,
                                int64_t first) {
  const Rows shape(input);
  const Tensor x = prepared(input, input), b = bias ? prepared(*bias, input) : x;
  const Tensor r = residual ? prepared(*residual, input) : x;
  if (bias) check_elements(b, shape.length, "bias");
  check_elements(r, x.numel(), "residual");
  Tensor output = torch::stable::empty_like(x);
  run<Device>(x, BiasDropoutAddForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .bias = bias ? b.const_data_ptr() : nullptr,
                     .residual = residual ? r.const_data_ptr() : nullptr,
                     .output = output.mutable_data_ptr(),
                     .rows = shape.rows,
                     .length = shape.length,
                     .dropout = Dropout(probability, seed, first),
                 });
  return output;
}

// Without dropout the input's gradient is the output's, and has no elements here.
template <class Device>
std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& gradient, double probability, int64_t seed,
                                                     int64_t first) {
  const Rows shape(gradient);
  const Tensor dy = prepared(gradient, gradient);
  const Dropout dropout(probability, seed, first);
  const int64_t parts = Device::row_parts(dy, shape.rows, shape.length);
  Tensor dx = dropout.drops ? torch::stable::empty_like(dy) : torch::stable::new_empty(dy, {0});
  Tensor db = torch::stable::new_empty(dy, {shape.length}), partials = new_float(dy, {parts, shape.length});
  run<Device>(dy, BiasDropoutAddBackward{
                      .dtype = dtype_of(dy),
                      .gradient = dy.const_data_ptr(),
                      .input_gradient = dx.mutable_data_ptr(),
                      .bias_gradient = db.mutable_data_ptr(),
                      .bias_partials = static_cast<float*>(partials.mutable_data_ptr()),
                      .rows = shape.rows,
                      .length = shape.length,
                      .parts = parts,
                      .dropout = dropout,
                  });
  return {dx, db};
}

template <class Device>
void register_bias_dropout_add(torch::stable::detail::StableLibrary& library) {
  library.impl("bias_dropout_add", TORCH_BOX(&bias_dropout_add_forward<Device>));
  library.impl("bias_dropout_add_backward", TORCH_BOX(&bias_dropout_add_backward<Device>));
}

}  // namespace megatron_lite
