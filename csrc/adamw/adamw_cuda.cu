#include "adamw/adamw.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, class Gradient>
__global__ void __launch_bounds__(256) update_kernel(const AdamwTensor of, const AdamwRule rule) {
  auto* parameter = static_cast<Element*>(of.parameter);
  const auto* gradient = static_cast<const Gradient*>(of.gradient);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < of.length; i += stride) {
    const float g = load(gradient[i]);
    const float m = adamw_first_moment(rule, of.first_moment[i], g);
    const float v = adamw_second_moment(rule, of.second_moment[i], g);
    of.first_moment[i] = m;
    of.second_moment[i] = v;
    store(parameter[i], adamw_parameter(rule, load(parameter[i]), m, sqrtf(v)));
  }
}

}  // namespace

Status launch(const Context& context, const Adamw& a) {
  for (int64_t tensor = 0; tensor < a.count; ++tensor) {
    const AdamwTensor& of = a.tensors[tensor];
    Status inner = kSuccess;
    const Status status = with_element(of.dtype, [&](auto element) {
      inner = with_element(of.gradient_dtype, [&](auto gradient) {
        update_kernel<decltype(element), decltype(gradient)>
            <<<grid_of((of.length + 255) / 256), 256, 0, stream_of(context)>>>(of, a.rule);
      });
    });
    if (inner || status) return inner ? inner : status;
  }
  return kSuccess;
}

}  // namespace megatron_lite::cuda
