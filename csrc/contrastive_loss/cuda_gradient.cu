// CUDA kernels of contrastive_statistics_backward, and what turns sums of products into gradients.
//
// dS_ij = a_i exp(S_ij - r_i) + b_j exp(S_ij - c_j), and + p_i where labels are equal. A block takes 64 rows of a panel
// and 32 lanes times 16 bytes of dS in columns. What belongs to a column stays in registers, what belongs to a row in
// shared memory. Log-sum-exps come in float64 and are used as two floats, (S - high) - low, so that none of it is lost.
// Bytes: 4 read a logit, 2 or 4 written; two exponentials.
//
// dS is in the dtype of the features, so that a library multiplies both in the fastest way; float32 takes the place of
// the logits. bfloat16 has the range of float32. float16 has not: at N = 32,768 a typical dS is 1 / (2 n N) = 5e-10,
// where the smallest float16 above 0 is 6e-8. So there dS is multiplied by a power of two that takes M = max |a| +
// max |b| + max |p|, which bounds all of it as softmaxes are at most 1, to 4,096 or just below: nothing overflows, even
// if a log-sum-exp is 2.7 too small, and what is below 1.5e-8 M loses digits, below 1.5e-11 M vanishes. The power stays
// on the device, and sums of products, in float32, are divided by it. Each dS is rounded once, to 8 or 11 bits.
//
// A product of half-precision matrices can not be added to a float32 sum through the stable ABI (addmm takes numbers,
// which the ABI does not pass). So for each row and column of a panel but the first that it meets, a product is written
// by itself and launch_accumulate adds it: 16 bytes for each 2 t FLOP of a panel with t columns, where adding in the
// product would move 8. For t = 2,560 that is 4.8 ps against 8.5, if all of it went to memory; the product, 5 MB for D
// = 512, is in the cache.

#include "contrastive_loss/cuda_panel.cuh"

namespace xray {
namespace {

constexpr int kFinishThreads = 256, kFactorThreads = 512;

// A log-sum-exp as two floats.
struct Split {
  float high, low;

  __device__ explicit Split(double value) : high(float(value)), low(float(value - double(high))) {
  }
};

template <class T, bool kWide>
__global__ void __launch_bounds__(kPanelThreads, kWide ? 2 : 1)
    gradient_kernel(const GradientPanel call, const int column_tiles) {
  constexpr int kEach = 16 / int(sizeof(T)), kRows = kTileRows / kPanelWarps;
  __shared__ float4 row_values[kTileRows];  // high, low, a, p
  __shared__ int row_labels[kTileRows];
  const int rows = int(call.rows), first_row = int(blockIdx.x) / column_tiles * kTileRows;
  const LaneColumns<kEach, kWide> own{int(blockIdx.x) % column_tiles * kEach * kWarp, int(call.columns)};
  const float scale = call.scale ? *call.scale : 1.0f, factor = call.factor ? *call.factor : 1.0f;
  if (threadIdx.x < kTileRows) {
    const int row = min(first_row + int(threadIdx.x), rows - 1);
    const Split lse(call.row_lse[row]);
    row_values[threadIdx.x] = {
        lse.high, lse.low, factor * float(call.grad_row[row]), factor * float(call.grad_positive[row])};
    row_labels[threadIdx.x] = call.row_labels[row];
  }
  int label[kEach];
  float high[kEach], low[kEach], weight[kEach];
  own.read(call.column_labels, label);
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    const int column = own.has(u) ? own.at(u) : 0;
    const Split lse(call.column_lse[column]);
    high[u] = lse.high;
    low[u] = lse.low;
    weight[u] = factor * float(call.grad_column[column]);
  }
  __syncthreads();

#pragma unroll 1
  for (int batch = 0; batch < kRows; batch += kBatch) {
    const int in_tile = warp_id() * kRows + batch;
    if (first_row + in_tile >= rows) break;
    float logit[kBatch][kEach];
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
      own.read_row(call.logits + min(first_row + in_tile + r, rows - 1) * call.stride, logit[r]);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const int row = first_row + in_tile + r;
      if (row >= rows) break;
      const float4 of_row = row_values[in_tile + r];
      const int row_label = row_labels[in_tile + r];
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const float s = __fmul_rn(logit[r][u], scale);
        float grad = expf(s - of_row.x - of_row.y) * of_row.z + expf(s - high[u] - low[u]) * weight[u];
        if (label[u] == row_label) grad += of_row.w;
        logit[r][u] = grad;
      }
      own.write_row(static_cast<T*>(call.out) + row * call.out_stride, logit[r]);
    }
  }
}

__device__ inline float block_max(const double* from, int64_t count, float* shared) {
  float most = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kFactorThreads) most = fmaxf(most, fabsf(float(from[i])));
  for (int step = kWarp / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
  __syncthreads();  // what was joined before is read
  if (lane_id() == 0) shared[warp_id()] = most;
  __syncthreads();
  for (int warp = 0; warp < warp_count(); ++warp) most = fmaxf(most, shared[warp]);
  return most;
}

