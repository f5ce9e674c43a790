// What CPU kernels share: rows as fp32, sums along a row, rows dealt out to threads.
//
// A file that includes this is compiled once per instruction set, with MEGATRON_LITE_INSTRUCTION_SET naming
// the namespace of its launchers. Everything else must be in an unnamed namespace (see launch.h); templates of
// the standard library would be merged across sets by the linker, so there are none.
//
// Kernels compute on fp32 alone: a 16-bit row is widened into a buffer that stays in cache, and narrowed from
// one. Loops over it are then plain code that the compiler turns into vectors of whatever width there is.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "base/instructions.h"
#include "base/launch.h"

namespace megatron_lite::cpu {
namespace {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float load(float element) { return element; }

inline float load(BFloat16 element) { return float_of(static_cast<uint32_t>(element.bits) << 16); }

// Exponent and fraction move to their fp32 places; the product mends the bias and makes denormals normal.
inline float load(Float16 element) {
  const uint32_t magnitude = static_cast<uint32_t>(element.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(element.bits & 0x8000) << 16;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
}

inline void store(float& element, float value) { element = value; }

// To nearest, ties to even; a NaN stays one. Not the processor's own instruction: that flushes denormals.
inline void store(BFloat16& element, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  element.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// To nearest, ties to even. A normal result rounds as bits; for a denormal one, adding 1/2 leaves its 10 bits at
// the bottom of the sum, rounded by the addition. From 65,520 on it is infinite.
inline void store(Float16& element, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < 0x38800000 ? denormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  element.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000));
}

inline void widen(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
inline void narrow(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

template <class Element>
void widen(const Element* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

template <class Element>
void narrow(const float* from, Element* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

// Compilers make vector code of the arithmetic above, ten instructions where the processor has one.
#if defined(__AVX512F__) || defined(__F16C__)
template <class Vector>
inline Vector vector_at(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void put_vector(Vector vector, void* to) {
  std::memcpy(to, &vector, sizeof vector);
}

inline void widen(const Float16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) put_vector(from_float16(vector_at<Halves>(from + i)), to + i);
  for (; i < count; ++i) to[i] = load(from[i]);
}

inline void narrow(const float* from, Float16* to, int64_t count) {
  int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) put_vector(to_float16(vector_at<Floats>(from + i)), to + i);
  for (; i < count; ++i) store(to[i], from[i]);
}
#endif

#if defined(__AVX512F__)
inline void widen(const BFloat16* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) put_vector(extended(vector_at<Halves>(from + i)) << 16, to + i);
  for (; i < count; ++i) to[i] = load(from[i]);
}

inline Halves rounded_to_bfloat16(Floats values) {
  const FloatBits bits = reinterpret_cast<FloatBits>(values), rounded = bits + 0x7fff + (bits >> 16 & 1);
  return low_halves((values != values ? bits | 0x400000 : rounded) >> 16);
}

// So many vectors by the instruction, if there is one and no value is denormal.
template <int kVectors>
inline __attribute__((always_inline)) void narrow_vectors(const float* from, BFloat16* to, bool has_instruction) {
  uint16_t denormal = 0;
  for (int i = 0; i < kVectors; ++i) denormal |= denormal_among(vector_at<Floats>(from + kHalves * i));
  const bool by_instruction = __builtin_expect(has_instruction && !denormal, 1);
  for (int i = 0; i < kVectors; ++i) {
    const Floats values = vector_at<Floats>(from + kHalves * i);
    put_vector(by_instruction ? to_bfloat16_flushing(values) : rounded_to_bfloat16(values), to + kHalves * i);
  }
}

inline void narrow(const float* from, BFloat16* to, int64_t count) {
  static const bool has_instruction = __builtin_cpu_supports("avx512bf16");
  const bool has = has_instruction;
  int64_t i = 0;
  for (; i + 4 * kHalves <= count; i += 4 * kHalves) narrow_vectors<4>(from + i, to + i, has);
  for (; i + kHalves <= count; i += kHalves) narrow_vectors<1>(from + i, to + i, has);
  for (; i < count; ++i) store(to[i], from[i]);
}
#endif

// Room for fp32 values, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() const { return data_; }

 private:
  float* data_;
};

// Elements as fp32: themselves if they are, else widened into a buffer.
inline const float* widened(const float* from, float*, int64_t) { return from; }

template <class Element>
const float* widened(const Element* from, float* buffer, int64_t count) {
  widen(from, buffer, count);
  return buffer;
}

// Asks for elements that are soon to be read. Beyond the end of memory that does nothing.
template <class Element>
void prefetch(const Element* elements, int64_t count) {
  const char* from = reinterpret_cast<const char*>(elements);
  for (int64_t offset = 0; offset < count * static_cast<int64_t>(sizeof(Element)); offset += 64)
    __builtin_prefetch(from + offset);
}

// What all rows share, a weight or a bias, as fp32; zeros where there is none.
template <class Element>
class Line {
 public:
  Line(const void* line, int64_t length) : values_(length) {
    if (line) widen(static_cast<const Element*>(line), values_.data(), length);
    else std::memset(values_.data(), 0, length * sizeof(float));
  }

  const float* data() const { return values_.data(); }

 private:
  Buffer values_;
};

// 1 / value of each of some values.
class Reciprocals {
 public:
  Reciprocals(const float* values, int64_t count) : buffer_(count) {
    float* data = buffer_.data();
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) data[i] = 1 / values[i];
  }

  const float* data() const { return buffer_.data(); }

 private:
  Buffer buffer_;
};

// A sum along a row, kept in 64 lanes: as many as fill the adders of the widest set, and the same number in
// every set, so that all add in one order.
constexpr int kLanes = 64;

// Leaves in lane 0 what the lanes come to, half of them added to the other half at each step; the widths are constants
// so that a step is one instruction.
template <int kWidth, class Combine>
inline __attribute__((always_inline)) void fold(float* lanes, const Combine& combine) {
#pragma omp simd
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = combine(lanes[lane], lanes[lane + kWidth]);
  if constexpr (kWidth > 1) fold<kWidth / 2>(lanes, combine);
}

struct LaneSum {
  float lanes[kLanes] = {};

