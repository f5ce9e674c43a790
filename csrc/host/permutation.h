// A keyed permutation of 0 .. n - 1, computed and not stored: an alternating Feistel network over the bits of an
// index, walked until it falls below n (Black and Rogaway 2002). The same numbers as megatron_lite/data/order.py,
// which says more, some forty times as fast for one index.

#pragma once

#include <array>
#include <cstdint>

namespace megatron_lite {

inline uint32_t scramble(uint32_t value, uint32_t key) {
  value ^= key;
  value = (value ^ (value >> 16)) * 0x7FEB352Du;
  value = (value ^ (value >> 15)) * 0x846CA68Bu;
  return value ^ (value >> 16);
}

class Permutation {
 public:
  // Two 32-bit keys a round.
  Permutation(uint64_t n, const std::array<uint32_t, 16>& keys) : n_(n), keys_(keys) {
    int bits = 4;
    while (bits < 63 && (n - 1) >> bits) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
  }

  uint64_t operator()(uint64_t index) const {
    do index = network(index);
    while (index >= n_);
    return index;
  }

 private:
  uint64_t network(uint64_t index) const {
    uint64_t high = index >> low_bits_, low = index & low_mask_;
    for (int round = 0; round < 8; ++round) {
      const uint64_t before = keys_[2 * round], after = keys_[2 * round + 1];
      if (round % 2) high ^= (scramble(static_cast<uint32_t>(low), before) + after) & high_mask_;
      else low ^= (scramble(static_cast<uint32_t>(high), before) + after) & low_mask_;
    }
    return (high << low_bits_) | low;
  }

  uint64_t n_, low_mask_, high_mask_;
  int low_bits_;
  std::array<uint32_t, 16> keys_;
};

}  // namespace megatron_lite
