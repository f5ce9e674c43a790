#include "l2_norm/l2_norm.h"

#include "base/cpu.h"

namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET {
namespace {

template <class Element>
double squares(const L2NormTensor& tensor, int64_t chunk) {
  const int64_t begin = chunk * kL2NormChunk, rest = tensor.length - begin;
  const int64_t end = begin + (rest < kL2NormChunk ? rest : kL2NormChunk);
  alignas(64) float buffer[kL2NormBlock];
  double sum = 0;
  for (int64_t at = begin; at < end; at += kL2NormBlock) {
    const int64_t count = end - at < kL2NormBlock ? end - at : kL2NormBlock;
    const float* x = widened(static_cast<const Element*>(tensor.data) + at, buffer, count);
    LaneSum block;
    along(count, [&](int64_t i, int lane) { block.lanes[lane] += x[i] * x[i]; });
    sum += block.total();
  }
  return sum;
}

}  // namespace

Status launch(const Context& context, const L2Norm& a) {
  for (int64_t tensor = 0; tensor < a.count; ++tensor) {
    const L2NormTensor& of = a.tensors[tensor];
    const Status status = with_element(of.dtype, [&](auto element) {
      for_ranges(context, l2_norm_chunks(of.length), 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk)
          a.partials[of.first_chunk + chunk] = squares<decltype(element)>(of, chunk);
      });
    });
    if (status) return status;
  }
  double sum = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += a.partials[chunk];
  *a.norm = static_cast<float>(std::sqrt(sum));
  return kSuccess;
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
