// What the kernels over panels of logits share: which columns a lane has, how it reads them, and sums of several rows.
#pragma once

#include "common/cuda_vector.cuh"
#include "contrastive_loss/cuda.h"

namespace xray {

constexpr int kPanelThreads = 256, kPanelWarps = kPanelThreads / kWarp;
constexpr int kRowsAtOnce = 8;  // rows of a warp whose sums are folded together
constexpr int kBatch = 4;       // rows of a warp that are read before the first is used, where sums are not by row
constexpr float kMinusInfinity = -INFINITY;

// The columns of a lane in a tile of 32 * kEach: neighbours where vectors of 16 bytes can be read, else one in each of
// kEach groups of 32, so that a warp reads neighbours.
template <int kEach, bool kWide>
struct LaneColumns {
  int first;  // of the tile
  int count;  // of the panel

  __device__ int in_tile(int u) const {
    return kWide ? lane_id() * kEach + u : lane_id() + kWarp * u;
  }
  __device__ int at(int u) const {
    return first + in_tile(u);
  }
  __device__ bool has(int u) const {
    return at(u) < count;
  }
  // A value for each column; the panel's first where there is no such column, since a load without a condition stays
  // one vector.
  template <class V>
  __device__ void read(const V* from, V (&values)[kEach]) const {
#pragma unroll
    for (int u = 0; u < kEach; ++u) values[u] = from[has(u) ? at(u) : 0];
  }
  // The same of a row of logits, which nobody reads again.
  __device__ void read_row(const float* row, float (&values)[kEach]) const {
    if constexpr (kWide) {
#pragma unroll
      for (int u = 0; u < kEach; u += 4) {
        const auto four = Pack<float, 4>::load_once(row + (has(u) ? at(u) : 0));
        for (int e = 0; e < 4; ++e) values[u + e] = four.at[e];
      }
    } else {
#pragma unroll
      for (int u = 0; u < kEach; ++u) values[u] = __ldcs(row + (has(u) ? at(u) : 0));
    }
  }
  // Narrowed and stored; a whole vector where its first element is in the panel.
  template <class T>
  __device__ void write_row(T* row, const float (&values)[kEach]) const {
    constexpr int kVector = 16 / int(sizeof(T));
    if constexpr (kWide) {
#pragma unroll
      for (int u = 0; u < kEach; u += kVector) {
        Pack<T, kVector> pack;
        for (int e = 0; e < kVector; ++e) pack.at[e] = narrow<T>(values[u + e]);
        if (has(u)) pack.store(row + at(u));
      }
    } else {
#pragma unroll
      for (int u = 0; u < kEach; ++u)
        if (has(u)) row[at(u)] = narrow<T>(values[u]);
    }
  }
};

// Folds eight values of each lane, one a row, over the warp: lane i gets the result of row i / 4. Lanes swap halves of
// what they have, so that 9 shuffles do what takes 40 a row at a time.
template <class V, class F>
__device__ V fold_rows(V (&of_row)[kRowsAtOnce], F&& f) {
#pragma unroll
  for (int half = kRowsAtOnce / 2, step = kWarp / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = lane_id() & step;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const V mine = upper ? of_row[r + half] : of_row[r], other = upper ? of_row[r] : of_row[r + half];
      of_row[r] = f(mine, __shfl_xor_sync(kAllLanes, other, step));
    }
  }
  V value = of_row[0];
  for (int step = kWarp / kRowsAtOnce / 2; step > 0; step /= 2)
    value = f(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// The lane with the result of row r.
__device__ constexpr int lane_of_row(int r) {
  return r * (kWarp / kRowsAtOnce);
}

struct Add {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

// What exponents are relative to: with nothing but -inf, 0, so that their exponentials are 0 and not NaN.
__device__ inline float finite_top(float top) {
  return top == kMinusInfinity ? 0.0f : top;
}

// Sum over the block in its first thread, in the order of lanes and warps; `shared` holds kPanelWarps doubles.
__device__ inline double block_total(double value, double* shared) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (lane_id() == 0) shared[warp_id()] = value;
  __syncthreads();
  value = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < warp_count(); ++warp) value += shared[warp];
  return value;
}

// Whether vectors of 16 bytes fit the rows of a matrix.
inline bool fits(const void* data, int64_t stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size % 16 == 0;
}

// Calls f with whether vectors fit, as a type.
template <class F>
cudaError_t for_width(bool wide, F&& f) {
  return wide ? f(std::true_type{}) : f(std::false_type{});
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace xray
