#pragma once

#include "base/cpu.h"

struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 element) { return megatron_lite::cpu::load(megatron_lite::cpu::BFloat16{element.bits}); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  megatron_lite::cpu::BFloat16 element;
  megatron_lite::cpu::store(element, value);
  return {element.bits};
}
