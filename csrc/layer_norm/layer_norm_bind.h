#pragma once

#include "base/binding.h"
#include "layer_norm/layer_norm.h"

namespace megatron_lite {

struct LayerNormOutputs {
  Tensor output, sum, mean, inverse;
};

template <class Device>
LayerNormOutputs layer_norm_outputs(const Tensor& input, const Tensor* residual, const Tensor& weight,
                                    const Tensor& bias, double epsilon) {
  const Rows shape(input);
  const Tensor x = prepared(input, input), w = prepared(weight, input), b = prepared(bias, input);
  check_elements(w, shape.length, "weight");
  check_elements(b, shape.length, "bias");
  LayerNormOutputs made{torch::stable::empty_like(x), x, new_float(x, {shape.rows}), new_float(x, {shape.rows})};
  Tensor added = x;
  if (residual) {
    added = prepared(*residual, input);
    check_elements(added, x.numel(), "residual");
    made.sum = torch::stable::empty_like(x);
  }
  run<Device>(x, LayerNormForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .residual = residual ? added.const_data_ptr() : nullptr,
                     .weight = w.const_data_ptr(),
                     .bias = b.const_data_ptr(),
                     .sum = residual ? made.sum.mutable_data_ptr() : nullptr,
                     .output = made.output.mutable_data_ptr(),
                     .mean = static_cast<float*>(made.mean.mutable_data_ptr()),
                     .inverse = static_cast<float*>(made.inverse.mutable_data_ptr()),
                     .rows = shape.rows,
                     .length = shape.length,
                     .epsilon = static_cast<float>(epsilon),
                 });
  return made;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                                      double epsilon, bool /* of autograd alone */) {
  const auto made = layer_norm_outputs<Device>(input, nullptr, weight, bias, epsilon);
  return {made.output, made.mean, made.inverse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_forward(const Tensor& input, const Tensor& residual,
                                                                       const Tensor& weight, const Tensor& bias,
                                                                       double epsilon, bool /* of autograd alone */) {
  const auto made = layer_norm_outputs<Device>(input, &residual, weight, bias, epsilon);
  return {made.output, made.sum, made.mean, made.inverse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& gradient,
                                                       const std::optional<Tensor>& sum_gradient,
                                                       const Tensor& kept, const Tensor& weight,
                                                       const std::optional<Tensor>& bias, const Tensor& mean,
                                                       const Tensor& inverse) {
  const Rows shape(kept);
  const Tensor x = prepared(kept, kept), w = prepared(weight, kept), dy = prepared(gradient, kept);
  const Tensor m = prepared(mean, kept, ScalarType::Float), r = prepared(inverse, kept, ScalarType::Float);
  const Tensor added = sum_gradient ? prepared(*sum_gradient, kept) : dy, b = bias ? prepared(*bias, kept) : w;
  check_elements(dy, x.numel(), "gradient");
  check_elements(added, x.numel(), "sum_gradient");
  check_elements(w, shape.length, "weight");
  check_elements(b, shape.length, "bias");
  check_elements(m, shape.rows, "mean");
  check_elements(r, shape.rows, "inverse");
  Tensor dx = torch::stable::empty_like(x), dw = torch::stable::empty_like(w), db = torch::stable::empty_like(w);
  const int64_t parts = Device::row_parts(x, shape.rows, shape.length);
  Tensor partials = new_float(x, {2, parts, shape.length});
  auto* sums = static_cast<float*>(partials.mutable_data_ptr());
  run<Device>(x, LayerNormBackward{
                     .dtype = dtype_of(x),
                     .gradient = dy.const_data_ptr(),
                     .sum_gradient = sum_gradient ? added.const_data_ptr() : nullptr,
                     .kept = x.const_data_ptr(),
                     .weight = w.const_data_ptr(),
                     .bias = bias ? b.const_data_ptr() : nullptr,
                     .mean = static_cast<const float*>(m.const_data_ptr()),
                     .inverse = static_cast<const float*>(r.const_data_ptr()),
                     .input_gradient = dx.mutable_data_ptr(),
                     .weight_gradient = dw.mutable_data_ptr(),
                     .bias_gradient = db.mutable_data_ptr(),
                     .weight_partials = sums,
                     .bias_partials = sums + parts * shape.length,
                     .rows = shape.rows,
                     .length = shape.length,
                     .parts = parts,
                 });
  return {dx, dw, db};
}

template <class Device>
void register_layer_norm(torch::stable::detail::StableLibrary& library) {
  library.impl("layer_norm", TORCH_BOX(&layer_norm_forward<Device>));
  library.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm_forward<Device>));
  library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<Device>));
}

}  // namespace megatron_lite
