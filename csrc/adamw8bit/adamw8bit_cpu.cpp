#include "adamw8bit/adamw8bit.h"

#include "adamw/adamw_cpu.h"
#include "quantize_blockwise/quantize_blockwise_cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

void keep_above_zero(const float* values, uint8_t* codes, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) codes[i] = codes[i] == 0 && values[i] > 0 ? 1 : codes[i];
}

}  // namespace

Status launch(const Context& context, const Adamw8bit& a) {
  const AdamwRule rule = a.rule;
  for_blocks(context, a.tensors, a.blocks, kQuantizeBlock, [&](const auto& of, int64_t first, int64_t count) {
    alignas(64) float gradient_buffer[kQuantizeBlock], buffer[kQuantizeBlock], m[kQuantizeBlock], v[kQuantizeBlock];
    const int64_t block = first / kQuantizeBlock;
    uint8_t *first_codes = of.first_codes + first, *second_codes = of.second_codes + first;
    const float* g = widened(of.gradient_dtype, of.gradient, first, gradient_buffer, count);
    dequantize(true, first_codes, of.first_absmax[block], m, count);
    dequantize(false, second_codes, of.second_absmax[block], v, count);
    updated(of.dtype, of.parameter, first, count, buffer, [&](float* p) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        m[i] = adamw_first_moment(rule, m[i], g[i]);
        v[i] = adamw_second_moment(rule, v[i], g[i]);
        p[i] = adamw_parameter(rule, p[i], m[i], std::sqrt(v[i]));
      }
    });
    of.first_absmax[block] = largest_magnitude(m, count);
    of.second_absmax[block] = largest_magnitude(v, count);
    quantize(true, m, of.first_absmax[block], first_codes, count);
    quantize(false, v, of.second_absmax[block], second_codes, count);
    if (a.keep_second_moments) keep_above_zero(v, second_codes, count);
  });
  return kSuccess;
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
