#include "bias_dropout_add/bias_dropout_add.h"

#include "base/strip.h"
#include "bias_dropout_add/philox_cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// The words of a strip's elements, drawn four at a time from the first counter that holds one of them.
class Words {
 public:
  explicit Words(const Dropout& dropout) : dropout_(dropout) {}

  const uint32_t* operator()(int64_t begin, int64_t count) {
    const uint64_t index = static_cast<uint64_t>(dropout_.first + begin), counter = index / 4, key = dropout_.seed;
    const int64_t counters = static_cast<int64_t>((index + count + 3) / 4 - counter);
    for (int64_t i = 0; i < counters; i += kCounters) philox_words(counter + i, key, words_ + 4 * i);
    return words_ + index % 4;
  }

 private:
  const Dropout& dropout_;
  alignas(64) uint32_t words_[kStrip + 4 + 4 * kCounters];
};

template <class Element, bool kDrops, bool kResidual>
void forward_rows(const BiasDropoutAddForward& a, const float* bias, int64_t begin, int64_t end) {
  const Dropout dropout = a.dropout;
  StripReader<Element> read_input, read_residual;
  StripWriter<Element> output;
  Words draw(dropout);
  for (int64_t row = begin; row < end; ++row) {
    for_strips(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column;
      const float* x = read_input(a.input, at, count);
      const float* b = bias + column;
      const float* residual = kResidual ? read_residual(a.residual, at, count) : nullptr;
      const uint32_t* words = kDrops ? draw(at, count) : nullptr;
      float* y = output.strip(a.output, at);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        float value = x[i] + b[i];
        if constexpr (kDrops) value = dropped(dropout, words[i], value);
        if constexpr (kResidual) value += residual[i];
        y[i] = value;
      }
      output.done(a.output, at, count);
    });
  }
}

template <class Element, bool kDrops>
void backward_part(const BiasDropoutAddBackward& a, int64_t part) {
  const Dropout dropout = a.dropout;
  StripReader<Element> read_gradient;
  StripWriter<Element> result;
  Words draw(dropout);
  ColumnSum bias_sum(a.bias_partials + part * a.length, a.length);
  const int64_t end = part_begin(a.rows, a.parts, part + 1);
  for (int64_t row = part_begin(a.rows, a.parts, part); row < end; ++row) {
    for_strips(a.length, [&](int64_t column, int64_t count) {
      const int64_t at = row * a.length + column;
      const float* dy = read_gradient(a.gradient, at, count);
      float* sums = bias_sum.values() + column;
      if constexpr (kDrops) {
        const uint32_t* words = draw(at, count);
        float* dx = result.strip(a.input_gradient, at);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) dx[i] = dropped(dropout, words[i], dy[i]);
        // By itself: stores leave in order, and those of sums would wait among those of fp32 that memory takes.
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += dx[i];
        result.done(a.input_gradient, at, count);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += dy[i];
      }
    });
    bias_sum.row_done();
  }
}

template <bool kTrue>
struct Truth {
  static constexpr bool value = kTrue;
};

template <class Run>
void with_truth(bool truth, const Run& run) {
  if (truth) run(Truth<true>());
  else run(Truth<false>());
}

}  // namespace

Status launch(const Context& context, const BiasDropoutAddForward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    const Line<Element> bias(a.bias, a.length);
    with_truth(a.dropout.drops, [&](auto drops) {
      with_truth(a.residual, [&](auto residual) {
        for_ranges(context, a.rows, row_grain(a.length), [&](int64_t begin, int64_t end) {
          forward_rows<Element, drops.value, residual.value>(a, bias.data(), begin, end);
        });
      });
    });
  });
}

Status launch(const Context& context, const BiasDropoutAddBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    with_truth(a.dropout.drops, [&](auto drops) {
      for_ranges(context, a.parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) backward_part<Element, drops.value>(a, part);
      });
    });
    sum_parts<Element>(context, a.bias_partials, a.parts, a.length, a.bias_gradient);
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
