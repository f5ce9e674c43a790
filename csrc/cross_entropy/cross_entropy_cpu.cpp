#include "cross_entropy/cross_entropy.h"

#include "base/strip.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// A strip of a row, while the next one is on its way.
template <class Element>
const float* read_ahead(StripReader<Element>& read, const void* logits, int64_t begin, int64_t count) {
  prefetch(static_cast<const Element*>(logits) + begin + count, count);
  return read(logits, begin, count);
}

template <class Element>
void statistics_rows(const CrossEntropyStatistics& a, int64_t begin, int64_t end) {
  StripReader<Element> read;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.length, target = cross_entropy_column(a, a.labels[row]);
    float peak = -FLT_MAX, partition = 0, sum = 0;
    for_strips(a.held, [&](int64_t column, int64_t count) {
      const float* x = read_ahead(read, a.logits, at + column, count);
      LaneMax largest;
      along(count, [&](int64_t i, int lane) {
        largest.lanes[lane] = x[i] > largest.lanes[lane] ? x[i] : largest.lanes[lane];
      });
      const float of_strip = largest.total(), raised = of_strip > peak ? of_strip : peak;
      LaneSum exponentials, logits;
      along(count, [&](int64_t i, int lane) {
        exponentials.lanes[lane] += exponential(x[i] - raised);
        logits.lanes[lane] += x[i];
      });
      partition = partition * exponential(peak - raised) + exponentials.total();
      sum += logits.total();
      peak = raised;
    });
    a.statistics[row] = peak;
    a.statistics[a.rows + row] = partition;
    a.statistics[2 * a.rows + row] = target < 0 ? 0 : load(static_cast<const Element*>(a.logits)[at + target]);
    a.statistics[3 * a.rows + row] = sum;
  }
}

template <class Element>
void gradient_rows(const CrossEntropyGradient& a, int64_t begin, int64_t end) {
  StripReader<Element> read;
  StripWriter<Element> write;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.length;
    auto* logits = static_cast<Element*>(a.logits) + at;
    const float gradient = a.gradient[row];
    if (!cross_entropy_has_gradient(a.labels[row], gradient)) {
      std::memset(logits, 0, a.length * sizeof(Element));
      continue;
    }
    const float top = a.top[row], factor = a.factor[row];
    const int64_t target = cross_entropy_column(a, a.labels[row]);
    const float target_logit = target < 0 ? 0 : load(logits[target]);
    for_strips(a.held, [&](int64_t column, int64_t count) {
      const float* x = read_ahead(read, a.logits, at + column, count);
      float* dx = write.strip(a.logits, at + column);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dx[i] = cross_entropy_gradient(x[i], top, factor, gradient, a.everywhere);
      write.done(a.logits, at + column, count);
    });
    if (target >= 0)
      store(logits[target],
            cross_entropy_gradient(target_logit, top, factor, gradient, a.everywhere + a.at_target));
    std::memset(logits + a.held, 0, (a.length - a.held) * sizeof(Element));
  }
}

}  // namespace

Status launch(const Context& context, const CrossEntropyStatistics& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.rows, row_grain(a.length),
               [&](int64_t begin, int64_t end) { statistics_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const CrossEntropyGradient& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.length ? a.rows : 0, row_grain(a.length),
               [&](int64_t begin, int64_t end) { gradient_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
