#include "layer_norm/layer_norm.h"

#include "base/lanes.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end) {
  const Line<Element> weight_line(a.weight, a.length), bias_line(a.bias, a.length);
  const float *weight = weight_line.data(), *bias = bias_line.data();
  for (int64_t row = begin; row < end; ++row) {
    const Element* input = static_cast<const Element*>(a.input) + row * a.length;
    if (a.residual) {
      Element* sum = static_cast<Element*>(a.sum) + row * a.length;
      add_row(input, static_cast<const Element*>(a.residual) + row * a.length, sum, a.length);
      input = sum;
    }
    Lanes values{}, squares{};
    for_lanes(a.length, [&](int64_t at, auto count) { values += read_on(input + at, a.length, count); });
    const float mean = total(values) / a.length;
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes difference = read(input + at, count, mean) - mean;
      squares += difference * difference;
    });
    const float inverse = 1 / std::sqrt(layer_norm_variance(total(squares), a.length) + a.epsilon);
    Element* output = static_cast<Element*>(a.output) + row * a.length;
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes x = read(input + at, count), w = read(weight + at, count), b = read(bias + at, count);
      write_on(layer_norm_output(x, mean, inverse, w, b), output + at, a.length, count);
    });
    a.mean[row] = mean;
    a.inverse[row] = inverse;
  }
}

template <class Element, bool kFromOutput>
void backward_part(const LayerNormBackward& a, int64_t part) {
  const Line<Element> weight_line(a.weight, a.length), bias_line(a.bias, a.length);
  const float *weight = weight_line.data(), *bias = bias_line.data();
  const Reciprocals reciprocals(weight, kFromOutput ? a.length : 0);
  ColumnSum weight_sum(a.weight_partials + part * a.length, a.length);
  ColumnSum bias_sum(a.bias_partials + part * a.length, a.length);
  float *weight_sums = weight_sum.values(), *bias_sums = bias_sum.values();
  const int64_t end = part_begin(a.rows, a.parts, part + 1);
  for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row) {
    const Element* gradient = static_cast<const Element*>(a.gradient) + row * a.length;
    const Element* kept = static_cast<const Element*>(a.kept) + row * a.length;
    const Element* added = static_cast<const Element*>(a.sum_gradient) + row * a.length;
    Element* result = static_cast<Element*>(a.input_gradient) + row * a.length;
    const float mean = a.mean[row], inverse = a.inverse[row];
    const auto normal_of = [&](const Lanes& kept, int64_t at, auto count) __attribute__((always_inline)) {
      if constexpr (kFromOutput) return (kept - read(bias + at, count)) * read(reciprocals.data() + at, count);
      else return (kept - mean) * inverse;
    };
    Lanes total_g{}, total_g_normal{};
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes dy = read_on(gradient + at, a.length, count), g = dy * read(weight + at, count);
      const Lanes normal = normal_of(read_on(kept + at, a.length, count), at, count);
      total_g += g;
      total_g_normal += g * normal;
      write(read(weight_sums + at, count) + dy * normal, weight_sums + at, count);
      write(read(bias_sums + at, count) + dy, bias_sums + at, count);
    });
    weight_sum.row_done();
    bias_sum.row_done();
    const float mean_g = total(total_g) / a.length, mean_g_normal = total(total_g_normal) / a.length;
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes g = read(gradient + at, count) * read(weight + at, count);
      const Lanes normal = normal_of(read(kept + at, count), at, count);
      Lanes dx = layer_norm_gradient(g, normal, inverse, mean_g, mean_g_normal);
      if (a.sum_gradient) dx += read_on(added + at, a.length, count);
      write_on(dx, result + at, a.length, count);
    });
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
