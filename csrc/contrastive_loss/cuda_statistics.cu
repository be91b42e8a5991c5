// CUDA kernels of contrastive_statistics, and of contrastive_pairs.
//
// A block takes 128 x 128 logits of a panel, a warp 8 of its rows at a time, a lane 4 columns of each, in one vector of
// 16 bytes: 4 KiB of a warp are on their way before the first is used. From the registers come both directions: a row's
// largest logit and sum of exp(logit - largest) are folded over the lanes, eight rows at a time; a column's over the
// lane's rows, then in shared memory over the warps. A second, small launch joins the tiles of a row or column, in
// their order, with what earlier panels left, as log-sum-exps in float64: at scale 100 a float32 one is off by 4e-6.
// Ranks are integers, added atomically, which no order changes.
//
// Bytes: 4 read a logit, 4 written where logits are kept; 16 a row and 8 a column and tile, written and read (4%).
// Arithmetic: two exponentials a logit, about 25 instructions in all: 25 / 128 cycles of each of 132 SMs at 1.75 GHz
// is 0.85 ps a logit, less than the 1.2 ps that reading 4 bytes takes at 3.35 TB/s.
//
// What lost: one exponential a logit, relative to the tile's largest, for both directions: at scale 100 whole rows of a
// tile underflow. Folding row after row: 80 shuffles for 8 rows instead of 26.

#include "contrastive_loss/cuda_panel.cuh"

namespace xray {
namespace {

constexpr int kEach = kStatisticsColumns / kWarp;
constexpr int kBatches = kStatisticsRows / (kPanelWarps * kRowsAtOnce);
constexpr int kJoinThreads = 128;

struct Max {
  __device__ float operator()(float a, float b) const {
    return fmaxf(a, b);
  }
};

// exp(x - top) relative to a finite top, 0 for x = -inf, NaN for x = NaN
__device__ inline float relative(float x, float top) {
  return expf(x - finite_top(top));
}

template <bool kWide>
__global__ void __launch_bounds__(kPanelThreads, kWide ? 2 : 1)
    statistics_kernel(const StatisticsPanel call, const int column_tiles) {
  __shared__ float2 of_warp[kPanelWarps][kStatisticsColumns];
  __shared__ unsigned column_ahead[kStatisticsColumns];
  const int rows = int(call.rows), column_tile = int(blockIdx.x) % column_tiles;
  const int row_tile = int(blockIdx.x) / column_tiles;
  const PanelPairs& pairs = call.pairs;
  const LaneColumns<kEach, kWide> own{column_tile * kStatisticsColumns, int(call.columns)};
  if (threadIdx.x < kStatisticsColumns) column_ahead[threadIdx.x] = 0;
  __syncthreads();

  const float scale = *call.scale;
  int label[kEach];
  own.read(pairs.column_labels, label);
  float pair[kEach] = {};
  if (pairs.column_pairs) own.read(pairs.column_pairs, pair);
  float top[kEach], sum[kEach];
  unsigned ahead[kEach];
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    top[u] = kMinusInfinity;
    sum[u] = 0.0f;
    ahead[u] = 0;
  }

#pragma unroll 1
  for (int batch = 0; batch < kBatches; ++batch) {
    const int first = row_tile * kStatisticsRows + (batch * kPanelWarps + warp_id()) * kRowsAtOnce;
    if (first >= rows) break;
    float logit[kRowsAtOnce][kEach];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)  // past the end the last again
      own.read_row(call.logits + min(first + r, rows - 1) * call.stride, logit[r]);
    float row_top[kRowsAtOnce], row_sum[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      for (int u = 0; u < kEach; ++u) logit[r][u] = __fmul_rn(logit[r][u], scale);
      if (call.keep && first + r < rows) own.write_row(call.logits + (first + r) * call.stride, logit[r]);
      row_top[r] = kMinusInfinity;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        if (first + r >= rows || !own.has(u)) logit[r][u] = kMinusInfinity;
        row_top[r] = fmaxf(row_top[r], logit[r][u]);
      }
    }
    const float of_row = fold_rows(row_top, Max());
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float of_this = __shfl_sync(kAllLanes, of_row, lane_of_row(r));
      row_sum[r] = 0.0f;
      for (int u = 0; u < kEach; ++u) row_sum[r] += relative(logit[r][u], of_this);
    }
    float4 found = {of_row, fold_rows(row_sum, Add()), 0.0f, 0.0f};

    float positive[kRowsAtOnce];
    unsigned row_ahead[kRowsAtOnce];
    bool has_positive = false;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int row = min(first + r, rows - 1);
      const int row_label = pairs.row_labels[row];
      const float row_pair = pairs.row_pairs ? pairs.row_pairs[row] : 0.0f;
      positive[r] = 0.0f;
      row_ahead[r] = 0;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const bool is_there = first + r < rows && own.has(u), is_positive = is_there && label[u] == row_label;
        if (is_positive) positive[r] += logit[r][u];
        has_positive |= is_positive;
        row_ahead[r] += is_there && !is_positive && logit[r][u] >= row_pair;
        ahead[u] += is_there && !is_positive && logit[r][u] >= pair[u];
      }
    }
    if (__ballot_sync(kAllLanes, has_positive)) found.z = fold_rows(positive, Add());
    const unsigned places = pairs.row_pairs ? fold_rows(row_ahead, Add()) : 0;
    const int row = first + lane_id() / lane_of_row(1);
    if (lane_id() % lane_of_row(1) == 0 && row < rows) {
      reinterpret_cast<float4*>(call.row_partials)[int64_t(column_tile) * rows + row] = found;
      if (places) atomicAdd(pairs.row_ranks + row, places);
    }

