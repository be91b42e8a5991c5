// Rows of float32, float16 or bfloat16 in vectors of one memory access, and sums over a warp or a block whose order is
// fixed by the shape, never by timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/dtypes.h"

namespace xray {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kMostWarps = 32;  // of a block

__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(__half value) {
  return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class T>
__device__ T narrow(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// N neighbouring elements: 16 bytes, or a single element where the alignment allows no more.
template <class T, int N>
struct Pack {
  static_assert(N == 1 || N * sizeof(T) == 16);
  using Raw = std::conditional_t<N != 1, uint4, std::conditional_t<sizeof(T) == 4, unsigned, unsigned short>>;

  T at[N];

  // Reads what other blocks or later rows read again.
  __device__ static Pack load(const T* from) {
    return unpack(*reinterpret_cast<const Raw*>(from));
  }
  // Reads what nobody reads again (evict first), so that it does not push out what is.
  __device__ static Pack load_once(const T* from) {
    return unpack(__ldcs(reinterpret_cast<const Raw*>(from)));
  }
  __device__ void store(T* to) const {
    Raw raw;
    memcpy(&raw, at, sizeof raw);
    *reinterpret_cast<Raw*>(to) = raw;
  }
  __device__ static Pack zero() {
    Pack pack;
    for (int e = 0; e < N; ++e) pack.at[e] = narrow<T>(0.0f);
    return pack;
  }
  __device__ Pack operator+(const Pack& other) const {
    Pack sum;
    for (int e = 0; e < N; ++e) sum.at[e] = narrow<T>(widen(at[e]) + widen(other.at[e]));
    return sum;
  }

 private:
  __device__ static Pack unpack(Raw raw) {
    Pack pack;
    memcpy(pack.at, &raw, sizeof raw);
    return pack;
  }
};

// Calls f(null pointer of the element type, integral constant of the elements in a vector).
template <class F>
auto for_vectors(Element type, bool wide, F&& f) {
  const auto with = [&](auto null) {
    constexpr int elements = 16 / sizeof *null;
    return wide ? f(null, std::integral_constant<int, elements>{}) : f(null, std::integral_constant<int, 1>{});
  };
  if (type == Element::kHalf) return with(static_cast<__half*>(nullptr));
  if (type == Element::kBFloat16) return with(static_cast<__nv_bfloat16*>(nullptr));
  return with(static_cast<float*>(nullptr));
}

__device__ inline int lane_id() {
  return int(threadIdx.x) % kWarp;
}
__device__ inline int warp_id() {
  return int(threadIdx.x) / kWarp;
}
__device__ inline int warp_count() {
  return int(blockDim.x) / kWarp;
}

// Every lane gets the sum, by a butterfly: the same order of additions in each lane.
__device__ inline float warp_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Sums over all threads of a block. Two areas take turns, so that one barrier a sum is enough: who writes an area again
// has passed the barrier of the sum between, which every reader of the area reaches only after reading.
class BlockSum {
 public:
  // `shared` holds 4 * kMostWarps floats.
  __device__ explicit BlockSum(float* shared) : area_(shared) {
  }

  __device__ float2 operator()(float2 value) {
    value = {warp_sum(value.x), warp_sum(value.y)};
    float* area = area_ + turn_ * 2 * kMostWarps;
    turn_ ^= 1;
    if (lane_id() == 0) {
      area[2 * warp_id()] = value.x;
      area[2 * warp_id() + 1] = value.y;
    }
    __syncthreads();
    float2 sum = {0.0f, 0.0f};
    for (int warp = 0; warp < warp_count(); ++warp) {
      sum.x += area[2 * warp];
      sum.y += area[2 * warp + 1];
    }
    return sum;
  }
  __device__ float operator()(float value) {
    return (*this)(make_float2(value, 0.0f)).x;
  }

 private:
  float* area_;
  int turn_ = 0;
};

// The same face for the threads of one warp.
class WarpSum {
 public:
  __device__ float operator()(float value) {
    return warp_sum(value);
  }
};

}  // namespace xray
