// CUDA's execution model on a CPU, for tests: a .cu file compiled by a C++ compiler with this folder in front.
//
// The threads of a block are fibers that run in turn and change places where they meet: at __syncthreads, and at a
// warp's exchanges, which stop the program if some of the warp do not come. Blocks run one after another. What
// it shows is arithmetic, indexing, barriers and the order of sums; not races, not speed, not rounding of the
// GPU's own approximations. __shared__ is static storage and holds garbage when a block starts, as on a GPU.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 { uint32_t x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace cuda_on_cpu {

struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t times = 0;
};

struct Fiber {
  dim3 index;
  int rank;  // in the block
  jmp_buf place;
  ucontext_t start;
  bool begun = false, done = false;
};

struct Block {
  dim3 grid, block, index;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<uint64_t> exchanged;
  Meeting all;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  uint64_t progress = 0;
};

inline Block block;

inline void yield() {
  if (!_setjmp(block.current->place)) _longjmp(block.scheduler, 1);
}

inline void meet(Meeting& meeting) {
  const uint64_t times = meeting.times;
  ++block.progress;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.times;
  } else {
    while (meeting.times == times) yield();
  }
}

inline void enter() {
  (*block.body)();
  Fiber& fiber = *block.current;
  fiber.done = true;
  ++block.progress;
  // A thread that has ended is not waited for at __syncthreads; a warp's exchange does want it.
  if (--block.all.expected == block.all.arrived && block.all.expected) {
    block.all.arrived = 0;
    ++block.all.times;
  }
  _longjmp(block.scheduler, 1);
}

inline void run_block(const std::function<void()>& body) {
  constexpr size_t kStack = 128 * 1024;
  static std::vector<std::unique_ptr<char[]>> stacks;
  const int threads = block.block.x * block.block.y * block.block.z;
  block.fibers = std::vector<Fiber>(threads);
  block.exchanged.assign(threads, 0);
  block.warps.assign((threads + 31) / 32, {});
  for (int warp = 0; warp < static_cast<int>(block.warps.size()); ++warp)
    block.warps[warp].expected = threads - warp * 32 < 32 ? threads - warp * 32 : 32;
  block.all = {threads};
  block.body = &body;
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[kStack]);
  for (int rank = 0; rank < threads; ++rank) {
    Fiber& fiber = block.fibers[rank];
    fiber.rank = rank;
    fiber.index = dim3(rank % block.block.x, rank / block.block.x % block.block.y, rank / block.block.x / block.block.y);
    getcontext(&fiber.start);
    fiber.start.uc_stack = {stacks[rank].get(), 0, kStack};
    makecontext(&fiber.start, enter, 0);
  }
  for (volatile int left = threads; left;) {
    const uint64_t before = block.progress;
    left = 0;
    for (volatile int rank = 0; rank < threads; ++rank) {
      Fiber& fiber = block.fibers[rank];
      if (fiber.done) continue;
      ++left;
      block.current = &fiber;
      if (_setjmp(block.scheduler)) continue;
      if (fiber.begun) _longjmp(fiber.place, 1);
      fiber.begun = true;
      setcontext(&fiber.start);
    }
    if (left && block.progress == before) {
      std::fprintf(stderr, "threads of a block wait for one another: not all of them reach a barrier\n");
      std::abort();
    }
  }
}

// Every limit of a launch on every card there is; dynamic shared memory is not asked for.
inline bool possible(dim3 grid, dim3 threads, size_t dynamic_bytes) {
  const uint64_t in_block = uint64_t{threads.x} * threads.y * threads.z;
  return in_block && in_block <= 1024 && threads.z <= 64 && grid.x && grid.x <= INT32_MAX && grid.y && grid.y <= 65535 &&
         grid.z && grid.z <= 65535 && dynamic_bytes == 0;
}

inline void launch(dim3 grid, dim3 threads, size_t dynamic_bytes, void*, const std::function<void()>& body) {
  if (!possible(grid, threads, dynamic_bytes)) {
    std::fprintf(stderr, "no GPU launches a grid of %u x %u x %u blocks of %u x %u x %u threads\n", grid.x, grid.y, grid.z,
                 threads.x, threads.y, threads.z);
    std::abort();
  }
  block.grid = grid;
  block.block = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        run_block(body);
      }
}

// What lane `from` of this thread's warp gives to `value`.
template <class Value>
Value exchange(Value value, int from) {
  static_assert(sizeof value <= 8);
  const int rank = block.current->rank;
  std::memcpy(&block.exchanged[rank], &value, sizeof value);
  meet(block.warps[rank / 32]);
  Value theirs;
  std::memcpy(&theirs, &block.exchanged[rank / 32 * 32 + from], sizeof theirs);
  meet(block.warps[rank / 32]);
  return theirs;
}

inline int lane() { return block.current->rank % 32; }

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::block.current->index)
#define blockIdx (cuda_on_cpu::block.index)
#define blockDim (cuda_on_cpu::block.block)
#define gridDim (cuda_on_cpu::block.grid)

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::block.all); }
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) { return cuda_on_cpu::exchange(value, cuda_on_cpu::lane() ^ mask); }

template <class Value>
Value max(Value a, Value b) { return a > b ? a : b; }

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  unsigned largest = 0;
  for (int lane = 0; lane < 32; ++lane) largest = max(largest, cuda_on_cpu::exchange(value, lane));
  return largest;
}

template <class Value>
Value __ldcs(const Value* from) { return *from; }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
