// Gives torch's dispatcher the CPU implementations of operations that megatron_lite/kernels/ declares.

#include <algorithm>

#include "base/binding.h"
#include "adamw/adamw_bind.h"
#include "adamw8bit/adamw8bit_bind.h"
#include "bias_dropout_add/bias_dropout_add_bind.h"
#include "bias_gelu/bias_gelu_bind.h"
#include "cross_entropy/cross_entropy_bind.h"
#include "l2_norm/l2_norm_bind.h"
#include "layer_norm/layer_norm_bind.h"
#include "quantize_blockwise/quantize_blockwise_bind.h"
#include "rms_norm/rms_norm_bind.h"
#include "rotary/rotary_bind.h"
#include "softmax/softmax_bind.h"
#include "swiglu/swiglu_bind.h"

namespace megatron_lite {
namespace {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* state) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, state); });
}

struct Cpu {
  cpu::Context context{parallel_for};

  explicit Cpu(const Tensor&) {}

  // Enough for 128 threads; from 64 rows on, so that the lines of sums cost little beside the rows.
  static int64_t row_parts(const Tensor&, int64_t rows, int64_t) {
    return std::clamp<int64_t>(rows / 64, 1, 128);
  }

  static std::string explain(Status status) { return "status " + std::to_string(status); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megatron_lite, CPU, library) {
  register_adamw<Cpu>(library);
  register_adamw8bit<Cpu>(library);
  register_bias_dropout_add<Cpu>(library);
  register_bias_gelu<Cpu>(library);
  register_cross_entropy<Cpu>(library);
  register_l2_norm<Cpu>(library);
  register_layer_norm<Cpu>(library);
  register_quantize_blockwise<Cpu>(library);
  register_rms_norm<Cpu>(library);
  register_rotary<Cpu>(library);
  register_softmax<Cpu>(library);
  register_swiglu<Cpu>(library);
}

}  // namespace megatron_lite
