#include "layer_norm/layer_norm.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, int kPacks>
__global__ void __launch_bounds__(1024) forward_kernel(const LayerNormForward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const auto* weight = static_cast<const Element*>(a.weight);
  const auto* bias = static_cast<const Element*>(a.bias);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.rows; first += stride) {
    // A block's last rows may be beyond the end: they read the last one again and write nothing.
    const bool mine = first + threadIdx.y < a.rows;
    const int64_t row = mine ? first + threadIdx.y : a.rows - 1;
    Row<Element, kPacks> x(static_cast<const Element*>(a.input) + row * a.length, a.length);
    if (a.residual)
      x.add(static_cast<const Element*>(a.residual) + row * a.length, static_cast<Element*>(a.sum) + row * a.length,
            a.length, mine);
    auto* output = static_cast<Element*>(a.output) + row * a.length;

    float total[1] = {};
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto values = x(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[0] += values[i];
    });
    row_sums(total);
    const float mean = total[0] / a.length;
    float squares[1] = {};
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto values = x(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares[0] += (values[i] - mean) * (values[i] - mean);
    });
    row_sums(squares);
    const float inverse = rsqrtf(layer_norm_variance(squares[0], a.length) + a.epsilon);
    if (!mine) continue;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto values = x(pack, index), w = read<Element, kCount>(weight + index);
      const auto b = read<Element, kCount>(bias + index);
      PackOf<Element, kPacks> result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.set(i, layer_norm_output(values[i], mean, inverse, w[i], b[i]));
      write(output + index, result);
    });
    if (threadIdx.x == 0) {
      a.mean[row] = mean;
      a.inverse[row] = inverse;
    }
  }
}

// Block `part` takes the rows of one part, threadIdx.y every blockDim.y-th of them.
template <class Element, int kPacks, bool kFromOutput>
__global__ void __launch_bounds__(512) backward_kernel(const LayerNormBackward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  // Beside the sums of more than 16 columns registers have no room for the row: it is read again, from the cache.
  constexpr bool kHeld = kPacks > 0 && kPacks * kCount <= 16;
  const auto* weight = static_cast<const Element*>(a.weight);
  const auto* bias = static_cast<const Element*>(a.bias);
  const int64_t part = blockIdx.x, end = part_begin(a.rows, a.parts, part + 1);
  ColumnSums<Element, kPacks> weight_sums(a.weight_partials + part * a.length, a.length);
  ColumnSums<Element, kPacks> bias_sums(a.bias_partials + part * a.length, a.length);

  for (int64_t first = part_begin(a.rows, a.parts, part); first < end; first += blockDim.y) {
    const bool mine = first + threadIdx.y < end;
    const int64_t row = mine ? first + threadIdx.y : first;
    const Row<Element, kPacks, kHeld> dy_row(static_cast<const Element*>(a.gradient) + row * a.length, a.length);
    const Row<Element, kPacks, kHeld> kept_row(static_cast<const Element*>(a.kept) + row * a.length, a.length);
    const float mean = a.mean[row], inverse = a.inverse[row];

    float totals[2] = {};
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto dy = dy_row(pack, index), kept = kept_row(pack, index), w = read<Element, kCount>(weight + index);
      PackOf<Element, kPacks> b = {};
      if constexpr (kFromOutput) b = read<Element, kCount>(bias + index);
      float of_weight[kCount], of_bias[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float normal = kFromOutput ? __fdividef(kept[i] - b[i], w[i]) : (kept[i] - mean) * inverse;
        const float g = dy[i] * w[i];
        totals[0] += g;
        totals[1] += g * normal;
        of_weight[i] = mine ? dy[i] * normal : 0;
        of_bias[i] = mine ? dy[i] : 0;
      }
      weight_sums.add(pack, index, of_weight);
      bias_sums.add(pack, index, of_bias);
    });
    row_sums(totals);
    const float mean_g = totals[0] / a.length, mean_g_normal = totals[1] / a.length;
    if (!mine) continue;
    const auto* added = static_cast<const Element*>(a.sum_gradient) + row * a.length;
    auto* result = static_cast<Element*>(a.input_gradient) + row * a.length;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto dy = dy_row(pack, index), kept = kept_row(pack, index), w = read<Element, kCount>(weight + index);
      PackOf<Element, kPacks> b = {};
      if constexpr (kFromOutput) b = read<Element, kCount>(bias + index);
      PackOf<Element, kPacks> dx;
      float values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float normal = kFromOutput ? __fdividef(kept[i] - b[i], w[i]) : (kept[i] - mean) * inverse;
        values[i] = layer_norm_gradient(dy[i] * w[i], normal, inverse, mean_g, mean_g_normal);
      }
      if (a.sum_gradient) {
        const auto more = read_once<Element, kCount>(added + index);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] += more[i];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) dx.set(i, values[i]);
      write(result + index, dx);
    });
  }
  weight_sums.finish(a.length);
  bias_sums.finish(a.length);
}

}  // namespace

Status launch(const Context& context, const LayerNormForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.input, a.residual, a.weight, a.bias, a.sum, a.output});
    const RowPlan plan = plan_rows(a.length, sizeof(Element), whole, 1024, 128);
    const unsigned grid = grid_of((a.rows + plan.block.y - 1) / plan.block.y);
    with_packs(plan.packs, [&](auto packs) {
      forward_kernel<Element, packs.value><<<grid, plan.block, 0, stream_of(context)>>>(a);
    });
  });
}

Status launch(const Context& context, const LayerNormBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.gradient, a.sum_gradient, a.kept, a.weight, a.bias, a.input_gradient});
    const RowPlan plan = plan_rows(a.length, sizeof(Element), whole, 512, 256);
    with_packs(plan.packs, [&](auto packs) {
      const auto kernel =
          a.bias ? backward_kernel<Element, packs.value, true> : backward_kernel<Element, packs.value, false>;
      kernel<<<grid_of(a.parts), plan.block, 0, stream_of(context)>>>(a);
    });
    sum_parts<Element>(context, a.weight_partials, a.parts, a.length, a.weight_gradient);
    sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cuda
