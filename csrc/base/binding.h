// What the bindings of every operation share: tensors of torch's stable ABI turned into pointers and sizes.
//
// Python checks arguments and explains; the checks here keep a direct call from reading out of bounds.
// A binding is a template over the device (bind_cpu.cpp, bind_cuda.cpp), so both have one signature.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/launch.h"

namespace megatron_lite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "megatron_lite kernels take float32, bfloat16 and float16, not ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// Contiguous, and at home where `like` is, with its dtype unless another is named.
inline Tensor prepared(const Tensor& tensor, const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  STD_TORCH_CHECK(tensor.device() == like.device(), "megatron_lite kernels want all tensors on one device");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype.value_or(like.scalar_type()), "megatron_lite kernels: dtypes differ");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_elements(const Tensor& tensor, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == elements, name, " has ", tensor.numel(), " elements where ", elements, " belong");
}

inline Tensor new_float(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// A tensor as rows of its last dim.
struct Rows {
  int64_t rows, length;

  explicit Rows(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.dim() > 0, "megatron_lite kernels want at least one dim");
    const auto sizes = tensor.sizes();
    rows = 1;
    for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) rows *= sizes[dim];
    length = sizes[tensor.dim() - 1];
  }
};

template <class Device, class Arguments>
void run(const Tensor& at, const Arguments& arguments) {
  const Device device(at);
  const Status status = launch(device.context, arguments);
  STD_TORCH_CHECK(status == kSuccess, "a megatron_lite kernel failed: ", Device::explain(status));
}

}  // namespace megatron_lite
