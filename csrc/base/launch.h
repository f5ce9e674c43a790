// What every launcher is given besides its arguments, and how one is chosen.
//
// An operation states its arguments as a plain struct of pointers and sizes (fp32 scalars, int64 sizes, a
// dtype code). Each device has an overload `launch(context, arguments)`; for the CPU there is one per
// instruction set, since one source is compiled several times. Nothing here knows torch: the context
// brings what a launcher would otherwise ask of it.

#pragma once

#include <cstdint>

namespace megatron_lite {

enum class Dtype : int32_t { float32, bfloat16, float16 };

// 0 is success, a positive number a cudaError_t.
using Status = int32_t;
constexpr Status kSuccess = 0;
constexpr Status kUnknownDtype = -1;

namespace cpu {

// The caller's thread pool: calls body(begin, end, state) on disjoint ranges that cover [0, count), none but
// the last smaller than `grain`. Torch's own, so that torch.set_num_threads holds and no second pool spins.
struct Context {
  void (*parallel_for)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* state);
};

enum class InstructionSet : int32_t { baseline, avx2, avx512 };

// The widest set this processor has, or the one chosen by megatron_lite_choose_instruction_set.
InstructionSet instruction_set();

}  // namespace cpu

namespace cuda {

struct Context {
  void* stream;  // cudaStream_t
  int32_t multiprocessors;
};

}  // namespace cuda
}  // namespace megatron_lite

#if defined(__x86_64__)
#define MEGATRON_LITE_WIDE_LAUNCHERS(Arguments)                       \
  namespace avx2 { Status launch(const Context&, const Arguments&); } \
  namespace avx512 { Status launch(const Context&, const Arguments&); }
#define MEGATRON_LITE_CHOOSE_WIDE(context, arguments)                                  \
  if (instruction_set() == InstructionSet::avx512) return avx512::launch(context, arguments); \
  if (instruction_set() == InstructionSet::avx2) return avx2::launch(context, arguments);
#else
#define MEGATRON_LITE_WIDE_LAUNCHERS(Arguments)
#define MEGATRON_LITE_CHOOSE_WIDE(context, arguments)
#endif

// Declares launch(context, arguments) for both devices. To be used in namespace megatron_lite.
#define MEGATRON_LITE_LAUNCHERS(Arguments)                                        \
  namespace cpu {                                                                 \
  namespace baseline { Status launch(const Context&, const Arguments&); }         \
  MEGATRON_LITE_WIDE_LAUNCHERS(Arguments)                                         \
  inline Status launch(const Context& context, const Arguments& arguments) {      \
    MEGATRON_LITE_CHOOSE_WIDE(context, arguments)                                 \
    return baseline::launch(context, arguments);                                  \
  }                                                                               \
  }                                                                               \
  namespace cuda { Status launch(const Context&, const Arguments&); }

// A function both compilers take. Static: the same header is compiled for several instruction sets, and the
// linker must not merge a function of one with that of another, or an old processor meets new instructions.
#if defined(__CUDACC__)
#define MEGATRON_LITE_INLINE static __host__ __device__ __forceinline__
#else
#define MEGATRON_LITE_INLINE static inline __attribute__((always_inline))
#endif

namespace megatron_lite {

// A gradient that sums over rows (a norm's scale, a bias) is summed in an order that does not depend on the
// number of threads or blocks: rows are cut into `parts` that follow from the sizes, each part is summed in row
// order into its own line of an fp32 [parts, length] buffer, and the lines are added in order.
// This is where part `part` of `parts` begins.
MEGATRON_LITE_INLINE int64_t part_begin(int64_t rows, int64_t parts, int64_t part) {
  const int64_t remainder = rows % parts;
  return rows / parts * part + (part < remainder ? part : remainder);
}

namespace cuda {

// One part a block: two blocks fill a multiprocessor, one where a row takes 512 threads; at least eight rows each.
inline int64_t row_parts(int32_t multiprocessors, int64_t rows, int64_t row_bytes) {
  const int64_t most = static_cast<int64_t>(multiprocessors) * (row_bytes > 16384 ? 1 : 2), parts = rows / 8;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

}  // namespace cuda

}  // namespace megatron_lite
