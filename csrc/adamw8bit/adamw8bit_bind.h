#pragma once

#include "adamw/adamw_bind.h"
#include "adamw8bit/adamw8bit.h"

namespace megatron_lite {

template <class Device>
void adamw8bit(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
               const std::vector<Tensor>& first_codes, const std::vector<Tensor>& first_absmax,
               const std::vector<Tensor>& second_codes, const std::vector<Tensor>& second_absmax, int64_t step,
               double lr, double beta1, double beta2, double epsilon, double weight_decay, bool keep_second_moments) {
  check_count(parameters, std::max<size_t>(parameters.size(), 1), "tensors");
  check_count(gradients, parameters.size(), "gradients");
  check_count(first_codes, parameters.size(), "first codes");
  check_count(first_absmax, parameters.size(), "first absmax");
  check_count(second_codes, parameters.size(), "second codes");
  check_count(second_absmax, parameters.size(), "second absmax");
  const Tensor& at = parameters.front();
  const auto codes = [&](const Tensor& tensor, int64_t length) {
    return static_cast<uint8_t*>(updated_data(tensor, at, ScalarType::Byte, length, "a tensor of codes"));
  };
  const auto absmax = [&](const Tensor& tensor, int64_t length) {
    return static_cast<float*>(updated_data(tensor, at, ScalarType::Float, quantize_blocks(length), "an absmax"));
  };
  std::vector<Tensor> held;
  std::vector<Adamw8bitTensor> table;
  int64_t blocks = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor& parameter = parameters[i];
    const int64_t length = parameter.numel();
    held.push_back(prepared(gradients[i], at, gradients[i].scalar_type()));
    check_elements(held.back(), length, "a gradient");
    table.push_back({
        .dtype = dtype_of(parameter),
        .gradient_dtype = dtype_of(held.back()),
        .parameter = updated_data(parameter, at, parameter.scalar_type(), length, "a parameter"),
        .gradient = held.back().const_data_ptr(),
        .first_codes = codes(first_codes[i], length),
        .first_absmax = absmax(first_absmax[i], length),
        .second_codes = codes(second_codes[i], length),
        .second_absmax = absmax(second_absmax[i], length),
        .length = length,
        .first_block = blocks,
    });
    blocks += quantize_blocks(length);
  }
  run<Device>(at, Adamw8bit{
                      .tensors = table.data(),
                      .count = static_cast<int64_t>(table.size()),
                      .blocks = blocks,
                      .keep_second_moments = keep_second_moments,
                      .rule = adamw_rule(step, lr, beta1, beta2, epsilon, weight_decay),
                  });
}

template <class Device>
void register_adamw8bit(torch::stable::detail::StableLibrary& library) {
  library.impl("adamw8bit", TORCH_BOX(&adamw8bit<Device>));
}

}  // namespace megatron_lite
