#include "softmax/softmax.h"

#include "base/lanes.h"
#include "base/stream.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// Calls body(begin, lanes, seen) on blocks of kLanes columns until all that a row sees, the first `visible`, are
// covered. Of a block's lanes those from `seen` on are hidden: they lie in the row all the same, and to take them
// along is cheaper than to end a vector loop anywhere.
template <class Body>
MEGATRON_LITE_LANES void for_visible(int64_t visible, int64_t length, const Body& body) {
  const int64_t whole = visible - visible % kLanes, rest = length - whole;
  const int seen = static_cast<int>(visible - whole);
  for (int64_t begin = 0; begin < whole; begin += kLanes) body(begin, AllLanes(), AllLanes());
  if (seen && rest >= kLanes) body(whole, AllLanes(), seen);
  else if (seen) body(whole, static_cast<int>(rest), seen);
}

// How many columns for_visible covers.
inline int64_t covered(int64_t visible, int64_t length) {
  const int64_t padded = (visible + kLanes - 1) / kLanes * kLanes;
  return padded < length ? padded : length;
}

// Takes the rows of a result block by block, each 0 beyond its first columns.
template <class Element>
class Results {
 public:
  Results(void* rows, int64_t count, int64_t length)
      : rows_(static_cast<Element*>(rows)), length_(length), streams_(streams(rows, count, length * kBytes)) {}
  ~Results() {
    if (streams_) finish_streamed();
  }

  template <class Count, class Seen>
  MEGATRON_LITE_LANES void put(int64_t row, int64_t first, const Lanes& values, Count count, Seen seen) const {
    const Lanes shown = seen < kLanes ? first_of(values, seen) : values;
    Element* const to = rows_ + row * length_ + first;
    if (streams_) {
      alignas(64) Element narrowed[kLanes];
      write(shown, narrowed, count);
      stream(narrowed, count * kBytes, to, count * kBytes);
    } else {
      write(shown, to, count);
    }
  }

  // Of a row, so many columns are put.
  void done(int64_t row, int64_t count) const {
    Element* const to = rows_ + row * length_ + count;
    const int64_t bytes = (length_ - count) * kBytes;
    if (streams_) stream(nullptr, 0, to, bytes);
    else std::memset(to, 0, bytes);
  }

 private:
  static constexpr int64_t kBytes = sizeof(Element);

  Element* rows_;
  int64_t length_;
  bool streams_;
};

// -inf where a mask hides a lane.
MEGATRON_LITE_LANES Lanes masked(const Lanes& logits, const uint8_t* mask, AllLanes) {
  alignas(64) int32_t numbers[kLanes];
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = mask[lane];
  return Lanes::made([&](int i) {
    Numbers number;
    std::memcpy(&number, numbers + i * kWidth, sizeof number);
    return number != 0 ? Vector{} - INFINITY : logits.vectors[i];
  });
}

MEGATRON_LITE_LANES Lanes masked(const Lanes& logits, const uint8_t* mask, int count) {
  uint8_t whole[kLanes] = {};
  std::memcpy(whole, mask, count);
  return masked(logits, whole, AllLanes());
}

template <class Element>
void forward_rows(const SoftmaxForward& a, int64_t begin, int64_t end) {
  const Buffer held(a.length + kLanes);
  const Results<Element> output(a.output, a.rows, a.length);
  float* z = held.data();
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* mask = a.mask.data ? mask_row(a.mask, row) : nullptr;
    const int64_t visible = mask && a.mask.one_column && *mask ? 0 : softmax_visible(a, row);
    const Element* from = static_cast<const Element*>(a.input) + row * a.length;
    Lanes peaks = Lanes::of(-INFINITY);
    // Held in whole blocks, -inf beyond what is seen: an exponential is dear where it is no vector.
    const auto read_logits = [&](const auto& hide) {
      for_visible(visible, a.length, [&](int64_t first, auto lanes, auto seen) {
        const Lanes logits = hide(a.scale * read(from + first, lanes), first, lanes);
        const Lanes shown = seen < kLanes ? first_of(logits, seen, -INFINITY) : logits;
        put(shown, z + first);
        peaks = larger(shown, peaks);
      });
    };
    if (mask && !a.mask.one_column)
      read_logits([=](const Lanes& logits, int64_t first, auto lanes) { return masked(logits, mask + first, lanes); });
    else read_logits([](const Lanes& logits, int64_t, auto) { return logits; });
    const float shift = softmax_shift(largest(peaks));
    Lanes sum{};
    for (int64_t first = 0; first < visible; first += kLanes) {
      prefetch(from + a.length + first, kLanes);
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) z[first + lane] = exponential(z[first + lane] - shift);
      sum += loaded(z + first);
    }
    const float factor = softmax_factor(total(sum));
    for_visible(visible, a.length, [&](int64_t first, auto lanes, auto seen) {
      output.put(row, first, loaded(z + first) * factor, lanes, seen);
    });
    output.done(row, covered(visible, a.length));
  }
}

template <class Element>
void backward_rows(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  const Results<Element> input_gradient(a.input_gradient, a.rows, a.length);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t visible = softmax_visible(a, row);
    const Element* gradient = static_cast<const Element*>(a.gradient) + row * a.length;
    const Element* output = static_cast<const Element*>(a.output) + row * a.length;
    Lanes y_dy{};
    for_visible(visible, a.length, [&](int64_t first, auto lanes, auto seen) {
      const Lanes product = read_on(output + first, a.length, lanes) * read_on(gradient + first, a.length, lanes);
      y_dy += seen < kLanes ? first_of(product, seen) : product;
    });
    const float sum_y_dy = total(y_dy);
    for_visible(visible, a.length, [&](int64_t first, auto lanes, auto seen) {
      const Lanes y = read(output + first, lanes), dy = read(gradient + first, lanes);
      input_gradient.put(row, first, softmax_gradient(y, dy, sum_y_dy, a.scale), lanes, seen);
    });
    input_gradient.done(row, covered(visible, a.length));
  }
}

}  // namespace

Status launch(const Context& context, const SoftmaxForward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.length ? a.rows : 0, row_grain(a.length),
               [&](int64_t begin, int64_t end) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

Status launch(const Context& context, const SoftmaxBackward& a) {
  return with_element(a.dtype, [&](auto element) {
    for_ranges(context, a.length ? a.rows : 0, row_grain(a.length),
               [&](int64_t begin, int64_t end) { backward_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
