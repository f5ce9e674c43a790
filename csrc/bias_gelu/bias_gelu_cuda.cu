#include "bias_gelu/bias_gelu.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, int kPacks, bool kTanh>
__global__ void __launch_bounds__(512, 1) forward_kernel(const BiasGeluForward a, int64_t strip) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t begin = blockIdx.y * strip, rest = a.length - begin, length = rest < strip ? rest : strip;
  const auto* bias = a.bias ? static_cast<const Element*>(a.bias) + begin : nullptr;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += stride) {
    const auto* input = static_cast<const Element*>(a.input) + row * a.length + begin;
    auto* output = static_cast<Element*>(a.output) + row * a.length + begin;
    each_pack<Element, kPacks>(length, [&](int, int64_t index) {
      const auto x = read_once<Element, kCount>(input + index);
      PackOf<Element, kPacks> b{}, result;
      if (bias) b = read<Element, kCount>(bias + index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float z = bias ? x[i] + b[i] : x[i];
        result.set(i, kTanh ? gelu_tanh_output(z) : gelu_exact_output(z));
      }
      write(output + index, result);
    });
  }
}

// Block `part` takes the rows of one part, threadIdx.y every blockDim.y-th of them.
template <class Element, int kPacks, bool kTanh>
__global__ void __launch_bounds__(512, 1) backward_kernel(const BiasGeluBackward a, int64_t strip) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t begin = blockIdx.y * strip, rest = a.length - begin, length = rest < strip ? rest : strip;
  const auto* bias = a.bias ? static_cast<const Element*>(a.bias) + begin : nullptr;
  const int64_t part = blockIdx.x, end = part_begin(a.rows, a.parts, part + 1);
  const auto rows = [&](auto&& summed) {
    for (int64_t row = part_begin(a.rows, a.parts, part) + threadIdx.y; row < end; row += blockDim.y) {
      const auto* gradient = static_cast<const Element*>(a.gradient) + row * a.length + begin;
      const auto* input = static_cast<const Element*>(a.input) + row * a.length + begin;
      auto* result = static_cast<Element*>(a.input_gradient) + row * a.length + begin;
      each_pack<Element, kPacks>(length, [&](int pack, int64_t index) {
        const auto dy = read_once<Element, kCount>(gradient + index), x = read_once<Element, kCount>(input + index);
        PackOf<Element, kPacks> b{}, dx;
        float values[kCount];
        if (bias) b = read<Element, kCount>(bias + index);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const float z = bias ? x[i] + b[i] : x[i];
          values[i] = dy[i] * (kTanh ? gelu_tanh_slope(z) : gelu_exact_slope(z));
          dx.set(i, values[i]);
        }
        summed(pack, index, values);
        write(result + index, dx);
      });
    }
  };
  if (bias) {
    ColumnSums<Element, kPacks> sums(a.bias_partials + part * a.length + begin, length);
    rows([&](int pack, int64_t index, const auto& values) { sums.add(pack, index, values); });
    sums.finish(length);
  } else {
    rows([](int, int64_t, const auto&) {});
  }
}

}  // namespace

Status launch(const Context& context, const BiasGeluForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const StripPlan plan = plan_strips(a.length, sizeof(Element), aligned({a.input, a.bias, a.output}), 512, 128);
    const unsigned grid = grid_of((a.rows + plan.rows.block.y - 1) / plan.rows.block.y);
    with_packs(plan.rows.packs, [&](auto packs) {
      constexpr int kPacks = packs.value;
      const auto kernel = a.tanh ? forward_kernel<Element, kPacks, true> : forward_kernel<Element, kPacks, false>;
      kernel<<<dim3(grid, plan.strips), plan.rows.block, 0, stream_of(context)>>>(a, plan.strip);
    });
  });
}

Status launch(const Context& context, const BiasGeluBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.gradient, a.input, a.bias, a.input_gradient});
    const StripPlan plan = plan_strips(a.length, sizeof(Element), whole, 512, 256);
    with_packs(plan.rows.packs, [&](auto packs) {
      const auto kernel =
          a.tanh ? backward_kernel<Element, packs.value, true> : backward_kernel<Element, packs.value, false>;
      kernel<<<dim3(grid_of(a.parts), plan.strips), plan.rows.block, 0, stream_of(context)>>>(a, plan.strip);
    });
    if (a.bias) sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cuda
