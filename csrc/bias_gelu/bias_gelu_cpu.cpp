#include "bias_gelu/bias_gelu.h"

#include "base/strip.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

struct Tanh {
  static float output(float z) { return gelu_tanh_output(z); }
  static float slope(float z) { return gelu_tanh_slope(z); }
};

struct Exact {
  static float output(float z) { return gelu_exact_output(z); }
  static float slope(float z) { return gelu_exact_slope(z); }
};

template <class Element, class Gelu>
void forward_rows(const BiasGeluForward& a, const float* bias, int64_t begin, int64_t end) {
  StripReader<Element> read_input;
  StripWriter<Element> output;
  for (int64_t row = begin; row < end; ++row) {
    for_strips<kShortStrip>(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column;
      const float* x = read_input(a.input, at, count);
      const float* b = bias + column;
      float* y = output.strip(a.output, at);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] = Gelu::output(x[i] + b[i]);
      output.done(a.output, at, count);
    });
  }
}

template <class Element, class Gelu>
void backward_part(const BiasGeluBackward& a, const float* bias, int64_t part) {
  StripReader<Element> read_gradient, read_input;
  StripWriter<Element> result;
  // Without a bias a row's slopes are summed all the same, into a line that nobody reads.
  const Buffer unread(a.bias ? 0 : a.length);
  ColumnSum bias_sum(a.bias ? a.bias_partials + part * a.length : unread.data(), a.length);
  const int64_t end = part_begin(a.rows, a.parts, part + 1);
  for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row) {
    for_strips<kShortStrip>(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column;
      const float *dy = read_gradient(a.gradient, at, count), *x = read_input(a.input, at, count);
      const float* b = bias + column;
      float* dx = result.strip(a.input_gradient, at);
      float* sums = bias_sum.values() + column;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        dx[i] = dy[i] * Gelu::slope(x[i] + b[i]);
        sums[i] += dx[i];
      }
      result.done(a.input_gradient, at, count);
    });
    bias_sum.row_done();
  }
}

template <class Run>
void with_gelu(bool tanh, const Run& run) {
  if (tanh) run(Tanh());
  else run(Exact());
}

}  // namespace

Status launch(const Context& context, const BiasGeluForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const Line<Element> bias(a.bias, a.length);
    with_gelu(a.tanh, [&](auto gelu) {
      for_ranges(context, a.rows, row_grain(a.length), [&](int64_t begin, int64_t end) {
        forward_rows<Element, decltype(gelu)>(a, bias.data(), begin, end);
      });
    });
  });
}

Status launch(const Context& context, const BiasGeluBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const Line<Element> bias(a.bias, a.length);
    with_gelu(a.tanh, [&](auto gelu) {
      for_ranges(context, a.parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) backward_part<Element, decltype(gelu)>(a, bias.data(), part);
      });
    });
    if (a.bias) sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
