// Stores past the caches. A result larger than they are has left them before anyone reads it, and a line that need not
// be loaded before it is overwritten is a third less to move.

#pragma once

#include "base/cpu.h"

namespace megatron_lite::cpu {
namespace {

constexpr int64_t kStreamUnit = 32;
#if defined(__AVX__)
constexpr int64_t kStreamed = int64_t{8} << 20;  // bytes: several times the cache that a core has for itself
#else
constexpr int64_t kStreamed = INT64_MAX;
#endif

// Whether so many rows of `bytes` are worth it, and all begin at a whole unit.
inline bool streams(const void* rows, int64_t count, int64_t bytes) {
  return count * bytes >= kStreamed && reinterpret_cast<uintptr_t>(rows) % kStreamUnit == 0 && bytes % kStreamUnit == 0;
}

#if defined(__AVX__)
// Stores the first `filled` bytes of a row from an aligned buffer, and zeros for the rest; both are whole units.
inline void stream(const void* buffer, int64_t filled, void* row, int64_t bytes) {
  const auto* from = static_cast<const Streamed*>(buffer);
  auto* to = static_cast<Streamed*>(row);
  for (const auto* end = from + filled / kStreamUnit; from < end;) store_streamed(*from++, to++);
  for (const auto* end = static_cast<Streamed*>(row) + bytes / kStreamUnit; to < end;) store_streamed(Streamed{}, to++);
}
#else
inline void stream(const void*, int64_t, void*, int64_t) {}
inline void finish_streamed() {}
#endif

}  // namespace
}  // namespace megatron_lite::cpu
