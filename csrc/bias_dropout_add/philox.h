// Philox-4x32 (Salmon et al. 2011): four words that are a function of a counter and a key, and of nothing else.
// Seven rounds, the fewest that pass BigCrush there.

#pragma once

#include "base/launch.h"

namespace megatron_lite {

struct PhiloxWords {
  uint32_t a, b, c, d;
};

MEGATRON_LITE_INLINE PhiloxWords philox(uint64_t counter, uint64_t key) {
  PhiloxWords words{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * words.a;
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * words.c;
    words = {static_cast<uint32_t>(second >> 32) ^ words.b ^ low_key, static_cast<uint32_t>(second),
             static_cast<uint32_t>(first >> 32) ^ words.d ^ high_key, static_cast<uint32_t>(first)};
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return words;
}

}  // namespace megatron_lite
