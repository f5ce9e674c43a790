#pragma once

#include "base/binding.h"
#include "l2_norm/l2_norm.h"

namespace megatron_lite {

template <class Device>
Tensor l2_norm_forward(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "l2_norm wants at least one tensor");
  const Tensor& first = tensors.front();
  std::vector<Tensor> held;
  std::vector<L2NormTensor> table;
  int64_t chunks = 0;
  for (const Tensor& tensor : tensors) {
    held.push_back(prepared(tensor, first, tensor.scalar_type()));
    table.push_back({dtype_of(tensor), held.back().const_data_ptr(), tensor.numel(), chunks});
    chunks += l2_norm_chunks(tensor.numel());
  }
  Tensor norm = new_float(first, {});
  Tensor partials = torch::stable::new_empty(first, {chunks}, ScalarType::Double);
  run<Device>(first, L2Norm{
                         .tensors = table.data(),
                         .count = static_cast<int64_t>(table.size()),
                         .chunks = chunks,
                         .partials = static_cast<double*>(partials.mutable_data_ptr()),
                         .norm = static_cast<float*>(norm.mutable_data_ptr()),
                     });
  return norm;
}

template <class Device>
void register_l2_norm(torch::stable::detail::StableLibrary& library) {
  library.impl("l2_norm", TORCH_BOX(&l2_norm_forward<Device>));
}

}  // namespace megatron_lite
