#include "rms_norm/rms_norm.h"

#include "base/lanes.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
void forward_rows(const RmsNormForward& a, int64_t begin, int64_t end) {
  const Line<Element> line(a.weight, a.length);
  const float* weight = line.data();
  for (int64_t row = begin; row < end; ++row) {
    const Element* input = static_cast<const Element*>(a.input) + row * a.length;
    if (a.residual) {
      Element* sum = static_cast<Element*>(a.sum) + row * a.length;
      add_row(input, static_cast<const Element*>(a.residual) + row * a.length, sum, a.length);
      input = sum;
    }
    Lanes squares{};
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes x = read_on(input + at, a.length, count);
      squares += x * x;
    });
    const float inverse = 1 / std::sqrt(rms_norm_mean_square(total(squares), a.length) + a.epsilon);
    Element* output = static_cast<Element*>(a.output) + row * a.length;
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes x = read(input + at, count), w = read(weight + at, count);
      write_on(rms_norm_output(x, inverse, w), output + at, a.length, count);
    });
    a.inverse[row] = inverse;
  }
}

template <class Element, bool kFromOutput>
void backward_part(const RmsNormBackward& a, int64_t part) {
  const Line<Element> line(a.weight, a.length);
  const float* weight = line.data();
  const Reciprocals reciprocals(weight, kFromOutput ? a.length : 0);
  ColumnSum weight_sum(a.weight_partials + part * a.length, a.length);
  float* weight_sums = weight_sum.values();
  const int64_t end = part_begin(a.rows, a.parts, part + 1);
  for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row) {
    const Element* gradient = static_cast<const Element*>(a.gradient) + row * a.length;
    const Element* kept = static_cast<const Element*>(a.kept) + row * a.length;
    const Element* added = static_cast<const Element*>(a.sum_gradient) + row * a.length;
    Element* result = static_cast<Element*>(a.input_gradient) + row * a.length;
    const float inverse = a.inverse[row];
    const auto normal_of = [&](const Lanes& kept, int64_t at, auto count) __attribute__((always_inline)) {
      if constexpr (kFromOutput) return kept * read(reciprocals.data() + at, count);
      else return kept * inverse;
    };
    Lanes g_normal{};
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes dy = read_on(gradient + at, a.length, count);
      const Lanes normal = normal_of(read_on(kept + at, a.length, count), at, count);
      g_normal += dy * read(weight + at, count) * normal;
      write(read(weight_sums + at, count) + dy * normal, weight_sums + at, count);
    });
    weight_sum.row_done();
    const float mean_g_normal = total(g_normal) / a.length;
    for_lanes(a.length, [&](int64_t at, auto count) {
      const Lanes g = read(gradient + at, count) * read(weight + at, count);
      const Lanes normal = normal_of(read(kept + at, count), at, count);
      Lanes dx = rms_norm_gradient(g, normal, inverse, mean_g_normal);
      if (a.sum_gradient) dx += read_on(added + at, a.length, count);
      write_on(dx, result + at, a.length, count);
    });
  }
}

}  // namespace

Status launch(const Context& context, const RmsNormForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const RmsNormBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    for_ranges(context, a.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        a.from_output ? backward_part<Element, true>(a, part) : backward_part<Element, false>(a, part);
    });
    sum_parts<Element>(context, a.weight_partials, a.parts, a.length, a.weight_gradient);
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
