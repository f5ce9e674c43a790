// The instructions that compilers do not make of plain vectors, by their names. <immintrin.h> has them too, and takes a
// third of a second to read, once for each kernel and instruction set.

#pragma once

#include <cstdint>

#if defined(__SSE2__)

namespace megatron_lite::cpu {
namespace {

// The products of the low halves of 64-bit lanes.
template <class Words>
inline Words low_product(Words a, Words b) {
#if defined(__AVX__)
  Words product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
  return product;
#else
  asm("pmuludq %1, %0" : "+x"(a) : "x"(b));
  return a;
#endif
}

#if defined(__AVX__)
typedef float Streamed __attribute__((vector_size(32), may_alias));

// Stores past the caches, to a whole unit.
inline void store_streamed(Streamed value, Streamed* to) {
#if defined(__clang__)
  __builtin_nontemporal_store(value, to);
#else
  __builtin_ia32_movntps256(reinterpret_cast<float*>(to), value);
#endif
}

// Makes streamed stores seen before anything that this thread stores afterwards; ordinary ones alone keep their order.
inline void finish_streamed() { asm volatile("sfence" : : : "memory"); }
#endif

#if defined(__AVX512F__)
constexpr int kHalves = 16;
#else
constexpr int kHalves = 8;
#endif

typedef uint16_t Halves __attribute__((vector_size(2 * kHalves)));
typedef float Floats __attribute__((vector_size(4 * kHalves)));
typedef uint32_t FloatBits __attribute__((vector_size(4 * kHalves)));

#if defined(__F16C__) || defined(__AVX512F__)
inline Floats from_float16(Halves halves) {
  Floats values;
  asm("vcvtph2ps %1, %0" : "=v"(values) : "v"(halves));
  return values;
}

// To nearest, ties to even.
inline Halves to_float16(Floats values) {
  Halves halves;
  asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(values));
  return halves;
}
#endif

#if defined(__AVX512F__)
inline FloatBits extended(Halves halves) {
  FloatBits words;
  asm("vpmovzxwd %1, %0" : "=v"(words) : "v"(halves));
  return words;
}

inline Halves low_halves(FloatBits words) {
  Halves halves;
  asm("vpmovdw %1, %0" : "=v"(halves) : "v"(words));
  return halves;
}

// A bit for each value that is denormal.
inline uint16_t denormal_among(Floats values) {
  uint16_t found;
  asm("vfpclassps $0x20, %1, %0" : "=k"(found) : "v"(values));
  return found;
}

// To nearest, ties to even, on newer processors alone; denormal values become 0. Volatile keeps it behind the test
// for such a processor.
inline Halves to_bfloat16_flushing(Floats values) {
  Halves halves;
  asm volatile("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(values));
  return halves;
}
#endif

}  // namespace
}  // namespace megatron_lite::cpu

#endif
