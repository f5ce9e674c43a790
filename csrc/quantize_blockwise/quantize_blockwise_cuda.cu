#include "quantize_blockwise/quantize_blockwise.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, bool kSigned>
__global__ void __launch_bounds__(256) quantize_kernel(const QuantizeBlockwise a) {
  each_block(a.length, [&](int64_t block, int64_t first) {
    float values[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      values[i] = first + 32 * i < a.length ? load(static_cast<const Element*>(a.input)[first + 32 * i]) : 0;
    const float absmax = largest_magnitude(values);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      if (first + 32 * i < a.length) a.codes[first + 32 * i] = code_of<kSigned>(values[i], absmax);
    if (threadIdx.x == 0) a.absmax[block] = absmax;
  });
}

template <class Element, bool kSigned>
__global__ void __launch_bounds__(256) dequantize_kernel(const DequantizeBlockwise a) {
  each_block(a.length, [&](int64_t block, int64_t first) {
    const float absmax = a.absmax[block];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      if (first + 32 * i < a.length)
        store(static_cast<Element*>(a.output)[first + 32 * i], value_of<kSigned>(a.codes[first + 32 * i], absmax));
  });
}

}  // namespace

Status launch(const Context& context, const QuantizeBlockwise& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto kernel = a.is_signed ? quantize_kernel<Element, true> : quantize_kernel<Element, false>;
    kernel<<<block_grid(a.length), dim3(32, kWarps), 0, stream_of(context)>>>(a);
  });
}

Status launch(const Context& context, const DequantizeBlockwise& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto kernel = a.is_signed ? dequantize_kernel<Element, true> : dequantize_kernel<Element, false>;
    kernel<<<block_grid(a.length), dim3(32, kWarps), 0, stream_of(context)>>>(a);
  });
}

}  // namespace megatron_lite::cuda
