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
  for_ranges(context, a.chunks, 1, [&](int64_t begin, int64_t end) {
    const L2NormTensor* of = a.tensors;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= of->first_chunk + l2_norm_chunks(of->length)) ++of;
      with_element(of->dtype, [&](auto element) {
        a.partials[chunk] = squares<decltype(element)>(*of, chunk - of->first_chunk);
      });
    }
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) sum += a.partials[chunk];
  *a.norm = static_cast<float>(std::sqrt(sum));
  return kSuccess;
}

}  // namespace megatron_lite::cpu::MEGATRON_LITE_INSTRUCTION_SET
