#include "layer_norm/layer_norm.h"

#include "base/cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// The sum in its rounded form, written where the gradient will look for it; returns its total over the row.
template <class Element>
float add_residual(const Element* input, const Element* residual, Element* sum, int64_t length) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) {
    store(sum[i], load(input[i]) + load(residual[i]));
    total += load(sum[i]);
  }
  return total;
}

template <class Element>
float total(const Element* input, int64_t length) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) total += load(input[i]);
  return total;
}

template <class Element>
void forward_row(const LayerNormForward& a, int64_t row) {
  const auto* x = static_cast<const Element*>(a.input) + row * a.length;
  const auto* weight = static_cast<const Element*>(a.weight);
  const auto* bias = static_cast<const Element*>(a.bias);
  auto* output = static_cast<Element*>(a.output) + row * a.length;

  float mean;
  if (a.residual) {
    auto* sum = static_cast<Element*>(a.sum) + row * a.length;
    mean = add_residual(x, static_cast<const Element*>(a.residual) + row * a.length, sum, a.length) / a.length;
    x = sum;
  } else {
    mean = total(x, a.length) / a.length;
  }
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < a.length; ++i) squares += (load(x[i]) - mean) * (load(x[i]) - mean);
  const float inverse = 1 / std::sqrt(squares / a.length + a.epsilon);
#pragma omp simd
  for (int64_t i = 0; i < a.length; ++i)
    store(output[i], layer_norm_output(load(x[i]), mean, inverse, load(weight[i]), load(bias[i])));
  a.mean[row] = mean;
  a.inverse[row] = inverse;
}

template <class Element>
void backward_row(const LayerNormBackward& a, int64_t row, float* weight_sums, float* bias_sums) {
  const auto* gradient = static_cast<const Element*>(a.gradient) + row * a.length;
  const auto* x = static_cast<const Element*>(a.input) + row * a.length;
  const auto* weight = static_cast<const Element*>(a.weight);
  auto* result = static_cast<Element*>(a.input_gradient) + row * a.length;
  const float mean = a.mean[row], inverse = a.inverse[row];

  float total_g = 0, total_g_normal = 0;
#pragma omp simd reduction(+ : total_g, total_g_normal)
  for (int64_t i = 0; i < a.length; ++i) {
    const float dy = load(gradient[i]), normal = (load(x[i]) - mean) * inverse, g = dy * load(weight[i]);
    total_g += g;
    total_g_normal += g * normal;
    weight_sums[i] += dy * normal;
    bias_sums[i] += dy;
  }
  const float mean_g = total_g / a.length, mean_g_normal = total_g_normal / a.length;
  const auto value = [&](int64_t i) __attribute__((always_inline)) {
    return layer_norm_gradient(load(gradient[i]) * load(weight[i]), (load(x[i]) - mean) * inverse, inverse, mean_g,
                               mean_g_normal);
  };
  if (a.sum_gradient) {
    const auto* added = static_cast<const Element*>(a.sum_gradient) + row * a.length;
#pragma omp simd
    for (int64_t i = 0; i < a.length; ++i) store(result[i], value(i) + load(added[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < a.length; ++i) store(result[i], value(i));
  }
}

}  // namespace

Status launch(const Context& context, const LayerNormForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_each(context, a.rows, row_grain(a.length), [&](int64_t row) { forward_row<decltype(element)>(a, row); });
  });
}

Status launch(const Context& context, const LayerNormBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    for_each(context, a.parts, 1, [&](int64_t part) {
      float* weight_sums = a.weight_partials + part * a.length;
      float* bias_sums = a.bias_partials + part * a.length;
      for (int64_t i = 0; i < a.length; ++i) weight_sums[i] = bias_sums[i] = 0;
      const int64_t end = part_begin(a.rows, a.parts, part + 1);
      for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row)
        backward_row<Element>(a, row, weight_sums, bias_sums);
    });
    sum_parts(context, a.weight_partials, a.parts, a.length, static_cast<Element*>(a.weight_gradient));
    sum_parts(context, a.bias_partials, a.parts, a.length, static_cast<Element*>(a.bias_gradient));
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
