// Philox of many counters at once. A word is the low half of a 64-bit lane, where one instruction multiplies it; what
// is in the high half is never looked at. Compilers, left to themselves, move halves about for each product.

#pragma once

#include <cstring>

#include "base/instructions.h"
#include "bias_dropout_add/philox.h"

namespace megatron_lite::cpu {
namespace {

#if defined(__SSE2__)

#if defined(__AVX512F__)
constexpr int kCounters = 8;
#elif defined(__AVX2__)
constexpr int kCounters = 4;
#else
constexpr int kCounters = 2;
#endif

typedef uint64_t Words __attribute__((vector_size(8 * kCounters)));

// Words of two vectors by turns: the first half of them, or the second.
inline Words alternate(Words a, Words b, bool second) {
  Words order;
  for (int i = 0; i < kCounters; ++i) order[i] = i / 2 + (i % 2 + second) * kCounters - second * kCounters / 2;
  return __builtin_shuffle(a, b, order);
}

// Writes the four words of each of kCounters counters from `counter` on.
inline void philox_words(uint64_t counter, uint64_t key, uint32_t* words) {
  Words number;
  for (int i = 0; i < kCounters; ++i) number[i] = i;
  Words a = number + counter, b = a >> 32, c = {}, d = {};
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 7; ++round) {
    const Words first = low_product(a, Words{} + 0xD2511F53u), second = low_product(c, Words{} + 0xCD9E8D57u);
    a = (second >> 32) ^ b ^ low_key;
    b = second;
    c = (first >> 32) ^ d ^ high_key;
    d = first;
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  const Words front = (a & 0xffffffffu) | (b << 32), back = (c & 0xffffffffu) | (d << 32);
  const Words halves[] = {alternate(front, back, false), alternate(front, back, true)};
  std::memcpy(words, halves, sizeof halves);
}

#else

constexpr int kCounters = 1;

inline void philox_words(uint64_t counter, uint64_t key, uint32_t* words) {
  const PhiloxWords drawn = philox(counter, key);
  std::memcpy(words, &drawn, sizeof drawn);
}

#endif

}  // namespace
}  // namespace megatron_lite::cpu
