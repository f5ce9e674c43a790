#include "rotary/rotary.h"

#include "base/cuda.cuh"

namespace megatron_lite::cuda {
namespace {

constexpr int kThreads = 256;

// Cosines or sines of kCount pairs, 16 bytes at a time.
template <int kCount>
struct Angles {
  static constexpr int kEach = kCount < 4 ? kCount : 4;
  Pack<float, kEach> packs[kCount / kEach];

  __device__ __forceinline__ explicit Angles(const float* from) {
#pragma unroll
    for (int pack = 0; pack < kCount / kEach; ++pack) packs[pack] = read<float, kEach>(from + pack * kEach);
  }

  __device__ __forceinline__ float operator[](int pair) const { return packs[pair / kEach][pair % kEach]; }
};

// Two packs of a head as the pairs they hold: (a[i], b[i]), or neighbours within a and then within b.
template <class Element, int kCount, bool kInterleaved>
__device__ __forceinline__ void rotate_packs(Pack<Element, kCount>& a, Pack<Element, kCount>& b,
                                             const Angles<kCount>& cosines, const Angles<kCount>& sines, float sign) {
#pragma unroll
  for (int pair = 0; pair < kCount; ++pair) {
    float first_out, second_out;
    if constexpr (kInterleaved && kCount > 1) {
      auto& pack = 2 * pair < kCount ? a : b;
      const int at = 2 * pair % kCount;
      rotate(pack[at], pack[at + 1], cosines[pair], sign * sines[pair], first_out, second_out);
      pack.set(at, first_out);
      pack.set(at + 1, second_out);
    } else {
      rotate(a[pair], b[pair], cosines[pair], sign * sines[pair], first_out, second_out);
      a.set(pair, first_out);
      b.set(pair, second_out);
    }
  }
}

// threadIdx.x takes kCount pairs of a head, or a pack of what does not turn; y counts heads, z positions.
template <class Element, int kCount, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 4) rotary_kernel(const Rotary a) {
  const int64_t pairs = a.width / 2, turning = pairs / kCount;
  const int64_t parts = turning + (a.input == a.output ? 0 : (a.size - a.width) / kCount);
  const float sign = a.inverse ? -1.0f : 1.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.z;
  for (int64_t batch = blockIdx.y; batch < a.batch; batch += gridDim.y) {
    for (int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; position < a.positions;
         position += stride) {
      const int64_t table = position * a.table_position_stride + batch * a.table_batch_stride;
      const auto* row = static_cast<const Element*>(a.input) + position * a.input_strides.position +
                        batch * a.input_strides.batch;
      auto* result = static_cast<Element*>(a.output) + position * a.output_strides.position +
                     batch * a.output_strides.batch;
      for (int64_t head = threadIdx.y; head < a.heads; head += blockDim.y) {
        const Element* from = row + head * a.input_strides.head;
        Element* to = result + head * a.output_strides.head;
        for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
          if (part < turning) {
            const int64_t pair = part * kCount, first = kInterleaved ? 2 * pair : pair;
            const int64_t second = kInterleaved ? first + kCount : first + pairs;
            auto x1 = read_once<Element, kCount>(from + first), x2 = read_once<Element, kCount>(from + second);
            const Angles<kCount> cosines(a.cosines + table + pair), sines(a.sines + table + pair);
            rotate_packs<Element, kCount, kInterleaved>(x1, x2, cosines, sines, sign);
            write(to + first, x1);
            write(to + second, x2);
          } else {
            const int64_t index = a.width + (part - turning) * kCount;
            write(to + index, read_once<Element, kCount>(from + index));
          }
        }
      }
    }
  }
}

// Whether every head begins at a multiple of `width` elements.
bool whole(const HeadStrides& strides, int64_t width) {
  return strides.position % width == 0 && strides.batch % width == 0 && strides.head % width == 0;
}

template <class Element, int kCount>
void rotate_all(const Context& context, const Rotary& a) {
  const int64_t parts = a.width / 2 / kCount + (a.input == a.output ? 0 : (a.size - a.width) / kCount);
  const unsigned x = parts < 1 ? 1 : parts < kThreads ? parts : kThreads;
  const unsigned y = a.heads < 1 ? 1 : a.heads < kThreads / x ? a.heads : kThreads / x;
  const dim3 block(x, y, kThreads / (x * y) < 64 ? kThreads / (x * y) : 64);
  const dim3 grid(grid_of((a.positions + block.z - 1) / block.z), a.batch < 1 ? 1 : a.batch < 65535 ? a.batch : 65535);
  const auto kernel = a.interleaved ? rotary_kernel<Element, kCount, true> : rotary_kernel<Element, kCount, false>;
  kernel<<<grid, block, 0, stream_of(context)>>>(a);
}

}  // namespace

Status launch(const Context& context, const Rotary& a) {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int kCount = kWidth<Element, 1>;
    const bool packed = aligned({a.input, a.output, a.cosines, a.sines}) && whole(a.input_strides, kCount) &&
                        whole(a.output_strides, kCount) && a.width / 2 % kCount == 0 && a.size % kCount == 0;
    if (packed) rotate_all<Element, kCount>(context, a);
    else rotate_all<Element, 1>(context, a);
  });
}

}  // namespace megatron_lite::cuda
