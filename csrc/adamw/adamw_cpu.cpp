#include "adamw/adamw_cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {

Status launch(const Context& context, const Adamw& a) {
  const AdamwRule rule = a.rule;
  for_blocks(context, a.tensors, a.blocks, kAdamwBlock, [&](const AdamwTensor& of, int64_t first, int64_t count) {
    alignas(64) float gradient_buffer[kAdamwBlock], buffer[kAdamwBlock];
    const float* g = widened(of.gradient_dtype, of.gradient, first, gradient_buffer, count);
    float *m = of.first_moment + first, *v = of.second_moment + first;
    updated(of.dtype, of.parameter, first, count, buffer, [=](float* p) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        m[i] = adamw_first_moment(rule, m[i], g[i]);
        v[i] = adamw_second_moment(rule, v[i], g[i]);
        p[i] = adamw_parameter(rule, p[i], m[i], std::sqrt(v[i]));
      }
    });
  });
  return kSuccess;
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
