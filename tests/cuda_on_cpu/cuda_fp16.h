#pragma once

#include "base/cpu.h"

struct __half { uint16_t bits; };

inline float __half2float(__half element) { return megatron_lite::cpu::load(megatron_lite::cpu::Float16{element.bits}); }

inline __half __float2half_rn(float value) {
  megatron_lite::cpu::Float16 element;
  megatron_lite::cpu::store(element, value);
  return {element.bits};
}
