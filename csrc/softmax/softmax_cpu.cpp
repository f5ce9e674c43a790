#include "softmax/softmax.h"

#include "base/cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
void forward_rows(const SoftmaxForward& a, int64_t begin, int64_t end) {
  const Buffer input(a.length), held(a.length + kLanes);
  const Writer<Element> output(a.length);
  float* z = held.data();
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* mask = a.mask.data ? mask_row(a.mask, row) : nullptr;
    const int64_t visible = mask && a.mask.one_column && *mask ? 0 : softmax_visible(a, row);
    const float* x = widened(static_cast<const Element*>(a.input) + row * a.length, input.data(), visible);
    if (mask && !a.mask.one_column) {
#pragma omp simd
      for (int64_t i = 0; i < visible; ++i) z[i] = mask[i] ? -INFINITY : a.scale * x[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < visible; ++i) z[i] = a.scale * x[i];
    }
    // Hidden columns fill the last block of lanes: an exponential is dear where it is no vector.
    const int64_t padded = (visible + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = visible; i < padded; ++i) z[i] = -INFINITY;
    LaneMax largest;
    along(padded, [&](int64_t i, int lane) {
      largest.lanes[lane] = z[i] > largest.lanes[lane] ? z[i] : largest.lanes[lane];
    });
    const float shift = softmax_shift(largest.total());
    LaneSum sum;
    along(padded, [&](int64_t i, int lane) {
      z[i] = exponential(z[i] - shift);
      sum.lanes[lane] += z[i];
    });
    const float factor = softmax_factor(sum.total());
    float* y = output.line(a.output, row);
#pragma omp simd
    for (int64_t i = 0; i < visible; ++i) y[i] = z[i] * factor;
    std::memset(y + visible, 0, (a.length - visible) * sizeof(float));
    output.done(a.output, row);
  }
}

template <class Element>
void backward_rows(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  const Buffer gradient(a.length), output(a.length);
  const Writer<Element> result(a.length);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t visible = softmax_visible(a, row);
    const float* dy = widened(static_cast<const Element*>(a.gradient) + row * a.length, gradient.data(), visible);
    const float* y = widened(static_cast<const Element*>(a.output) + row * a.length, output.data(), visible);
    LaneSum y_dy;
    along(visible, [&](int64_t i, int lane) { y_dy.lanes[lane] += y[i] * dy[i]; });
    const float sum_y_dy = y_dy.total();
    float* dx = result.line(a.input_gradient, row);
#pragma omp simd
    for (int64_t i = 0; i < visible; ++i) dx[i] = softmax_gradient(y[i], dy[i], sum_y_dy, a.scale);
    std::memset(dx + visible, 0, (a.length - visible) * sizeof(float));
    result.done(a.input_gradient, row);
  }
}

}  // namespace

Status launch(const Context& context, const SoftmaxForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const SoftmaxBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { backward_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
