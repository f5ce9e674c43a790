#include "swiglu/swiglu.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes the packs at `index` of both halves of a row; kPacks is 1, or 0 where a pack is one element.
template <class Element, int kPacks>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const SwigluForward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t each = a.length / kCount, packs = a.rows * each;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs; pack += stride) {
    const int64_t row = pack / each, index = (pack - row * each) * kCount;
    const auto* input = static_cast<const Element*>(a.input) + 2 * row * a.length + index;
    const auto gate = read_once<Element, kCount>(input), up = read_once<Element, kCount>(input + a.length);
    PackOf<Element, kPacks> result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.set(i, swiglu_output(gate[i], up[i]));
    write(static_cast<Element*>(a.output) + row * a.length + index, result);
  }
}

template <class Element, int kPacks>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const SwigluBackward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t each = a.length / kCount, packs = a.rows * each;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pack < packs; pack += stride) {
    const int64_t row = pack / each, index = (pack - row * each) * kCount, at = 2 * row * a.length + index;
    const auto* input = static_cast<const Element*>(a.input) + at;
    auto* result = static_cast<Element*>(a.input_gradient) + at;
    const auto dy = read_once<Element, kCount>(static_cast<const Element*>(a.gradient) + row * a.length + index);
    const auto gate = read_once<Element, kCount>(input), up = read_once<Element, kCount>(input + a.length);
    PackOf<Element, kPacks> gate_result, up_result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float gate_gradient, up_gradient;
      swiglu_gradients(dy[i], gate[i], up[i], gate_gradient, up_gradient);
      gate_result.set(i, gate_gradient);
      up_result.set(i, up_gradient);
    }
    write(result, gate_result);
    write(result + a.length, up_result);
  }
}

// Calls run(Number<kPacks>(), blocks) as the length and the pointers' alignment allow.
template <class Element, class Arguments, class Run>
void with_grid(const Arguments& a, bool whole, const Run& run) {
  const int width = kWidth<Element, 1>;
  const bool packed = whole && a.length % width == 0;
  const int64_t packs = a.rows * (packed ? a.length / width : a.length);
  const unsigned grid = grid_of((packs + kThreads - 1) / kThreads);
  if (packed) run(Number<1>(), grid);
  else run(Number<0>(), grid);
}

}  // namespace

Status launch(const Context& context, const SwigluForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    with_grid<Element>(a, aligned({a.input, a.output}), [&](auto packs, unsigned grid) {
      forward_kernel<Element, packs.value><<<grid, kThreads, 0, stream_of(context)>>>(a);
    });
  });
}

Status launch(const Context& context, const SwigluBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    with_grid<Element>(a, aligned({a.gradient, a.input, a.input_gradient}), [&](auto packs, unsigned grid) {
      backward_kernel<Element, packs.value><<<grid, kThreads, 0, stream_of(context)>>>(a);
    });
  });
}

}  // namespace megatron_lite::cuda
