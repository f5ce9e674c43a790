// CRC-32 of IEEE 802.3 (zlib's, of gzip and PNG), on x86-64 by carry-less multiplication: what 64 bytes further on is
// added to a remainder after multiplying it by the power of x that lies between (Gopal et al. 2009, "Fast CRC
// Computation for Generic Polynomials Using PCLMULQDQ Instruction"; bits are reflected, so powers are one lower).

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace megatron_lite {

constexpr std::array<uint32_t, 256> crc32_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t remainder = byte;
    for (int bit = 0; bit < 8; ++bit) remainder = remainder >> 1 ^ (remainder & 1 ? 0xEDB88320u : 0);
    table[byte] = remainder;
  }
  return table;
}

inline uint32_t crc32_bytes(uint32_t remainder, const unsigned char* data, size_t size) {
  static constexpr std::array<uint32_t, 256> table = crc32_table();
  for (size_t i = 0; i < size; ++i) remainder = remainder >> 8 ^ table[(remainder ^ data[i]) & 0xFF];
  return remainder;
}

#if defined(__x86_64__)

inline bool has_carryless_multiply() {
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

// `size` is a multiple of 16 and at least 64.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t crc32_blocks(uint32_t remainder, const unsigned char* data,
                                                                      size_t size) {
  const auto load = [](const unsigned char* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  // Remainders modulo the polynomial of x^(64 * 8 + 32), x^(64 * 8 - 32); of x^(128 + 32), x^(128 - 32); of x^64.
  const __m128i over_64_bytes = _mm_set_epi64x(0x1C6E41596, 0x154442BD4);
  const __m128i over_16_bytes = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);
  const __m128i over_8_bytes = _mm_set_epi64x(0, 0x163CD6124);
  // The polynomial, and the quotient of x^64 by it.
  const __m128i barrett = _mm_set_epi64x(0x1F7011641, 0x1DB710641);
  const __m128i low_words = _mm_setr_epi32(-1, 0, -1, 0);
#define MEGATRON_LITE_FOLD(sum, powers, next)                                                             \
  _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(sum, powers, 0x00), _mm_clmulepi64_si128(sum, powers, 0x11)), next)

  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(remainder)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = MEGATRON_LITE_FOLD(a, over_64_bytes, load(data));
    b = MEGATRON_LITE_FOLD(b, over_64_bytes, load(data + 16));
    c = MEGATRON_LITE_FOLD(c, over_64_bytes, load(data + 32));
    d = MEGATRON_LITE_FOLD(d, over_64_bytes, load(data + 48));
  }
  b = MEGATRON_LITE_FOLD(a, over_16_bytes, b);
  c = MEGATRON_LITE_FOLD(b, over_16_bytes, c);
  d = MEGATRON_LITE_FOLD(c, over_16_bytes, d);
  for (; size >= 16; data += 16, size -= 16) d = MEGATRON_LITE_FOLD(d, over_16_bytes, load(data));
#undef MEGATRON_LITE_FOLD

  // 128 bits to 64, and those to 32 by Barrett's reduction.
  d = _mm_xor_si128(_mm_srli_si128(d, 8), _mm_clmulepi64_si128(d, over_16_bytes, 0x10));
  d = _mm_xor_si128(_mm_srli_si128(d, 4), _mm_clmulepi64_si128(_mm_and_si128(d, low_words), over_8_bytes, 0x00));
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(d, low_words), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(d, quotient), 1));
}

#endif

// The checksum of `size` bytes that follow others whose checksum is `value`; 0 where none do.
inline uint32_t crc32(uint32_t value, const unsigned char* data, size_t size) {
  uint32_t remainder = ~value;
#if defined(__x86_64__)
  static const bool folds = has_carryless_multiply();
  if (folds && size >= 64) {
    const size_t blocks = size / 16 * 16;
    remainder = crc32_blocks(remainder, data, blocks);
    data += blocks, size -= blocks;
  }
#endif
  return ~crc32_bytes(remainder, data, size);
}

}  // namespace megatron_lite
