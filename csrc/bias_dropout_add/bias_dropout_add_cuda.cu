#include "bias_dropout_add/bias_dropout_add.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

// The words of neighbouring elements, the first of a multiple of four where there are more than one.
template <int kCount>
struct Words {
  uint32_t words[kCount];

  __device__ __forceinline__ Words(const Dropout& dropout, int64_t begin) {
    const uint64_t index = static_cast<uint64_t>(dropout.first + begin);
    if constexpr (kCount == 1) {
      const PhiloxWords drawn = philox(index / 4, dropout.seed);
      const uint32_t even = index & 2 ? drawn.c : drawn.a, odd = index & 2 ? drawn.d : drawn.b;
      words[0] = index & 1 ? odd : even;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const PhiloxWords drawn = philox((index + i) / 4, dropout.seed);
        words[i] = drawn.a;
        words[i + 1] = drawn.b;
        words[i + 2] = drawn.c;
        words[i + 3] = drawn.d;
      }
    }
  }

  __device__ __forceinline__ uint32_t operator[](int index) const { return words[index]; }
};

template <class Element, int kPacks, bool kDrops>
__global__ void __launch_bounds__(512, 1) forward_kernel(const BiasDropoutAddForward a, int64_t strip) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t begin = blockIdx.y * strip, rest = a.length - begin, length = rest < strip ? rest : strip;
  const auto* bias = a.bias ? static_cast<const Element*>(a.bias) + begin : nullptr;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += stride) {
    const int64_t at = row * a.length + begin;
    const auto* input = static_cast<const Element*>(a.input) + at;
    const auto* residual = a.residual ? static_cast<const Element*>(a.residual) + at : nullptr;
    auto* output = static_cast<Element*>(a.output) + at;
    each_pack<Element, kPacks>(length, [&](int, int64_t index) {
      const auto x = read_once<Element, kCount>(input + index);
      PackOf<Element, kPacks> b{}, r{}, result;
      if (residual) r = read_once<Element, kCount>(residual + index);
      if (bias) b = read<Element, kCount>(bias + index);
      if constexpr (kDrops) {
        const Words<kCount> words(a.dropout, at + index);
#pragma unroll
        for (int i = 0; i < kCount; ++i) result.set(i, r[i] + dropped(a.dropout, words[i], x[i] + b[i]));
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) result.set(i, r[i] + (x[i] + b[i]));
      }
      write(output + index, result);
    });
  }
}

// Block `part` takes the rows of one part, threadIdx.y every blockDim.y-th of them.
template <class Element, int kPacks, bool kDrops>
__global__ void __launch_bounds__(512, 1) backward_kernel(const BiasDropoutAddBackward a, int64_t strip) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t begin = blockIdx.y * strip, rest = a.length - begin, length = rest < strip ? rest : strip;
  const int64_t part = blockIdx.x, end = part_begin(a.rows, a.parts, part + 1);
  ColumnSums<Element, kPacks> sums(a.bias_partials + part * a.length + begin, length);
  for (int64_t row = part_begin(a.rows, a.parts, part) + threadIdx.y; row < end; row += blockDim.y) {
    const int64_t at = row * a.length + begin;
    const auto* gradient = static_cast<const Element*>(a.gradient) + at;
    auto* result = static_cast<Element*>(a.input_gradient) + at;
    each_pack<Element, kPacks>(length, [&](int pack, int64_t index) {
      const auto dy = read_once<Element, kCount>(gradient + index);
      float values[kCount];
      if constexpr (kDrops) {
        const Words<kCount> words(a.dropout, at + index);
        PackOf<Element, kPacks> dx;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          values[i] = dropped(a.dropout, words[i], dy[i]);
          dx.set(i, values[i]);
        }
        write(result + index, dx);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = dy[i];
      }
      sums.add(pack, index, values);
    });
  }
  sums.finish(length);
}

}  // namespace

Status launch(const Context& context, const BiasDropoutAddForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.input, a.bias, a.residual, a.output}) && a.dropout.first % 4 == 0;
    const StripPlan plan = plan_strips(a.length, sizeof(Element), whole, 512, 128);
    const unsigned grid = grid_of((a.rows + plan.rows.block.y - 1) / plan.rows.block.y);
    with_packs(plan.rows.packs, [&](auto packs) {
      const auto kernel =
          a.dropout.drops ? forward_kernel<Element, packs.value, true> : forward_kernel<Element, packs.value, false>;
      kernel<<<dim3(grid, plan.strips), plan.rows.block, 0, stream_of(context)>>>(a, plan.strip);
    });
  });
}

Status launch(const Context& context, const BiasDropoutAddBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.gradient, a.input_gradient}) && a.dropout.first % 4 == 0;
    const StripPlan plan = plan_strips(a.length, sizeof(Element), whole, 512, 256);
    with_packs(plan.rows.packs, [&](auto packs) {
      const auto kernel =
          a.dropout.drops ? backward_kernel<Element, packs.value, true> : backward_kernel<Element, packs.value, false>;
      kernel<<<dim3(grid_of(a.parts), plan.strips), plan.rows.block, 0, stream_of(context)>>>(a, plan.strip);
    });
    sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cuda