  float total() {
    fold<kLanes / 2>(lanes, [](float left, float right) { return left + right; });
    return lanes[0];
  }
};

// The largest value along a row, in the same lanes. A NaN is passed over; -inf if there is nothing else.
struct LaneMax {
  float lanes[kLanes];

  LaneMax() {
    for (float& lane : lanes) lane = -INFINITY;
  }

  float total() {
    fold<kLanes / 2>(lanes, [](float left, float right) { return left > right ? left : right; });
    return lanes[0];
  }
};

// Calls body(index, lane) along a row; a body adds what it sums to lanes[lane].
template <class Body>
inline __attribute__((always_inline)) void along(int64_t length, const Body& body) {
  const int64_t whole = length - length % kLanes;
  for (int64_t begin = 0; begin < whole; begin += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(begin + lane, lane);
  }
#pragma omp simd
  for (int lane = 0; lane < static_cast<int>(length - whole); ++lane) body(whole + lane, lane);
}

// Calls body(begin, end) on ranges that cover [0, count), on the context's threads, at least `grain` on each.
template <class Body>
void for_ranges(const Context& context, int64_t count, int64_t grain, const Body& body) {
  if (count == 0) return;
  context.parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* state) { (*static_cast<const Body*>(state))(begin, end); },
      const_cast<Body*>(&body));
}

// As many rows as are worth a thread: some 16,384 elements.
inline int64_t row_grain(int64_t length) { return 1 + 16384 / (length + 1); }

// Sums rows into a line of a [parts, length] buffer: 16 rows by themselves, then that sum into the line, so that
// the error grows with neither number alone.
class ColumnSum {
 public:
  ColumnSum(float* line, int64_t length) : line_(line), group_(length), length_(length) {
    for (int64_t i = 0; i < length_; ++i) line_[i] = group_.data()[i] = 0;
  }
  ~ColumnSum() { flush(); }

  // What a row's values are added to.
  float* values() const { return group_.data(); }
  void row_done() {
    if (++rows_ % 16 == 0) flush();
  }

 private:
  void flush() {
    float* group = group_.data();
#pragma omp simd
    for (int64_t i = 0; i < length_; ++i) {
      line_[i] += group[i];
      group[i] = 0;
    }
  }

  float* line_;
  Buffer group_;
  int64_t length_, rows_ = 0;
};

// Adds the lines of a [parts, length] buffer in order, in fp64, and rounds once. Under 262,144 sums are not worth a
// second thread.
template <class Element>
void sum_parts(const Context& context, const float* partials, int64_t parts, int64_t length, void* result) {
  constexpr int64_t kColumns = 256;
  const int64_t blocks = (length + kColumns - 1) / kColumns, grain = 1 + 262144 / (parts * kColumns);
  for_ranges(context, blocks, grain, [=](int64_t from, int64_t to) {
    for (int64_t begin = from * kColumns; begin < to * kColumns; begin += kColumns) {
      const int64_t count = length - begin < kColumns ? length - begin : kColumns;
      double sums[kColumns] = {};
      float rounded[kColumns];
      for (int64_t part = 0; part < parts; ++part) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += partials[part * length + begin + i];
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) rounded[i] = static_cast<float>(sums[i]);
      narrow(rounded, static_cast<Element*>(result) + begin, count);
    }
  });
}

// Calls run(Element()) with the type that a dtype code stands for.
template <class Run>
Status with_element(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32: run(float()); return kSuccess;
    case Dtype::bfloat16: run(BFloat16()); return kSuccess;
    case Dtype::float16: run(Float16()); return kSuccess;
  }
  return kUnknownDtype;
}

}  // namespace
}  // namespace megatron_lite::cpu
