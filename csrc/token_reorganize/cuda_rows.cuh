// What the kernels of token reorganisation share: where rows and scores lie, copying, LayerNorm of a stored row, and
// whether its vectors can be 16 bytes.
#pragma once

#include "common/cuda_vector.cuh"
#include "token_reorganize/cuda.h"

namespace xray {

// Vectors that a lane has in flight when a warp moves a row: 8 x 32 x 16 bytes cover 1,024 channels of float32.
constexpr int kInFlight = 8;

template <class T>
__device__ const T* row_of(const RowsIn& rows, int64_t batch, int64_t row) {
  return static_cast<const T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

template <class T>
__device__ float score_of(const ScoresIn& scores, int64_t batch, int64_t candidate) {
  const int64_t at = batch * scores.batch_stride + candidate * scores.stride;
  return scores.is_float ? static_cast<const float*>(scores.data)[at] : widen(static_cast<const T*>(scores.data)[at]);
}

// One warp copies a row: all loads of a lane before its first store.
template <class T, int N>
__device__ void copy_row(T* to, const T* from, int vectors) {
  constexpr int kStep = kWarp * N;
  from += lane_id() * N;
  to += lane_id() * N;
  for (int left = vectors - lane_id(); left > 0; left -= kWarp * kInFlight) {
    Pack<T, N> row[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (u * kWarp < left) row[u] = Pack<T, N>::load_once(from + u * kStep);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (u * kWarp < left) row[u].store(to + u * kStep);
    from += kInFlight * kStep;
    to += kInFlight * kStep;
  }
}

// The part of one thread in sums over a vector.
template <class T, int N>
__device__ float sum_of(const Pack<T, N>& x) {
  float sum = 0.0f;
  for (int e = 0; e < N; ++e) sum += widen(x.at[e]);
  return sum;
}
template <class T, int N>
__device__ float squares_of(const Pack<T, N>& x, float mean) {
  float sum = 0.0f;
  for (int e = 0; e < N; ++e) sum += (widen(x.at[e]) - mean) * (widen(x.at[e]) - mean);
  return sum;
}

// LayerNorm of one vector of a row: `weight` and `bias` point to the vector's channels.
template <class T, int N>
__device__ Pack<T, N> normalise(const Pack<T, N>& x, float mean, float inverse, const T* weight, const T* bias) {
  const auto w = Pack<T, N>::load(weight), b = Pack<T, N>::load(bias);
  Pack<T, N> y;
  for (int e = 0; e < N; ++e) y.at[e] = narrow<T>((widen(x.at[e]) - mean) * inverse * widen(w.at[e]) + widen(b.at[e]));
  return y;
}

// LayerNorm of a row in memory by `threads` threads, of which this is number `thread`; `sum` sums over them. The row
// is read three times, the second and third time from a cache.
template <class T, int N, class Sum>
__device__ void normalise_stored_row(
    const ReorganizeForward& call, T* normed, const T* row, int vectors, int thread, int threads, Sum& sum) {
  const float channels = float(call.shape.channels);
  float part = 0.0f;
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) part += sum_of(Pack<T, N>::load(row + int64_t(v) * N));
  const float mean = sum(part) / channels;
  part = 0.0f;
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) part += squares_of(Pack<T, N>::load(row + int64_t(v) * N), mean);
  const float inverse = rsqrtf(sum(part) / channels + call.eps);
  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
#pragma unroll 2
  for (int v = thread; v < vectors; v += threads) {
    const int64_t c = int64_t(v) * N;
    normalise(Pack<T, N>::load(row + c), mean, inverse, weight + c, bias + c).store(normed + c);
  }
}

// Whether vectors of 16 bytes can be used: pointers, strides and channels all multiples of them.
class Alignment {
 public:
  Alignment(const ReorganizeShape& shape, int64_t element_size) : shape_(shape), size_(element_size) {
    fits_ = shape.channels * size_ % 16 == 0;
  }
  Alignment& with(const void* data) {
    fits_ = fits_ && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return *this;
  }
  Alignment& with(const RowsIn& rows) {
    fits_ = fits_ && (shape_.batch < 2 || rows.batch_stride * size_ % 16 == 0) && rows.row_stride * size_ % 16 == 0;
    return with(rows.data);
  }
  bool fits() const {
    return fits_;
  }

 private:
  const ReorganizeShape& shape_;
  int64_t size_;
  bool fits_;
};

}  // namespace xray
