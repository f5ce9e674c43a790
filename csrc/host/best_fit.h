// Best-fit decreasing: which items share a bin of a given capacity. The same bins as megatron_lite/data/pack.py, which
// says more, for 10^7 items in less than a second.

#pragma once

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace megatron_lite {

// A set of numbers up to a largest one that finds its smallest member from some number on: a bit each, and a bit for
// each word of 64 that is not empty, and so on upwards.
class NumberSet {
 public:
  explicit NumberSet(uint32_t largest) {
    do levels_.emplace_back((largest >>= 6) + 1, 0);
    while (largest);
  }

  void insert(uint32_t number) {
    for (auto& level : levels_) {
      level[number >> 6] |= uint64_t{1} << (number & 63);
      number >>= 6;
    }
  }

  void erase(uint32_t number) {
    for (auto& level : levels_) {
      if (level[number >> 6] &= ~(uint64_t{1} << (number & 63))) return;
      number >>= 6;
    }
  }

  // -1 if there is none.
  int64_t first_from(uint32_t number) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      if (number >> 6 >= levels_[height].size()) return -1;
      const uint64_t word = levels_[height][number >> 6] & (~uint64_t{0} << (number & 63));
      if (word) {
        number = (number & ~63u) | std::countr_zero(word);
        while (height--) number = number << 6 | std::countr_zero(levels_[height][number]);
        return number;
      }
      number = (number >> 6) + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

struct Bins {
  std::vector<int32_t> items;   // of all bins one after another, ascending in each
  std::vector<int32_t> starts;  // where the items of a bin begin, closed by their number
};

inline Bins best_fit(const int32_t* sizes, int32_t count, int32_t capacity) {
  std::vector<int32_t> behind(capacity + 2, 0);
  for (int32_t i = 0; i < count; ++i) {
    if (sizes[i] < 1 || sizes[i] > capacity) throw std::invalid_argument("an item is empty or larger than a bin");
    ++behind[capacity - sizes[i] + 1];
  }
  for (int32_t i = 0; i <= capacity; ++i) behind[i + 1] += behind[i];
  std::vector<int32_t> items(count);
  for (int32_t i = 0; i < count; ++i) items[behind[capacity - sizes[i]]++] = i;

  // Bins of the same room lie on a stack, the newest on top.
  std::vector<int32_t> top(capacity + 1, -1), below, starts{0}, bin_of(count);
  NumberSet rooms(capacity);
  for (const int32_t item : items) {
    const int64_t found = rooms.first_from(sizes[item]);
    int32_t bin, room;
    if (found < 0) {
      bin = static_cast<int32_t>(below.size());
      room = capacity;
      below.push_back(-1);
      starts.push_back(0);
    } else {
      room = static_cast<int32_t>(found);
      bin = top[room];
      if ((top[room] = below[bin]) < 0) rooms.erase(room);
    }
    bin_of[item] = bin;
    ++starts[bin + 1];
    if (room -= sizes[item]) {
      if (top[room] < 0) rooms.insert(room);
      below[bin] = top[room];
      top[room] = bin;
    }
  }
  for (size_t bin = 1; bin < starts.size(); ++bin) starts[bin] += starts[bin - 1];
  // `below` is done with: it says from here on where the next item of each bin goes.
  below.assign(starts.begin(), starts.end() - 1);
  for (int32_t item = 0; item < count; ++item) items[below[bin_of[item]]++] = item;
  return {std::move(items), std::move(starts)};
}

}  // namespace megatron_lite
