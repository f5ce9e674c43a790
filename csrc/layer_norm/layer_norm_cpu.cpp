#include "layer_norm/layer_norm.h"

#include "base/cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end) {
  const Reader<Element> read_input(a.length), read_residual(a.length), read_weight(a.length), read_bias(a.length);
  const Writer<Element> sum(a.length), output(a.length);
  const float *weight = read_weight(a.weight), *bias = read_bias(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = read_input(a.input, row);
    if (a.residual) {
      const float* residual = read_residual(a.residual, row);
      float* total = sum.line(a.sum, row);
#pragma omp simd
      for (int64_t i = 0; i < a.length; ++i) total[i] = x[i] + residual[i];
      sum.done(a.sum, row);
      x = read_input(a.sum, row);
    }
    LaneSum total, squares;
    along(a.length, [&](int64_t i, int lane) { total.lanes[lane] += x[i]; });
    const float mean = total.total() / a.length;
    along(a.length, [&](int64_t i, int lane) { squares.lanes[lane] += (x[i] - mean) * (x[i] - mean); });
    const float inverse = 1 / std::sqrt(layer_norm_variance(squares.total(), a.length) + a.epsilon);
    float* y = output.line(a.output, row);
#pragma omp simd
    for (int64_t i = 0; i < a.length; ++i) y[i] = layer_norm_output(x[i], mean, inverse, weight[i], bias[i]);
    output.done(a.output, row);
    a.mean[row] = mean;
    a.inverse[row] = inverse;
  }
}

template <class Element, bool kFromOutput>
void backward_part(const LayerNormBackward& a, int64_t part) {
  const Reader<Element> read_gradient(a.length), read_kept(a.length), read_weight(a.length), read_added(a.length);
  const Reader<Element> read_bias(kFromOutput ? a.length : 0);
  const Writer<Element> result(a.length);
  const float *weight = read_weight(a.weight), *bias = kFromOutput ? read_bias(a.bias) : nullptr;
  const Reciprocals reciprocals(weight, kFromOutput ? a.length : 0);
  ColumnSum weight_sum(a.weight_partials + part * a.length, a.length);
  ColumnSum bias_sum(a.bias_partials + part * a.length, a.length);
  float *weight_sums = weight_sum.values(), *bias_sums = bias_sum.values();
  const int64_t end = part_begin(a.rows, a.parts, part + 1);
  for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row) {
    const float *dy = read_gradient(a.gradient, row), *kept = read_kept(a.kept, row);
    const float mean = a.mean[row], inverse = a.inverse[row];
    const auto normal_at = [=, &reciprocals](int64_t i) __attribute__((always_inline)) {
      return kFromOutput ? (kept[i] - bias[i]) * reciprocals[i] : (kept[i] - mean) * inverse;
    };
    LaneSum total_g, total_g_normal;
    along(a.length, [&](int64_t i, int lane) {
      const float normal = normal_at(i), g = dy[i] * weight[i];
      total_g.lanes[lane] += g;
      total_g_normal.lanes[lane] += g * normal;
      weight_sums[i] += dy[i] * normal;
      bias_sums[i] += dy[i];
    });
    weight_sum.row_done();
    bias_sum.row_done();
    const float mean_g = total_g.total() / a.length, mean_g_normal = total_g_normal.total() / a.length;
    float* dx = result.line(a.input_gradient, row);
#pragma omp simd
    for (int64_t i = 0; i < a.length; ++i)
      dx[i] = layer_norm_gradient(dy[i] * weight[i], normal_at(i), inverse, mean_g, mean_g_normal);
    if (a.sum_gradient) {
      const float* added = read_added(a.sum_gradient, row);
#pragma omp simd
      for (int64_t i = 0; i < a.length; ++i) dx[i] += added[i];
    }
    result.done(a.input_gradient, row);
  }
}

}  // namespace

Status launch(const Context& context, const LayerNormForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const LayerNormBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    for_ranges(context, a.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        a.bias ? backward_part<Element, true>(a, part) : backward_part<Element, false>(a, part);
    });
    sum_parts<Element>(context, a.weight_partials, a.parts, a.length, a.weight_gradient);
    sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