#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      float peak = top[u];
      for (int r = 0; r < kRowsAtOnce; ++r) peak = fmaxf(peak, logit[r][u]);
      sum[u] *= relative(top[u], peak);
      for (int r = 0; r < kRowsAtOnce; ++r) sum[u] += relative(logit[r][u], peak);
      top[u] = peak;
    }
  }

#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    of_warp[warp_id()][own.in_tile(u)] = {top[u], sum[u]};
    if (pairs.column_pairs && ahead[u]) atomicAdd(column_ahead + own.in_tile(u), ahead[u]);
  }
  __syncthreads();
  const int column = own.first + int(threadIdx.x);
  if (threadIdx.x < kStatisticsColumns && column < own.count) {
    float2 found = {kMinusInfinity, 0.0f};
    for (int warp = 0; warp < kPanelWarps; ++warp) found.x = fmaxf(found.x, of_warp[warp][threadIdx.x].x);
    for (int warp = 0; warp < kPanelWarps; ++warp)
      found.y += of_warp[warp][threadIdx.x].y * relative(of_warp[warp][threadIdx.x].x, found.x);
    reinterpret_cast<float2*>(call.column_partials)[int64_t(row_tile) * own.count + column] = found;
    if (column_ahead[threadIdx.x]) atomicAdd(pairs.column_ranks + column, column_ahead[threadIdx.x]);
  }
}

// log(exp(a) + exp(b)), -inf for two of these
__device__ inline double log_add_exp(double a, double b) {
  double top = fmax(a, b);
  if (top == -INFINITY) top = 0.0;
  return top + log(exp(a - top) + exp(b - top));
}

// The log-sum-exp of `tiles` partial ones, `step` apart, whose first two floats are the largest logit and the sum.
template <class Partial>
__device__ double log_sum_exp(const Partial* from, int64_t step, int tiles) {
  float top = kMinusInfinity;
  for (int tile = 0; tile < tiles; ++tile) top = fmaxf(top, from[tile * step].x);
  double sum = 0.0;
  for (int tile = 0; tile < tiles; ++tile) sum += double(from[tile * step].y * relative(from[tile * step].x, top));
  return double(finite_top(top)) + log(sum);
}

// A thread joins the tiles of a row, or of a column.
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(const StatisticsPanel call, const int row_tiles, const int column_tiles) {
  int64_t i = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (i < call.rows) {
    const float4* from = reinterpret_cast<const float4*>(call.row_partials) + i;
    call.row_lse[i] = log_add_exp(call.row_lse[i], log_sum_exp(from, call.rows, column_tiles));
    double positive = call.positive[i];
    for (int tile = 0; tile < column_tiles; ++tile) positive += double(from[tile * call.rows].z);
    call.positive[i] = positive;
    return;
  }
  i -= call.rows;
  if (i >= call.columns) return;
  const float2* from = reinterpret_cast<const float2*>(call.column_partials) + i;
  call.column_lse[i] = log_add_exp(call.column_lse[i], log_sum_exp(from, call.columns, row_tiles));
}

// A warp takes a pair.
template <class T, int N>
__global__ void __launch_bounds__(kPanelThreads) pairs_kernel(const Pairs call) {
  const int64_t row = int64_t(blockIdx.x) * kPanelWarps + warp_id();
  if (row >= call.rows) return;
  const T* image = static_cast<const T*>(call.image) + row * call.image_stride;
  const T* text = static_cast<const T*>(call.text) + row * call.text_stride;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t c = lane_id() * N; c < call.width; c += kWarp * N) {
    const auto a = Pack<T, N>::load_once(image + c), b = Pack<T, N>::load_once(text + c);
    for (int e = 0; e < N; ++e) sum += widen(a.at[e]) * widen(b.at[e]);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) call.out[row] = sum * *call.scale;
}

}  // namespace

cudaError_t launch_statistics(const StatisticsPanel& call, cudaStream_t stream) {
  const int64_t row_tiles = divide_up(call.rows, kStatisticsRows);
  const int64_t column_tiles = divide_up(call.columns, kStatisticsColumns);
  const cudaError_t error = for_width(fits(call.logits, call.stride, 4), [&](auto wide) {
    return launch(
        statistics_kernel<wide()>, row_tiles * column_tiles, kPanelThreads, 0, stream, call, int(column_tiles));
  });
  if (error != cudaSuccess) return error;
  const int64_t blocks = divide_up(call.rows + call.columns, kJoinThreads);
  return launch(join_kernel, blocks, kJoinThreads, 0, stream, call, int(row_tiles), int(column_tiles));
}

cudaError_t launch_pairs(const Pairs& call, Element type, cudaStream_t stream) {
  const int64_t size = element_size(type);
  const bool wide = fits(call.image, call.image_stride, size) && fits(call.text, call.text_stride, size) &&
                    call.width * size % 16 == 0;
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    return launch(pairs_kernel<T, elements()>, divide_up(call.rows, kPanelWarps), kPanelThreads, 0, stream, call);
  });
}

}  // namespace xray
