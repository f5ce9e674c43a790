#include "rotary/rotary.h"

#include "base/strip.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// One head: `from` may be `to`.
template <class Element>
class Rotator {
 public:
  void halves(const Element* from, Element* to, const float* cosines, const float* sines, int64_t pairs) {
    for_strips(pairs, [&](int64_t begin, int64_t count) {
      const float* c = cosines + begin;
      const float* s = sines + begin;
      const float *x1 = read_first_(from, begin, count), *x2 = read_second_(from, begin + pairs, count);
      float *y1 = first_.strip(to, begin), *y2 = second_.strip(to, begin + pairs);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float a = x1[i], b = x2[i];
        rotate(a, b, c[i], s[i], y1[i], y2[i]);
      }
      first_.done(to, begin, count);
      second_.done(to, begin + pairs, count);
    });
  }

  void neighbours(const Element* from, Element* to, const float* cosines, const float* sines, int64_t pairs) {
    for_strips(2 * pairs, [&](int64_t begin, int64_t count) {
      const float* c = cosines + begin / 2;
      const float* s = sines + begin / 2;
      const float* x = read_first_(from, begin, count);
      float* y = first_.strip(to, begin);
#pragma omp simd
      for (int64_t i = 0; i < count / 2; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        rotate(a, b, c[i], s[i], y[2 * i], y[2 * i + 1]);
      }
      first_.done(to, begin, count);
    });
  }

 private:
  StripReader<Element> read_first_, read_second_;
  StripWriter<Element> first_, second_;
};

template <class Element>
void rotate_rows(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.width / 2;
  const Buffer opposite(a.inverse ? pairs : 0);
  Rotator<Element> rotator;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = row / a.batch, batch = row % a.batch;
    const int64_t table = position * a.table_position_stride + batch * a.table_batch_stride;
    const float *cosines = a.cosines + table, *sines = a.sines + table;
    if (a.inverse) {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) opposite.data()[i] = -sines[i];
      sines = opposite.data();
    }
    for (int64_t head = 0; head < a.heads; ++head) {
      const auto at = [&](const HeadStrides& by) { return position * by.position + batch * by.batch + head * by.head; };
      const Element* from = static_cast<const Element*>(a.input) + at(a.input_strides);
      Element* to = static_cast<Element*>(a.output) + at(a.output_strides);
      if (a.interleaved) rotator.neighbours(from, to, cosines, sines, pairs);
      else rotator.halves(from, to, cosines, sines, pairs);
      if (from != to) std::memcpy(to + a.width, from + a.width, (a.size - a.width) * sizeof(Element));
    }
  }
}

}  // namespace

Status launch(const Context& context, const Rotary& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.positions * a.batch, row_grain(a.heads * a.size),
               [&](int64_t begin, int64_t end) { rotate_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
