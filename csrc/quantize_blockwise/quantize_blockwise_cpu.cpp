#include "quantize_blockwise/quantize_blockwise_cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

constexpr int64_t kGrain = 64;  // blocks

}  // namespace

Status launch(const Context& context, const QuantizeBlockwise& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    for_ranges(context, quantize_blocks(a.length), kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) float buffer[kQuantizeBlock];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kQuantizeBlock, count = block_length(a.length, block);
        const float* values = widened(static_cast<const Element*>(a.input) + first, buffer, count);
        a.absmax[block] = largest_magnitude(values, count);
        quantize(a.is_signed, values, a.absmax[block], a.codes + first, count);
      }
    });
  });
}

Status launch(const Context& context, const DequantizeBlockwise& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    for_ranges(context, quantize_blocks(a.length), kGrain, [&](int64_t begin, int64_t end) {
      alignas(64) float values[kQuantizeBlock];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kQuantizeBlock, count = block_length(a.length, block);
        dequantize(a.is_signed, a.codes + first, a.absmax[block], values, count);
        narrow(values, static_cast<Element*>(a.output) + first, count);
      }
    });
  });
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
