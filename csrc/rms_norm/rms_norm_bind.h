#pragma once

#include "base/binding.h"
#include "rms_norm/rms_norm.h"

namespace megatron_lite {

struct RmsNormOutputs {
  Tensor output, sum, inverse;
};

template <class Device>
RmsNormOutputs rms_norm_outputs(const Tensor& input, const Tensor* residual, const Tensor& weight, double epsilon) {
  const Rows shape(input);
  const Tensor x = prepared(input, input), w = prepared(weight, input);
  check_elements(w, shape.length, "weight");
  RmsNormOutputs made{torch::stable::empty_like(x), x, new_float(x, {shape.rows})};
  Tensor added = x;
  if (residual) {
    added = prepared(*residual, input);
    check_elements(added, x.numel(), "residual");
    made.sum = torch::stable::empty_like(x);
  }
  run<Device>(x, RmsNormForward{
                     .dtype = dtype_of(x),
                     .input = x.const_data_ptr(),
                     .residual = residual ? added.const_data_ptr() : nullptr,
                     .weight = w.const_data_ptr(),
                     .sum = residual ? made.sum.mutable_data_ptr() : nullptr,
                     .output = made.output.mutable_data_ptr(),
                     .inverse = static_cast<float*>(made.inverse.mutable_data_ptr()),
                     .rows = shape.rows,
                     .length = shape.length,
                     .epsilon = static_cast<float>(epsilon),
                 });
  return made;
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& input, const Tensor& weight, double epsilon,
                                            bool /* of autograd alone */) {
  const auto made = rms_norm_outputs<Device>(input, nullptr, weight, epsilon);
  return {made.output, made.inverse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> residual_rms_norm_forward(const Tensor& input, const Tensor& residual,
                                                             const Tensor& weight, double epsilon,
                                                             bool /* of autograd alone */) {
  const auto made = rms_norm_outputs<Device>(input, &residual, weight, epsilon);
  return {made.output, made.sum, made.inverse};
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& gradient, const std::optional<Tensor>& sum_gradient,
                                             const Tensor& kept, const Tensor& weight, const Tensor& inverse,
                                             bool from_output) {
  const Rows shape(kept);
  const Tensor x = prepared(kept, kept), w = prepared(weight, kept), dy = prepared(gradient, kept);
  const Tensor r = prepared(inverse, kept, ScalarType::Float);
  const Tensor added = sum_gradient ? prepared(*sum_gradient, kept) : dy;
  check_elements(dy, x.numel(), "gradient");
  check_elements(added, x.numel(), "sum_gradient");
  check_elements(w, shape.length, "weight");
  check_elements(r, shape.rows, "inverse");
  Tensor dx = torch::stable::empty_like(x), dw = torch::stable::empty_like(w);
  const int64_t parts = Device::row_parts(x, shape.rows, shape.length);
  Tensor partials = new_float(x, {parts, shape.length});
  run<Device>(x, RmsNormBackward{
                     .dtype = dtype_of(x),
                     .gradient = dy.const_data_ptr(),
                     .sum_gradient = sum_gradient ? added.const_data_ptr() : nullptr,
                     .kept = x.const_data_ptr(),
                     .from_output = from_output,
                     .weight = w.const_data_ptr(),
                     .inverse = static_cast<const float*>(r.const_data_ptr()),
                     .input_gradient = dx.mutable_data_ptr(),
                     .weight_gradient = dw.mutable_data_ptr(),
                     .weight_partials = static_cast<float*>(partials.mutable_data_ptr()),
                     .rows = shape.rows,
                     .length = shape.length,
                     .parts = parts,
                 });
  return {dx, dw};
}

template <class Device>
void register_rms_norm(torch::stable::detail::StableLibrary& library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm_forward<Device>));
  library.impl("residual_rms_norm", TORCH_BOX(&residual_rms_norm_forward<Device>));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward<Device>));
}

}  // namespace megatron_lite
