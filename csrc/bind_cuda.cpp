// Gives torch's dispatcher the CUDA implementations of operations that megatron_lite/kernels/ declares.

#include <cuda_runtime_api.h>

#include "base/binding.h"
#include "adamw/adamw_bind.h"
#include "adamw8bit/adamw8bit_bind.h"
#include "bias_dropout_add/bias_dropout_add_bind.h"
#include "bias_gelu/bias_gelu_bind.h"
#include "cross_entropy/cross_entropy_bind.h"
#include "l2_norm/l2_norm_bind.h"
#include "layer_norm/layer_norm_bind.h"
#include "quantize_blockwise/quantize_blockwise_bind.h"
#include "rms_norm/rms_norm_bind.h"
#include "rotary/rotary_bind.h"
#include "softmax/softmax_bind.h"
#include "swiglu/swiglu_bind.h"

namespace megatron_lite {
namespace {

int32_t multiprocessors(int32_t device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, " does not answer: ", cudaGetErrorString(error));
  return count;
}

// The current stream of a tensor's device, which is the current device meanwhile.
struct Cuda {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Context context;

  explicit Cuda(const Tensor& at) : guard(at.get_device_index()) {
    const int32_t device = at.get_device_index();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &context.stream));
    context.multiprocessors = multiprocessors(device);
  }

  static int64_t row_parts(const Tensor& at, int64_t rows, int64_t length) {
    const int64_t bytes = length * static_cast<int64_t>(at.element_size());
    return cuda::row_parts(multiprocessors(at.get_device_index()), rows, bytes);
  }

  static std::string explain(Status status) {
    return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : "status " + std::to_string(status);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_lite, CUDA, library) {
  register_adamw<Cuda>(library);
  register_adamw8bit<Cuda>(library);
  register_bias_dropout_add<Cuda>(library);
  register_bias_gelu<Cuda>(library);
  register_cross_entropy<Cuda>(library);
  register_l2_norm<Cuda>(library);
  register_layer_norm<Cuda>(library);
  register_quantize_blockwise<Cuda>(library);
  register_rms_norm<Cuda>(library);
  register_rotary<Cuda>(library);
  register_softmax<Cuda>(library);
  register_swiglu<Cuda>(library);
}

}  // namespace megatron_lite
