#include <atomic>
#include <cstring>

#include "base/launch.h"

namespace megatron_lite::cpu {
namespace {

InstructionSet widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
std::atomic<InstructionSet> chosen{widest()};

}  // namespace

InstructionSet instruction_set() { return chosen.load(std::memory_order_relaxed); }

}  // namespace megatron_lite::cpu

#define MEGATRON_LITE_EXPORT extern "C" __attribute__((visibility("default")))

// The name of the set in use.
MEGATRON_LITE_EXPORT const char* megatron_lite_instruction_set() {
  return megatron_lite::cpu::kNames[static_cast<int>(megatron_lite::cpu::instruction_set())];
}

// Uses a named set from now on; 0, or -1 if the name is unknown or the processor lacks it.
MEGATRON_LITE_EXPORT int megatron_lite_choose_instruction_set(const char* name) {
  using namespace megatron_lite::cpu;
  for (int set = 0; set <= static_cast<int>(widest()); ++set)
    if (std::strcmp(name, kNames[set]) == 0) {
      chosen = static_cast<InstructionSet>(set);
      return 0;
    }
  return -1;
}
