// What the CPU kernels of AdamW share: blocks of a list of tensors dealt out to threads, parameters as fp32.

#pragma once

#include "adamw/adamw.h"
#include "base/cpu.h"

namespace megatron_lite::cpu {
namespace {

// Calls body(tensor, first element, elements) on blocks of `size` elements of all tensors.
template <class OfTensor, class Body>
void for_blocks(const Context& context, const OfTensor* tensors, int64_t blocks, int64_t size, const Body& body) {
  for_ranges(context, blocks, 1 + 16384 / size, [&](int64_t begin, int64_t end) {
    const OfTensor* tensor = tensors;
    for (int64_t block = begin; block < end; ++block) {
      while ((block - tensor->first_block) * size >= tensor->length) ++tensor;
      const int64_t first = (block - tensor->first_block) * size, rest = tensor->length - first;
      body(*tensor, first, rest < size ? rest : size);
    }
  });
}

inline const float* widened(Dtype dtype, const void* from, int64_t first, float* buffer, int64_t count) {
  const float* values = nullptr;
  with_element(dtype, [&](auto element) {
    values = widened(static_cast<const decltype(element)*>(from) + first, buffer, count);
  });
  return values;
}

// Calls body(values) on elements as fp32, which it may change.
template <class Body>
void updated(Dtype dtype, void* elements, int64_t first, int64_t count, float* buffer, const Body& body) {
  if (dtype == Dtype::float32) return body(static_cast<float*>(elements) + first);
  widened(dtype, elements, first, buffer, count);
  body(buffer);
  with_element(dtype, [&](auto element) {
    narrow(buffer, static_cast<decltype(element)*>(elements) + first, count);
  });
}

}  // namespace
}  // namespace megatron_lite::cpu
