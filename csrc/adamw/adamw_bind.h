#pragma once

#include <algorithm>
#include <cmath>

#include "adamw/adamw.h"
#include "base/binding.h"

namespace megatron_lite {

inline AdamwRule adamw_rule(int64_t step, double lr, double beta1, double beta2, double epsilon, double weight_decay) {
  STD_TORCH_CHECK(step > 0, "AdamW counts steps from 1, this is step ", step);
  return {
      .beta1 = static_cast<float>(beta1),
      .rest1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .rest2 = static_cast<float>(1 - beta2),
      .decay = static_cast<float>(1 - lr * weight_decay),
      .rate = static_cast<float>(lr / (1 - std::pow(beta1, step))),
      .root_correction = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
      .epsilon = static_cast<float>(epsilon),
  };
}

// A tensor that is written to: there is no making it contiguous.
inline void* updated_data(const Tensor& tensor, const Tensor& like, ScalarType dtype, int64_t elements,
                          const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is updated in place and must be contiguous");
  check_elements(tensor, elements, name);
  return prepared(tensor, like, dtype).mutable_data_ptr();
}

inline void check_count(const std::vector<Tensor>& tensors, size_t count, const char* name) {
  STD_TORCH_CHECK(tensors.size() == count, tensors.size(), " ", name, " for ", count, " parameters");
}

template <class Device>
void adamw(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
           const std::vector<Tensor>& first_moments, const std::vector<Tensor>& second_moments, int64_t step, double lr,
           double beta1, double beta2, double epsilon, double weight_decay) {
  check_count(parameters, std::max<size_t>(parameters.size(), 1), "tensors");
  check_count(gradients, parameters.size(), "gradients");
  check_count(first_moments, parameters.size(), "first moments");
  check_count(second_moments, parameters.size(), "second moments");
  const Tensor& at = parameters.front();
  std::vector<Tensor> held;
  std::vector<AdamwTensor> table;
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
        .first_moment =
            static_cast<float*>(updated_data(first_moments[i], at, ScalarType::Float, length, "a first moment")),
        .second_moment =
            static_cast<float*>(updated_data(second_moments[i], at, ScalarType::Float, length, "a second moment")),
        .length = length,
        .first_block = blocks,
    });
    blocks += (length + kAdamwBlock - 1) / kAdamwBlock;
  }
  run<Device>(at, Adamw{
                      .tensors = table.data(),
                      .count = static_cast<int64_t>(table.size()),
                      .blocks = blocks,
                      .rule = adamw_rule(step, lr, beta1, beta2, epsilon, weight_decay),
                  });
}

template <class Device>
void register_adamw(torch::stable::detail::StableLibrary& library) {
  library.impl("adamw", TORCH_BOX(&adamw<Device>));
}

}  // namespace megatron_lite
