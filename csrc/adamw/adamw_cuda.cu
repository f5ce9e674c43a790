#include "adamw/adamw.cuh"

namespace megatron_lite::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int64_t kChunk = kThreads * kPack * 8;

// This thread's part of the elements from `begin` to `end`, so many at a time.
template <int kCount, class Element, class Gradient>
__device__ __forceinline__ void update(const AdamwTensor& of, const AdamwRule& rule, int64_t begin, int64_t end) {
  auto* parameters = static_cast<Element*>(of.parameter);
  const auto* gradients = static_cast<const Gradient*>(of.gradient);
  for (int64_t at = begin + threadIdx.x * kCount; at < end; at += kThreads * kCount) {
    const auto g = read_once<Gradient, kCount>(gradients + at);
    auto p = read_once<Element, kCount>(parameters + at);
    auto m = read_once<float, kCount>(of.first_moment + at), v = read_once<float, kCount>(of.second_moment + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      m.set(i, adamw_first_moment(rule, m[i], g[i]));
      v.set(i, adamw_second_moment(rule, v[i], g[i]));
      p.set(i, adamw_parameter(rule, p[i], m[i], sqrtf(v[i])));
    }
    write(of.first_moment + at, m);
    write(of.second_moment + at, v);
    write(parameters + at, p);
  }
}

template <class Element>
__device__ __forceinline__ bool aligned_packs(const void* elements) {
  return reinterpret_cast<uintptr_t>(elements) % sizeof(Pack<Element, kPack>) == 0;
}

template <class Element, class Gradient>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const Table<AdamwTensor> table, const AdamwRule rule) {
  const auto mine = table.mine();
  const AdamwTensor& of = mine.tensor;
  const int64_t begin = mine.chunk * kChunk, end = begin + kChunk < of.length ? begin + kChunk : of.length;
  const bool packs = aligned_packs<Element>(of.parameter) && aligned_packs<Gradient>(of.gradient) &&
                     aligned_packs<float>(of.first_moment) && aligned_packs<float>(of.second_moment);
  const int64_t packed = packs ? end - end % kPack : begin;
  update<kPack, Element, Gradient>(of, rule, begin, packed);
  update<1, Element, Gradient>(of, rule, packed, end);
}

}  // namespace

Status launch(const Context& context, const Adamw& a) {
  const auto update = [&](auto element, auto gradient, const auto& table, int64_t chunks) {
    update_kernel<decltype(element), decltype(gradient)>
        <<<grid_of(chunks), kThreads, 0, stream_of(context)>>>(table, a.rule);
  };
  return for_tables_of_pairs(a.tensors, a.count, kChunk, update);
}

}  // namespace megatron_lite::cuda
