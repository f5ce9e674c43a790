#include "softmax/softmax.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

// The end of the packs that hold `visible` columns: what is beyond is not read.
template <int kCount>
__device__ __forceinline__ int64_t whole_packs(int64_t visible) {
  return (visible + kCount - 1) / kCount * kCount;
}

template <class Element, int kPacks>
__global__ void __launch_bounds__(512, 1) forward_kernel(const SoftmaxForward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.rows; first += stride) {
    // A block's last rows may be beyond the end: they read the last one again and write nothing.
    const bool mine = first + threadIdx.y < a.rows;
    const int64_t row = mine ? first + threadIdx.y : a.rows - 1;
    const uint8_t* mask = a.mask.data ? mask_row(a.mask, row) : nullptr;
    const int64_t visible = mask && a.mask.one_column && *mask ? 0 : softmax_visible(a, row);
    const int64_t read_end = whole_packs<kCount>(visible);
    if (a.mask.one_column) mask = nullptr;
    const Row<Element, kPacks> x(static_cast<const Element*>(a.input) + row * a.length, read_end);
    const auto logit = [&](float value, int64_t column) {
      return column >= visible || (mask && mask[column]) ? -INFINITY : a.scale * value;
    };

    float largest = -INFINITY;
    each_pack<Element, kPacks>(read_end, [&](int pack, int64_t index) {
      const auto values = x(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, logit(values[i], index + i));
    });
    const float shift = softmax_shift(row_largest(largest));
    float sum[1] = {};
    each_pack<Element, kPacks>(read_end, [&](int pack, int64_t index) {
      const auto values = x(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[0] += exponential(logit(values[i], index + i) - shift);
    });
    row_sums(sum);
    const float factor = softmax_factor(sum[0]);
    if (!mine) continue;
    auto* output = static_cast<Element*>(a.output) + row * a.length;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      PackOf<Element, kPacks> result = {};
      if (index < read_end) {
        const auto values = x(pack, index);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          result.set(i, index + i < visible ? factor * exponential(logit(values[i], index + i) - shift) : 0.0f);
      }
      write(output + index, result);
    });
  }
}

template <class Element, int kPacks>
__global__ void __launch_bounds__(512) backward_kernel(const SoftmaxBackward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.rows; first += stride) {
    const bool mine = first + threadIdx.y < a.rows;
    const int64_t row = mine ? first + threadIdx.y : a.rows - 1;
    const int64_t visible = softmax_visible(a, row), read_end = whole_packs<kCount>(visible);
    const Row<Element, kPacks> dy_row(static_cast<const Element*>(a.gradient) + row * a.length, read_end);
    const Row<Element, kPacks> y_row(static_cast<const Element*>(a.output) + row * a.length, read_end);

    float y_dy[1] = {};
    each_pack<Element, kPacks>(read_end, [&](int pack, int64_t index) {
      const auto dy = dy_row(pack, index), y = y_row(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y_dy[0] += index + i < visible ? y[i] * dy[i] : 0.0f;
    });
    row_sums(y_dy);
    if (!mine) continue;
    auto* dx = static_cast<Element*>(a.input_gradient) + row * a.length;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      PackOf<Element, kPacks> result = {};
      if (index < read_end) {
        const auto dy = dy_row(pack, index), y = y_row(pack, index);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          result.set(i, index + i < visible ? softmax_gradient(y[i], dy[i], y_dy[0], a.scale) : 0.0f);
      }
      write(dx + index, result);
    });
  }
}

}  // namespace

Status launch(const Context& context, const SoftmaxForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const RowPlan plan = plan_rows(a.length, sizeof(Element), aligned({a.input, a.output}), 512, 128);
    const unsigned grid = grid_of((a.rows + plan.block.y - 1) / plan.block.y);
    with_packs(plan.packs, [&](auto packs) {
      forward_kernel<Element, packs.value><<<grid, plan.block, 0, stream_of(context)>>>(a);
    });
  });
}

Status launch(const Context& context, const SoftmaxBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.gradient, a.output, a.input_gradient});
    const RowPlan plan = plan_rows(a.length, sizeof(Element), whole, 512, 128);
    const unsigned grid = grid_of((a.rows + plan.block.y - 1) / plan.block.y);
    with_packs(plan.packs, [&](auto packs) {
      backward_kernel<Element, packs.value><<<grid, plan.block, 0, stream_of(context)>>>(a);
    });
  });
}

}  // namespace megatron_lite::cuda