// One block. A bound that is 0 or not finite gives 1.
__global__ void __launch_bounds__(kFactorThreads) factor_kernel(const GradientFactor call) {
  __shared__ float shared[kMostWarps];
  const float of_rows = block_max(call.grad_row, call.rows, shared);
  const float of_columns = block_max(call.grad_column, call.columns, shared);
  const float most = of_rows + of_columns + block_max(call.grad_positive, call.rows, shared);
  if (threadIdx.x != 0) return;
  int exponent = 0;
  if (most > 0.0f && most < INFINITY) {
    int of_largest = 0;
    frexpf(kLargestGradient, &of_largest);
    frexpf(most, &exponent);  // most <= 2^exponent
    exponent = min(max(of_largest - 1 - exponent, -100), 100);
  }
  *call.factor = ldexpf(1.0f, exponent);
}

template <int N>
__global__ void __launch_bounds__(kFinishThreads)
    accumulate_kernel(float* const to, const float* const from, const int64_t count) {
  const int64_t at = (int64_t(blockIdx.x) * kFinishThreads + threadIdx.x) * N;
  if (at >= count) return;
  (Pack<float, N>::load(to + at) + Pack<float, N>::load_once(from + at)).store(to + at);
}

// A warp takes a row.
template <class T, class Out, int N>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const FinishGradient call) {
  static_assert(kFinishRows == kFinishThreads / kWarp);
  __shared__ double shared[kMostWarps];
  constexpr int kFloats = N == 1 ? 1 : 4, kVector = N == 1 ? 1 : 16 / int(sizeof(Out));
  const int64_t row = int64_t(blockIdx.x) * kFinishRows + warp_id();
  const float factor = call.constant / (call.factor ? *call.factor : 1.0f), scale = *call.scale;
  float dot = 0.0f;
  if (row < call.rows) {
    const float* sum = call.sum + row * call.width;
    Out* out = static_cast<Out*>(call.out) + row * call.width;
    const T* features = static_cast<const T*>(call.features) + row * call.feature_stride;
    for (int64_t c = lane_id() * N; c < call.width; c += kWarp * N) {
      float values[N];
#pragma unroll
      for (int i = 0; i < N; i += kFloats) {
        const auto part = Pack<float, kFloats>::load_once(sum + c + i);
        for (int e = 0; e < kFloats; ++e) values[i + e] = factor * part.at[e];
      }
      if (call.partials) {
        const auto own = Pack<T, N>::load_once(features + c);
        for (int e = 0; e < N; ++e) dot += values[e] * widen(own.at[e]);
      }
#pragma unroll
      for (int i = 0; i < N; i += kVector) {
        Pack<Out, kVector> pack;
        for (int e = 0; e < kVector; ++e) pack.at[e] = narrow<Out>(values[i + e] * scale);
        pack.store(out + c + i);
      }
    }
  }
  if (!call.partials) return;
  const double total = block_total(double(dot), shared);
  if (threadIdx.x == 0) call.partials[blockIdx.x] = total;
}

// One block.
__global__ void __launch_bounds__(kFactorThreads)
    total_kernel(double* const to, const double* const from, const int64_t count, const int64_t step) {
  __shared__ double shared[kMostWarps];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kFactorThreads) sum += from[i * step];
  sum = block_total(sum, shared);
  if (threadIdx.x == 0) *to = sum;
}

}  // namespace

cudaError_t launch_gradient(const GradientPanel& call, Element type, cudaStream_t stream) {
  const bool wide = fits(call.logits, call.stride, 4) && fits(call.out, call.out_stride, element_size(type));
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t row_tiles = divide_up(call.rows, kTileRows);
    const int64_t column_tiles = divide_up(call.columns, kWarp * 16 / int(sizeof(T)));
    return launch(
        gradient_kernel<T, elements() != 1>, row_tiles * column_tiles, kPanelThreads, 0, stream, call,
        int(column_tiles));
  });
}

cudaError_t launch_gradient_factor(const GradientFactor& call, cudaStream_t stream) {
  return launch(factor_kernel, 1, kFactorThreads, 0, stream, call);
}

cudaError_t launch_accumulate(float* to, const float* from, int64_t count, cudaStream_t stream) {
  const bool wide = fits(to, count, 4) && fits(from, count, 4);
  return for_width(wide, [&](auto is_wide) {
    constexpr int elements = is_wide() ? 4 : 1;
    const int64_t blocks = divide_up(count, kFinishThreads * elements);
    return launch(accumulate_kernel<elements>, blocks, kFinishThreads, 0, stream, to, from, count);
  });
}

cudaError_t launch_finish(const FinishGradient& call, Element type, cudaStream_t stream) {
  const int64_t size = element_size(type);
  const bool wide = fits(call.sum, call.width, 4) && fits(call.out, call.width, call.is_wide ? 4 : size) &&
                    fits(call.features, call.feature_stride, size) && call.width * size % 16 == 0;
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const auto kernel = call.is_wide ? finish_kernel<T, float, elements()> : finish_kernel<T, T, elements()>;
    return launch(kernel, finish_partials(call.rows), kFinishThreads, 0, stream, call);
  });
}

cudaError_t launch_total(double* to, const double* from, int64_t count, int64_t step, cudaStream_t stream) {
  return launch(total_kernel, 1, kFactorThreads, 0, stream, to, from, count, step);
}

}  // namespace xray
