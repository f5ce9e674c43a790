// What element-wise CPU kernels share: rows taken in strips short enough that their fp32 buffers stay in the
// nearest cache, however long the row.

#pragma once

#include "base/cpu.h"

namespace megatron_lite::cpu {
namespace {

constexpr int64_t kStrip = 1024;

// The strip of an element-wise loop: short enough that a processor, by the instructions it holds in flight, loads the
// next while it computes on this one. No prefetch did better.
constexpr int64_t kShortStrip = 128;

// Calls body(begin, count) on the strips of [0, length).
template <int64_t kLength = kStrip, class Body>
inline __attribute__((always_inline)) void for_strips(int64_t length, const Body& body) {
  for (int64_t begin = 0; begin < length; begin += kLength)
    body(begin, length - begin < kLength ? length - begin : kLength);
}

// Reads up to kStrip elements as fp32; what it gives holds until the next are read.
template <class Element>
class StripReader {
 public:
  const float* operator()(const void* elements, int64_t begin, int64_t count) {
    return widened(static_cast<const Element*>(elements) + begin, buffer_, count);
  }

 private:
  alignas(64) float buffer_[sizeof(Element) == sizeof(float) ? 1 : kStrip];
};

// Writes up to kStrip elements as fp32: fill what `strip` gives, then call `done`.
template <class Element>
class StripWriter {
 public:
  float* strip(void*, int64_t) { return buffer_; }
  void done(void* elements, int64_t begin, int64_t count) const {
    narrow(buffer_, static_cast<Element*>(elements) + begin, count);
  }

 private:
  alignas(64) float buffer_[kStrip];
};

template <>
class StripWriter<float> {
 public:
  float* strip(void* elements, int64_t begin) const { return static_cast<float*>(elements) + begin; }
  void done(void*, int64_t, int64_t) const {}
};

}  // namespace
}  // namespace megatron_lite::cpu
