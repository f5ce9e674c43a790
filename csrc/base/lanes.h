// Rows in blocks of kLanes elements, held as fp32 in vector registers while they are widened, computed on and narrowed.
//
// Vectors are the compiler's own, as wide as the instruction set's: what stays in registers is said, not hoped for.
// Memory is kept busy a row ahead: a pass asks, block by block, for the next row of what it reads or writes. All at
// once, that would fill the buffers that outstanding lines wait in and stop the pass; not at all, a row would begin
// with waiting, since processors' own prefetching ends at each page.

#pragma once

#include "base/cpu.h"

#define MEGATRON_LITE_LANES inline __attribute__((always_inline))

namespace megatron_lite::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Numbers __attribute__((vector_size(kWidth * sizeof(int32_t))));

// kLanes values; arithmetic is lane by lane, and a float stands for as many of itself.
struct Lanes {
  static constexpr int kVectors = kLanes / kWidth;

  Vector vectors[kVectors];

  static MEGATRON_LITE_LANES Lanes of(float value) {
    return made([=](int) { return value - Vector{}; });  // not +, which would lose the sign of -0
  }

  // Calls vector(index) for each.
  template <class Made>
  static MEGATRON_LITE_LANES Lanes made(const Made& vector) {
    Lanes result;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) result.vectors[i] = vector(i);
    return result;
  }

  MEGATRON_LITE_LANES Lanes& operator+=(const Lanes& other);
};

MEGATRON_LITE_LANES Lanes operator+(const Lanes& a, const Lanes& b) {
  return Lanes::made([&](int i) { return a.vectors[i] + b.vectors[i]; });
}
MEGATRON_LITE_LANES Lanes operator-(const Lanes& a, const Lanes& b) {
  return Lanes::made([&](int i) { return a.vectors[i] - b.vectors[i]; });
}
MEGATRON_LITE_LANES Lanes operator*(const Lanes& a, const Lanes& b) {
  return Lanes::made([&](int i) { return a.vectors[i] * b.vectors[i]; });
}
MEGATRON_LITE_LANES Lanes operator-(const Lanes& a, float b) { return a - Lanes::of(b); }
MEGATRON_LITE_LANES Lanes operator*(const Lanes& a, float b) { return a * Lanes::of(b); }
MEGATRON_LITE_LANES Lanes operator*(float a, const Lanes& b) { return Lanes::of(a) * b; }
MEGATRON_LITE_LANES Lanes& Lanes::operator+=(const Lanes& other) { return *this = *this + other; }

// How many elements a block has: so many, a constant, or at the end of a row an int.
struct AllLanes {
  constexpr operator int() const { return kLanes; }
};

// Calls body(begin, count) on the blocks of a row.
template <class Body>
MEGATRON_LITE_LANES void for_lanes(int64_t length, const Body& body) {
  const int64_t whole = length - length % kLanes;
  for (int64_t begin = 0; begin < whole; begin += kLanes) body(begin, AllLanes());
  if (whole < length) body(whole, static_cast<int>(length - whole));
}

MEGATRON_LITE_LANES Lanes loaded(const float* from) {
  return Lanes::made([=](int i) {
    Vector vector;
    std::memcpy(&vector, from + i * kWidth, sizeof vector);
    return vector;
  });
}

MEGATRON_LITE_LANES void put(const Lanes& lanes, float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Lanes::kVectors; ++i) std::memcpy(to + i * kWidth, &lanes.vectors[i], sizeof(Vector));
}

// The first lanes, and `beyond` for the others.
MEGATRON_LITE_LANES Lanes first_of(const Lanes& lanes, int count, float beyond = 0) {
  Numbers number;
  for (int i = 0; i < kWidth; ++i) number[i] = i;
  const Vector others = Vector{} + beyond;
  return Lanes::made([&](int i) { return number + i * kWidth < count ? lanes.vectors[i] : others; });
}

// The larger lanes; a NaN of `a` is passed over.
MEGATRON_LITE_LANES Lanes larger(const Lanes& a, const Lanes& b) {
  return Lanes::made([&](int i) { return a.vectors[i] > b.vectors[i] ? a.vectors[i] : b.vectors[i]; });
}

// The lanes added up, in the order of LaneSum.
MEGATRON_LITE_LANES float total(const Lanes& lanes) {
  LaneSum sum;
  put(lanes, sum.lanes);
  return sum.total();
}

MEGATRON_LITE_LANES float largest(const Lanes& lanes) {
  LaneMax most;
  put(lanes, most.lanes);
  return most.total();
}

// A block of a row; lanes beyond the row's end are `beyond`.
template <class Element>
MEGATRON_LITE_LANES Lanes read(const Element* from, AllLanes count, float = 0) {
  alignas(64) float values[kLanes];
  widen(from, values, count);
  return loaded(values);
}

MEGATRON_LITE_LANES Lanes read(const float* from, AllLanes, float = 0) { return loaded(from); }

// The end of a row, where there is one, is long code wherever it is put: functions of its own, compiled once.
template <class Element>
__attribute__((noinline)) void widen_end(const Element* from, float* values, int count, float beyond) {
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = beyond;
  widen(from, values, count);
}

template <class Element>
__attribute__((noinline)) void narrow_end(const float* values, Element* to, int count) {
  narrow(values, to, count);
}

template <class Element>
MEGATRON_LITE_LANES Lanes read(const Element* from, int count, float beyond = 0) {
  alignas(64) float values[kLanes];
  widen_end(from, values, count, beyond);
  return loaded(values);
}

// The same of a tensor read for the first time: asks for the block of its next row.
template <class Element, class Count>
MEGATRON_LITE_LANES Lanes read_on(const Element* from, int64_t length, Count count, float beyond = 0) {
  prefetch(from + length, count);
  return read(from, count, beyond);
}

template <class Element>
MEGATRON_LITE_LANES void write(const Lanes& lanes, Element* to, AllLanes count) {
  alignas(64) float values[kLanes];
  put(lanes, values);
  narrow(values, to, count);
}

MEGATRON_LITE_LANES void write(const Lanes& lanes, float* to, AllLanes) { put(lanes, to); }

template <class Element>
MEGATRON_LITE_LANES void write(const Lanes& lanes, Element* to, int count) {
  alignas(64) float values[kLanes];
  put(lanes, values);
  narrow_end(values, to, count);
}

// The same of a result: asks for the block of its next row.
template <class Element, class Count>
MEGATRON_LITE_LANES void write_on(const Lanes& lanes, Element* to, int64_t length, Count count) {
  prefetch(to + length, count);
  write(lanes, to, count);
}

// sum = input + residual, of one row.
template <class Element>
void add_row(const Element* input, const Element* residual, Element* sum, int64_t length) {
  for_lanes(length, [=](int64_t at, auto count) {
    write_on(read_on(input + at, length, count) + read_on(residual + at, length, count), sum + at, length, count);
  });
}

}  // namespace
}  // namespace megatron_lite::cpu
