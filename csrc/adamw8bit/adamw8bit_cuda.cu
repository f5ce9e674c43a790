#include "adamw8bit/adamw8bit.h"

#include "quantize_blockwise/quantize_blockwise.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, class Gradient>
__global__ void __launch_bounds__(256) update_kernel(const Adamw8bitTensor of, const AdamwRule rule, bool keep) {
  auto* parameter = static_cast<Element*>(of.parameter);
  const auto* gradient = static_cast<const Gradient*>(of.gradient);
  each_block(of.length, [&](int64_t block, int64_t first) {
    const float first_absmax = of.first_absmax[block], second_absmax = of.second_absmax[block];
    float m[kLaneValues], v[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int64_t at = first + 32 * i;
      m[i] = v[i] = 0;
      if (at < of.length) {
        const float g = load(gradient[at]);
        m[i] = adamw_first_moment(rule, value_of<true>(of.first_codes[at], first_absmax), g);
        v[i] = adamw_second_moment(rule, value_of<false>(of.second_codes[at], second_absmax), g);
        store(parameter[at], adamw_parameter(rule, load(parameter[at]), m[i], sqrtf(v[i])));
      }
    }
    const float first_largest = largest_magnitude(m), second_largest = largest_magnitude(v);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int64_t at = first + 32 * i;
      if (at < of.length) {
        const uint8_t code = code_of<false>(v[i], second_largest);
        of.first_codes[at] = code_of<true>(m[i], first_largest);
        of.second_codes[at] = keep && code == 0 && v[i] > 0 ? 1 : code;
      }
    }
    if (threadIdx.x == 0) {
      of.first_absmax[block] = first_largest;
      of.second_absmax[block] = second_largest;
    }
  });
}

}  // namespace

Status launch(const Context& context, const Adamw8bit& a) {
  for (int64_t tensor = 0; tensor < a.count; ++tensor) {
    const Adamw8bitTensor& of = a.tensors[tensor];
    Status inner = kSuccess;
    const Status status = with_element(of.dtype, [&](auto element) {
      inner = with_element(of.gradient_dtype, [&](auto gradient) {
        update_kernel<decltype(element), decltype(gradient)>
            <<<block_grid(of.length), dim3(32, kWarps), 0, stream_of(context)>>>(of, a.rule, a.keep_second_moments);
      });
    });
    if (inner || status) return inner ? inner : status;
  }
  return kSuccess;
}

}  // namespace megatron_lite::cuda
