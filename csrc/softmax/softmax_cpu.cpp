#include "softmax/softmax.h"

#include "base/stream.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

// Calls body(begin, lanes, seen) on blocks of kLanes columns until all that a row sees, the first `visible`, are
// covered. Of a block's lanes those from `seen` on are hidden: they lie in the row all the same, and to take them
// along is cheaper than to end a vector loop anywhere.
template <class Body>
inline __attribute__((always_inline)) void for_visible(int64_t visible, int64_t length, const Body& body) {
  const int64_t whole = visible - visible % kLanes, rest = length - whole;
  for (int64_t begin = 0; begin < whole; begin += kLanes) body(begin, kLanes, kLanes);
  if (visible > whole) body(whole, rest < kLanes ? static_cast<int>(rest) : kLanes, static_cast<int>(visible - whole));
}

// How many columns for_visible covers.
inline int64_t covered(int64_t visible, int64_t length) {
  const int64_t padded = (visible + kLanes - 1) / kLanes * kLanes;
  return padded < length ? padded : length;
}

// The first columns of a row as fp32, while those of the next are on their way.
template <class Element>
const float* read_row(const void* rows, int64_t row, int64_t length, int64_t count, const Buffer& buffer) {
  const Element* from = static_cast<const Element*>(rows) + row * length;
  prefetch(from + length, count);
  return widened(from, buffer.data(), count);
}

// Takes the rows of a result, each 0 beyond its first columns.
template <class Element>
class Results {
 public:
  Results(void* rows, int64_t count, int64_t length)
      : rows_(static_cast<Element*>(rows)),
        length_(length),
        streams_(streams(rows, count, length * static_cast<int64_t>(sizeof(Element)))),
        values_(length),
        narrowed_(length) {}
  ~Results() {
    if (streams_) finish_streams();
  }

  // Where a row's values are to be put.
  float* values(int64_t row) const {
    if constexpr (kIsFloat)
      if (!streams_) return rows_ + row * length_;
    return values_.data();
  }

  // A row of which so many are put.
  void done(int64_t row, int64_t count) const {
    Element* const at = rows_ + row * length_;
    Element* const to = streams_ ? reinterpret_cast<Element*>(narrowed_.data()) : at;
    if constexpr (!kIsFloat) narrow(values_.data(), to, count);
    constexpr int64_t kBytes = sizeof(Element);
    if (streams_) stream(kIsFloat ? values_.data() : narrowed_.data(), count * kBytes, at, length_ * kBytes);
    else std::memset(at + count, 0, (length_ - count) * kBytes);
  }

 private:
  static constexpr bool kIsFloat = sizeof(Element) == sizeof(float);

  Element* rows_;
  int64_t length_;
  bool streams_;
  Buffer values_, narrowed_;
};

template <class Element>
void forward_rows(const SoftmaxForward& a, int64_t begin, int64_t end) {
  const Buffer input(a.length), held(a.length + kLanes);
  const Results<Element> output(a.output, a.rows, a.length);
  float* z = held.data();
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* mask = a.mask.data ? mask_row(a.mask, row) : nullptr;
    const int64_t visible = mask && a.mask.one_column && *mask ? 0 : softmax_visible(a, row);
    const int64_t count = covered(visible, a.length);
    const float* x = read_row<Element>(a.input, row, a.length, count, input);
    LaneMax largest;
    const auto read = [&](const auto& masked) {
      for_visible(visible, a.length, [&](int64_t first, int lanes, int seen) {
#pragma omp simd
        for (int lane = 0; lane < lanes; ++lane) {
          const float logit = a.scale * x[first + lane];
          const float shown = masked(first + lane) | (lane >= seen) ? -INFINITY : logit;
          z[first + lane] = shown;
          largest.lanes[lane] = shown > largest.lanes[lane] ? shown : largest.lanes[lane];
        }
      });
    };
    if (mask && !a.mask.one_column) read([=](int64_t i) { return mask[i] != 0; });
    else read([](int64_t) { return false; });
    const float shift = softmax_shift(largest.total());
    // Lanes beyond the row, so that there are whole blocks: an exponential is dear where it is no vector.
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = count; i < padded; ++i) z[i] = -INFINITY;
    LaneSum sum;
    along(padded, [&](int64_t i, int lane) {
      z[i] = exponential(z[i] - shift);
      sum.lanes[lane] += z[i];
    });
    const float factor = softmax_factor(sum.total());
    float* y = output.values(row);
    for_visible(visible, a.length, [&](int64_t first, int lanes, int seen) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) y[first + lane] = lane < seen ? z[first + lane] * factor : 0;
    });
    output.done(row, count);
  }
}

template <class Element>
void backward_rows(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  const Buffer gradient(a.length), output(a.length);
  const Results<Element> input_gradient(a.input_gradient, a.rows, a.length);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t visible = softmax_visible(a, row), count = covered(visible, a.length);
    const float* dy = read_row<Element>(a.gradient, row, a.length, count, gradient);
    const float* y = read_row<Element>(a.output, row, a.length, count, output);
    LaneSum y_dy;
    for_visible(visible, a.length, [&](int64_t first, int lanes, int seen) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane)
        y_dy.lanes[lane] += lane < seen ? y[first + lane] * dy[first + lane] : 0;
    });
    const float sum_y_dy = y_dy.total();
    float* dx = input_gradient.values(row);
    for_visible(visible, a.length, [&](int64_t first, int lanes, int seen) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) {
        const float slope = softmax_gradient(y[first + lane], dy[first + lane], sum_y_dy, a.scale);
        dx[first + lane] = lane < seen ? slope : 0;
      }
    });
    input_gradient.done(row, count);
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
