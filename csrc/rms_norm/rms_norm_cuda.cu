#include "rms_norm/rms_norm.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

template <class Element, int kPacks>
__global__ void __launch_bounds__(1024, 1) forward_kernel(const RmsNormForward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  const auto* weight = static_cast<const Element*>(a.weight);
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

    float squares[1] = {};
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto values = x(pack, index);
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares[0] += values[i] * values[i];
    });
    row_sums(squares);
    const float inverse = rsqrtf(rms_norm_mean_square(squares[0], a.length) + a.epsilon);
    if (!mine) continue;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto values = x(pack, index), w = read<Element, kCount>(weight + index);
      PackOf<Element, kPacks> result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) result.set(i, rms_norm_output(values[i], inverse, w[i]));
      write(output + index, result);
    });
    if (threadIdx.x == 0) a.inverse[row] = inverse;
  }
}

// Block `part` takes the rows of one part, threadIdx.y every blockDim.y-th of them.
template <class Element, int kPacks, bool kFromOutput>
__global__ void __launch_bounds__(512, 1) backward_kernel(const RmsNormBackward a) {
  constexpr int kCount = kWidth<Element, kPacks>;
  // Beside the sums of more than 16 columns registers have no room for the row: it is read again, from the cache.
  constexpr bool kHeld = kPacks > 0 && kPacks * kCount <= 16;
  const auto* weight = static_cast<const Element*>(a.weight);
  const int64_t part = blockIdx.x, end = part_begin(a.rows, a.parts, part + 1);
  ColumnSums<Element, kPacks> weight_sums(a.weight_partials + part * a.length, a.length);

  for (int64_t first = part_begin(a.rows, a.parts, part); first < end; first += blockDim.y) {
    const bool mine = first + threadIdx.y < end;
    const int64_t row = mine ? first + threadIdx.y : first;
    const Row<Element, kPacks, kHeld> dy_row(static_cast<const Element*>(a.gradient) + row * a.length, a.length);
    const Row<Element, kPacks, kHeld> kept_row(static_cast<const Element*>(a.kept) + row * a.length, a.length);
    const float inverse = a.inverse[row];

    float g_normal[1] = {};
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto dy = dy_row(pack, index), kept = kept_row(pack, index), w = read<Element, kCount>(weight + index);
      float of_weight[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float normal = kFromOutput ? __fdividef(kept[i], w[i]) : kept[i] * inverse;
        g_normal[0] += dy[i] * w[i] * normal;
        of_weight[i] = mine ? dy[i] * normal : 0;
      }
      weight_sums.add(pack, index, of_weight);
    });
    row_sums(g_normal);
    const float mean_g_normal = g_normal[0] / a.length;
    if (!mine) continue;
    const auto* added = static_cast<const Element*>(a.sum_gradient) + row * a.length;
    auto* result = static_cast<Element*>(a.input_gradient) + row * a.length;
    each_pack<Element, kPacks>(a.length, [&](int pack, int64_t index) {
      const auto dy = dy_row(pack, index), kept = kept_row(pack, index), w = read<Element, kCount>(weight + index);
      PackOf<Element, kPacks> dx;
      float values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float normal = kFromOutput ? __fdividef(kept[i], w[i]) : kept[i] * inverse;
        values[i] = rms_norm_gradient(dy[i] * w[i], normal, inverse, mean_g_normal);
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
}

}  // namespace

Status launch(const Context& context, const RmsNormForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.input, a.residual, a.weight, a.sum, a.output});
    const RowPlan plan = plan_rows(a.length, sizeof(Element), whole, 1024, 128);
    const unsigned grid = grid_of((a.rows + plan.block.y - 1) / plan.block.y);
    with_packs(plan.packs, [&](auto packs) {
      forward_kernel<Element, packs.value><<<grid, plan.block, 0, stream_of(context)>>>(a);
    });
  });
}

Status launch(const Context& context, const RmsNormBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool whole = aligned({a.gradient, a.sum_gradient, a.kept, a.weight, a.input_gradient});
    const RowPlan plan = plan_rows(a.length, sizeof(Element), whole, 512, 256);
    with_packs(plan.packs, [&](auto packs) {
      const auto kernel =
          a.from_output ? backward_kernel<Element, packs.value, true> : backward_kernel<Element, packs.value, false>;
      kernel<<<grid_of(a.parts), plan.block, 0, stream_of(context)>>>(a);
    });
    sum_parts<Element>(context, a.weight_partials, a.parts, a.length, a.weight_gradient);
  });
}

}  // namespace megatron_lite::cuda
