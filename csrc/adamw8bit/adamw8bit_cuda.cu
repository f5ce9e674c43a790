#include "adamw8bit/adamw8bit.h"

#include "adamw/adamw.cuh"
#include "quantize_blockwise/quantize_blockwise.cuh"

namespace megatron_lite::cuda {
namespace {

// Blocks of codes that a block of threads takes, each warp every kWarps-th of them.
constexpr int64_t kChunkBlocks = 4 * kWarps;

template <class Element, class Gradient>
__global__ void __launch_bounds__(32 * kWarps)
    update_kernel(const Table<Adamw8bitTensor> table, const AdamwRule rule, bool keep) {
  const auto mine = table.mine();
  const Adamw8bitTensor& of = mine.tensor;
  auto* parameter = static_cast<Element*>(of.parameter);
  const auto* gradient = static_cast<const Gradient*>(of.gradient);
  const int64_t blocks = quantize_blocks(of.length), begin = mine.chunk * kChunkBlocks;
  const int64_t end = begin + kChunkBlocks < blocks ? begin + kChunkBlocks : blocks;
  for (int64_t block = begin + threadIdx.y; block < end; block += kWarps) {
    const int64_t first = block * kQuantizeBlock + threadIdx.x;
    const float first_absmax = of.first_absmax[block], second_absmax = of.second_absmax[block];
    float m[kLaneValues], v[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int64_t at = first + 32 * i;
      m[i] = v[i] = 0;
      if (at < of.length) {
        const float g = load(gradient[at]);
        m[i] = adamw_first_moment(rule, value_of<true>(of.first_codes[at], first_absmax), g);
        v[i] = adamw_second_moment(rule, value_of<false>(of.second_codes[at], second_absmax), g);
        store(parameter[at], adamw_parameter(rule, load(parameter[at]), m[i], sqrtf(v[i])));
      }
    }
    const float first_largest = largest_magnitude(m), second_largest = largest_magnitude(v);
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int64_t at = first + 32 * i;
      if (at < of.length) {
        const uint8_t code = code_of<false>(v[i], second_largest);
        of.first_codes[at] = code_of<true>(m[i], first_largest);
        of.second_codes[at] = keep && code == 0 && v[i] > 0 ? 1 : code;
      }
    }
    if (threadIdx.x == 0) {
      of.first_absmax[block] = first_largest;
      of.second_absmax[block] = second_largest;
    }
  }
}

}  // namespace

Status launch(const Context& context, const Adamw8bit& a) {
  constexpr int64_t kChunk = kChunkBlocks * kQuantizeBlock;
  const auto update = [&](auto element, auto gradient, const auto& table, int64_t chunks) {
    update_kernel<decltype(element), decltype(gradient)>
        <<<grid_of(chunks), dim3(32, kWarps), 0, stream_of(context)>>>(table, a.rule, a.keep_second_moments);
  };
  return for_tables_of_pairs(a.tensors, a.count, kChunk, update);
}

}  // namespace megatron_lite::cuda
