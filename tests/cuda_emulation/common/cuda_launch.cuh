// Stands in for csrc/common/cuda_launch.cuh: the same launch, on the CPU. The threads of a block are fibers that run
// one at a time, from one barrier or warp collective to the next; blocks run one after another.
//
// What that shows: every index, bound, barrier, shuffle and sum of the kernels, as compiled by g++. Whoever reads
// shared memory too early is seen by running the threads in several orders (`schedule`), whoever reads it unwritten by
// the NaN it is filled with. What it cannot show: nvcc's code, speed, and races between threads within one instruction.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim;

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024, kStack = 64 << 10, kSharedBytes = 227 << 10, kGuard = 4096;

inline int processors = 132;  // that the launchers see
inline int schedule = 0;      // threads in ascending order, 1: descending, more: shuffled by this seed
// Turns of a warp in one block, from one barrier or collective to the next; no kernel at hand takes a hundredth of it.
constexpr int64_t kMostTurns = 4 << 20;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated GPU, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  abort();
}

struct Barrier {
  int waiting = 0, generation = 0;
};

struct Thread {
  std::vector<char> stack;
  ucontext_t start;  // used once: unlike a jump, changing contexts costs a system call
  jmp_buf resume;
  bool started, done;
  const Barrier* awaits;  // with this generation
  int generation;
  unsigned collectives;  // of its warp, so far
};

struct Warp {
  Barrier barrier;
  const char* kind[2];  // two collectives take turns: no lane is further ahead than the next one
  uint64_t value[2][kWarp];
};

inline Thread threads[kMostThreads];
inline Warp warps[kMostThreads / kWarp];
inline Barrier block_barrier;
inline jmp_buf scheduler;
inline std::function<void()> body;  // of every thread: the kernel and its arguments
alignas(16) inline unsigned char shared_memory[kSharedBytes + kGuard];

inline void wait(Barrier& barrier, int members) {
  if (++barrier.waiting == members) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  Thread& self = threads[threadIdx.x];
  self.awaits = &barrier;
  self.generation = barrier.generation;
  if (_setjmp(self.resume) == 0) _longjmp(scheduler, 1);
}

inline void run_thread() {
  body();
  threads[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
inline void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.start);
}

// What each lane of the warp brought to this collective.
template <class T>
const uint64_t* exchange(const char* kind, unsigned mask, T mine) {
  if (mask != 0xffffffffu) fail("a warp collective of some lanes only");
  Warp& warp = warps[threadIdx.x / kWarp];
  const int lane = threadIdx.x % kWarp, turn = threads[threadIdx.x].collectives++ % 2;
  if (warp.barrier.waiting == 0) warp.kind[turn] = kind;
  if (strcmp(warp.kind[turn], kind) != 0) fail("lanes of a warp are at different collectives");
  static_assert(sizeof mine <= sizeof(uint64_t));
  memcpy(&warp.value[turn][lane], &mine, sizeof mine);
  wait(warp.barrier, kWarp);
  return warp.value[turn];
}

inline void run_block(int count, int64_t shared_bytes) {
  std::vector<int> order(count);  // warp after warp
  for (int i = 0; i < count; ++i) order[i] = i;
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) {
    std::mt19937 random(schedule + blockIdx.x);
    std::vector<int> warp_order(count / kWarp);
    for (int i = 0; i < count / kWarp; ++i) warp_order[i] = i;
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    for (int i = 0; i < count; ++i) order[i] = warp_order[i / kWarp] * kWarp + i % kWarp;
    for (int i = 0; i < count; i += kWarp) std::shuffle(order.begin() + i, order.begin() + i + kWarp, random);
  }
  memset(shared_memory, 0xff, sizeof shared_memory);
  block_barrier = {};
  for (Warp& warp : warps) warp = {};
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack.resize(kStack);
    thread.started = thread.done = false;
    thread.awaits = nullptr;
    thread.collectives = 0;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.data();
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, run_thread, 0);
  }
  int64_t turns = 0;
  for (int left = count; left > 0;) {
    bool moved = false;
    for (int first = 0; first < count; first += kWarp) {
      for (bool ran = true; ran;) {  // a warp runs as far ahead of the others as it can
        ran = false;
        if (++turns > kMostTurns) fail("the block does not end");
        for (int at = first; at < first + kWarp; ++at) {
          Thread& thread = threads[order[at]];
          if (thread.done || (thread.awaits && thread.awaits->generation == thread.generation)) continue;
          ran = moved = true;
          thread.awaits = nullptr;
          threadIdx.x = order[at];
          resume(thread);
          left -= thread.done;
        }
      }
    }
    if (!moved) fail("threads wait at different barriers");
  }
  for (int64_t i = shared_bytes; i < shared_bytes + kGuard; ++i)
    if (shared_memory[i] != 0xff) fail("wrote past its shared memory");
}

}  // namespace emulation

// ---- what nvcc declares ----

inline void __syncthreads() {
  emulation::wait(emulation::block_barrier, int(blockDim.x));
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::exchange("syncwarp", mask, 0);
}
template <class T>
T lane_value(const uint64_t* values, int lane) {
  T value;
  memcpy(&value, values + lane, sizeof value);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return lane_value<T>(emulation::exchange("shfl_xor", mask, value), int(threadIdx.x % 32) ^ step);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = threadIdx.x % 32;
  return lane_value<T>(emulation::exchange("shfl_up", mask, value), lane < step ? lane : lane - step);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return lane_value<T>(emulation::exchange("shfl", mask, value), lane & 31);
}
template <class T, class F>
T reduce_lanes(const uint64_t* values, F f) {
  T result = lane_value<T>(values, 0);
  for (int lane = 1; lane < 32; ++lane) result = f(result, lane_value<T>(values, lane));
  return result;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return reduce_lanes<unsigned>(emulation::exchange("add", mask, value), [](auto a, auto b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return reduce_lanes<unsigned>(emulation::exchange("min", mask, value), [](auto a, auto b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return reduce_lanes<unsigned>(emulation::exchange("max", mask, value), [](auto a, auto b) { return a < b ? b : a; });
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  const uint64_t* values = emulation::exchange("ballot", mask, value);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= unsigned(lane_value<bool>(values, lane)) << lane;
  return lanes;
}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return (*to += value) - value;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(unsigned(value));
}
inline int __clzll(long long value) {
  return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float rsqrtf(float value) {
  return 1.0f / std::sqrt(value);
}
using std::max;
using std::min;

namespace xray {

inline unsigned char* dynamic_shared() {
  return emulation::shared_memory;
}

template <class... P, class... A>
cudaError_t launch(
    void (*kernel)(P...), int64_t blocks, int64_t threads, int64_t shared_bytes, cudaStream_t, const A&... arguments) {
  if (threads < 1 || threads > emulation::kMostThreads || threads % emulation::kWarp != 0 ||
      shared_bytes > emulation::kSharedBytes || blocks > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  emulation::body = [=] { kernel(arguments...); };
  blockDim = dim3(unsigned(threads));
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = unsigned(block);
    emulation::run_block(int(threads), shared_bytes);
  }
  return cudaSuccess;
}

inline int processor_count() {
  return emulation::processors;
}

}  // namespace xray

extern "C" __attribute__((visibility("default"), used)) inline void set_emulated_gpu(int processors, int schedule) {
  emulation::processors = processors;
  emulation::schedule = schedule;
}
