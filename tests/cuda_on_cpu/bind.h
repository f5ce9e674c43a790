// The bindings of bind_cuda.cpp for CPU tensors.

#pragma once

#include "base/binding.h"

namespace megatron_lite {

struct CudaOnCpu {
  cuda::Context context{nullptr, 3};

  explicit CudaOnCpu(const Tensor&) {}

  static int64_t row_parts(const Tensor& at, int64_t rows, int64_t length) {
    return cuda::row_parts(3, rows, length * static_cast<int64_t>(at.element_size()));
  }

  static std::string explain(Status status) { return "status " + std::to_string(status); }
};

}  // namespace megatron_lite
