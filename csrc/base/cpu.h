// What CPU kernels share: 16-bit elements as arithmetic on bits, which compilers turn into vector code for
// any instruction set, and rows dealt out to threads.
//
// A file that includes this is compiled once per instruction set with MEGATRON_LITE_INSTRUCTION_SET naming
// the namespace of its launchers. All else in it must be static or in an unnamed namespace (see launch.h);
// templates of the standard library would be merged across sets by the linker, so there are none.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/launch.h"

namespace megatron_lite::cpu {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

MEGATRON_LITE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MEGATRON_LITE_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MEGATRON_LITE_INLINE float load(float element) { return element; }

MEGATRON_LITE_INLINE float load(BFloat16 element) { return float_of(static_cast<uint32_t>(element.bits) << 16); }

// Exponent and fraction move to their fp32 places; the product mends the bias and makes denormals normal.
MEGATRON_LITE_INLINE float load(Float16 element) {
  const uint32_t magnitude = static_cast<uint32_t>(element.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(element.bits & 0x8000) << 16;
  const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : scaled));
}

MEGATRON_LITE_INLINE void store(float& element, float value) { element = value; }

// To nearest, ties to even; a NaN stays one.
MEGATRON_LITE_INLINE void store(BFloat16& element, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  element.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// To nearest, ties to even. A normal result rounds as bits; for a denormal one, adding 1/2 leaves its 10 bits at
// the bottom of the sum, rounded by the addition. From 65,520 on it is infinite.
MEGATRON_LITE_INLINE void store(Float16& element, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < 0x38800000 ? denormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;
  result = magnitude > 0x7f800000 ? 0x7e00 : result;
  element.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000));
}

// The value as an element would hold it.
template <class Element>
MEGATRON_LITE_INLINE float rounded(float value) {
  Element element;
  store(element, value);
  return load(element);
}

// Calls body(index) for every index below count, on the context's threads, at least `grain` on each.
template <class Body>
static inline void for_each(const Context& context, int64_t count, int64_t grain, const Body& body) {
  if (count == 0) return;
  context.parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* state) {
        for (int64_t index = begin; index < end; ++index) (*static_cast<const Body*>(state))(index);
      },
      const_cast<Body*>(&body));
}

// As many rows as are worth a thread: some 16,384 elements.
MEGATRON_LITE_INLINE int64_t row_grain(int64_t length) { return 1 + 16384 / (length + 1); }

// Adds the lines of a [parts, length] buffer in order (the first line is overwritten) and rounds once.
template <class Element>
static inline void sum_parts(const Context& context, float* partials, int64_t parts, int64_t length, Element* result) {
  constexpr int64_t kColumns = 512;
  for_each(context, (length + kColumns - 1) / kColumns, 1 + 32768 / (parts * kColumns), [&](int64_t block) {
    float* sums = partials + block * kColumns;
    const int64_t columns = block * kColumns + kColumns <= length ? kColumns : length - block * kColumns;
    for (int64_t part = 1; part < parts; ++part) {
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sums[i] += sums[part * length + i];
    }
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(result[block * kColumns + i], sums[i]);
  });
}

// Calls run(Element()) with the type that a dtype code stands for.
template <class Run>
static inline Status with_element(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::float32: run(float()); return kSuccess;
    case Dtype::bfloat16: run(BFloat16()); return kSuccess;
    case Dtype::float16: run(Float16()); return kSuccess;
  }
  return kUnknownDtype;
}

}  // namespace megatron_lite::cpu
