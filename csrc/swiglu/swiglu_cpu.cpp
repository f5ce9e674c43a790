#include "swiglu/swiglu.h"

#include "base/strip.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
void forward_rows(const SwigluForward& a, int64_t begin, int64_t end) {
  StripReader<Element> read_gate, read_up;
  StripWriter<Element> output;
  for (int64_t row = begin; row < end; ++row) {
    for_strips<kShortStrip>(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column, gate_at = at + row * a.length;
      const float *gate = read_gate(a.input, gate_at, count), *up = read_up(a.input, gate_at + a.length, count);
      float* y = output.strip(a.output, at);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] = swiglu_output(gate[i], up[i]);
      output.done(a.output, at, count);
    });
  }
}

template <class Element>
void backward_rows(const SwigluBackward& a, int64_t begin, int64_t end) {
  StripReader<Element> read_gradient, read_gate, read_up;
  StripWriter<Element> gate_result, up_result;
  for (int64_t row = begin; row < end; ++row) {
    for_strips<kShortStrip>(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column, gate_at = at + row * a.length, up_at = gate_at + a.length;
      const float* gradient = read_gradient(a.gradient, at, count);
      const float *gate = read_gate(a.input, gate_at, count), *up = read_up(a.input, up_at, count);
      float* gate_gradient = gate_result.strip(a.input_gradient, gate_at);
      float* up_gradient = up_result.strip(a.input_gradient, up_at);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        swiglu_gradients(gradient[i], gate[i], up[i], gate_gradient[i], up_gradient[i]);
      gate_result.done(a.input_gradient, gate_at, count);
      up_result.done(a.input_gradient, up_at, count);
    });
  }
}

}  // namespace

Status launch(const Context& context, const SwigluForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const SwigluBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { backward_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
