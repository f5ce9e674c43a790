#include "cross_entropy/cross_entropy.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

// A row is longer than what its threads hold: each takes a few packs at a time, all of them on their way at once.
template <class Element, int kPacks>
struct Columns {
  static constexpr int kCount = kWidth<Element, kPacks>, kAtOnce = kCount == 8 ? 2 : 4;

  int64_t index[kAtOnce];
  PackOf<Element, kPacks> packs[kAtOnce];

  __device__ __forceinline__ Columns(const Element* row, int64_t begin, int64_t end) {
#pragma unroll
    for (int at = 0; at < kAtOnce; ++at) {
      index[at] = begin + static_cast<int64_t>(at * blockDim.x + threadIdx.x) * kCount;
      packs[at] = index[at] < end ? read_once<Element, kCount>(row + index[at]) : PackOf<Element, kPacks>{};
    }
  }

  static __device__ __forceinline__ int64_t step() { return static_cast<int64_t>(blockDim.x) * kCount * kAtOnce; }
};

template <class Element, int kPacks>
__global__ void __launch_bounds__(512, 2) statistics_kernel(const CrossEntropyStatistics a) {
  using Part = Columns<Element, kPacks>;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const auto* logits = static_cast<const Element*>(a.logits) + row * a.length;
    float peak = -FLT_MAX, sums[2] = {};
    for (int64_t begin = 0; begin < a.held; begin += Part::step()) {
      const Part part(logits, begin, a.held);
      float raised = peak;
#pragma unroll
      for (int at = 0; at < Part::kAtOnce; ++at)
#pragma unroll
        for (int i = 0; i < Part::kCount; ++i)
          if (part.index[at] + i < a.held) raised = fmaxf(raised, part.packs[at][i]);
      sums[0] *= exponential(peak - raised);
      peak = raised;
#pragma unroll
      for (int at = 0; at < Part::kAtOnce; ++at)
#pragma unroll
        for (int i = 0; i < Part::kCount; ++i) {
          const bool here = part.index[at] + i < a.held;
          sums[0] += here ? exponential(part.packs[at][i] - peak) : 0.0f;
          sums[1] += here ? part.packs[at][i] : 0.0f;
        }
    }
    const float largest = row_largest(peak);
    sums[0] *= exponential(peak - largest);
    row_sums(sums);
    if (threadIdx.x == 0) {
      const int64_t target = cross_entropy_column(a, a.labels[row]);
      a.statistics[row] = largest;
      a.statistics[a.rows + row] = sums[0];
      a.statistics[2 * a.rows + row] = target < 0 ? 0.0f : load(logits[target]);
      a.statistics[3 * a.rows + row] = sums[1];
    }
  }
}

template <class Element, int kPacks>
__global__ void __launch_bounds__(512, 2) gradient_kernel(const CrossEntropyGradient a) {
  using Part = Columns<Element, kPacks>;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    auto* logits = static_cast<Element*>(a.logits) + row * a.length;
    const int64_t label = a.labels[row], target = cross_entropy_column(a, label);
    const float top = a.top[row], factor = a.factor[row], gradient = a.gradient[row];
    const int64_t held = cross_entropy_has_gradient(label, gradient) ? a.held : 0;
    for (int64_t begin = 0; begin < a.length; begin += Part::step()) {
      Part part(logits, begin, held);
#pragma unroll
      for (int at = 0; at < Part::kAtOnce; ++at) {
        if (part.index[at] >= a.length) break;
#pragma unroll
        for (int i = 0; i < Part::kCount; ++i) {
          const int64_t column = part.index[at] + i;
          const float taken = column == target ? a.everywhere + a.at_target : a.everywhere;
          const float result = cross_entropy_gradient(part.packs[at][i], top, factor, gradient, taken);
          part.packs[at].set(i, column < held ? result : 0.0f);
        }
        write(logits + part.index[at], part.packs[at]);
      }
    }
  }
}

// Calls run(Number<kPacks>(), blocks, threads) as the length and the pointer's alignment allow: a block a row, with
// threads enough that each has some four packs or more.
template <class Element, class Arguments, class Run>
void with_grid(const Arguments& a, const Run& run) {
  const int width = kWidth<Element, 1>;
  const bool packed = aligned({a.logits}) && a.length % width == 0;
  const int64_t warps = ((packed ? a.length / width : a.length) + 127) / 128;
  const int threads = 32 * static_cast<int>(warps < 1 ? 1 : warps < 16 ? warps : 16);
  if (packed) run(Number<1>(), grid_of(a.rows), threads);
  else run(Number<0>(), grid_of(a.rows), threads);
}

}  // namespace

Status launch(const Context& context, const CrossEntropyStatistics& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    with_grid<Element>(a, [&](auto packs, unsigned grid, int threads) {
      statistics_kernel<Element, packs.value><<<grid, threads, 0, stream_of(context)>>>(a);
    });
  });
}

Status launch(const Context& context, const CrossEntropyGradient& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    with_grid<Element>(a, [&](auto packs, unsigned grid, int threads) {
      gradient_kernel<Element, packs.value><<<grid, threads, 0, stream_of(context)>>>(a);
    });
  });
}

}  // namespace megatron_lite::cuda
