// CUDA backward of token reorganisation, alone and between a residual addition and a LayerNorm.
//
// Each block writes the gradient of some neighbouring rows of one batch row. It reads the kept indices once to learn
// which of its rows were kept, and where; a kept or prefix row copies its gradient from there, a dropped row j gets
// score_j * dFused, and its score <dFused, token_j>. Nothing is scattered, so every element has one writer.
// Alone, a warp takes a row: one launch. Bytes: B C (P + K + 1 + N + dropped) elements; FLOPs: 3 C a dropped token.
//
// With `norm` all threads of a block share a row, one vector each, which they keep in registers: LayerNorm's statistics
// from `stream` (two passes, float32), its gradient, and the sums of the weight's and the bias' gradient over the
// block's rows. The gradient of the fused row, which every dropped row needs, is computed by each block again. The
// next row is on its way while a row's sums pass through the block. A second launch adds up the blocks' sums in order.
// Bytes: B C (3 (P + K + 1) + 2 dropped + N) elements, and 16 C for each block (in L2 mostly); FLOPs: 15 C a kept row.
//
// What lost: a warp a row with `norm` as well. Without barriers, but a lane then sums 2 C / 32 gradients of weight and
// bias in registers, 64 for 1,024 channels beside the 36 to 96 of the row's three tensors, and in any case any more
// channels need another way. A transposed second pass over stream and gradients for weight and bias: 38% more bytes.

#include "common/plan.h"
#include "token_reorganize/cuda_rows.cuh"

namespace xray {
namespace {

// The rows of one block, and for each where it went: its row of the result, or -1.
struct BlockRows {
  int64_t b;
  int first, last, prefix, keep;
  int32_t* place;  // shared memory

  __device__ BlockRows(const ReorganizeBackward& call, const ReorganizeBackwardPlan& plan)
      : b(blockIdx.x / plan.blocks),
        first(int(blockIdx.x % plan.blocks * plan.rows)),
        last(min(int(call.shape.length), first + int(plan.rows))),
        prefix(int(call.shape.prefix)),
        keep(int(call.shape.keep)),
        place(reinterpret_cast<int32_t*>(dynamic_shared())) {
    for (int row = first + int(threadIdx.x); row < last; row += int(blockDim.x))
      place[row - first] = row < prefix ? row : -1;
    __syncthreads();
    const int64_t* indices = call.indices + b * keep;
#pragma unroll 4
    for (int k = threadIdx.x; k < keep; k += int(blockDim.x)) {
      const int64_t row = prefix + indices[k];
      if (first <= row && row < last) place[row - first] = prefix + k;
    }
    __syncthreads();
  }
};

template <class T>
__device__ void store_score_gradient(const ReorganizeBackward& call, int64_t b, int candidate, float gradient) {
  const int64_t at = b * (call.shape.length - call.shape.prefix) + candidate;
  if (call.scores.is_float) {
    static_cast<float*>(call.grad_scores)[at] = gradient;
  } else {
    static_cast<T*>(call.grad_scores)[at] = narrow<T>(gradient);
  }
}

// weight * gradient, rounded.
template <class T, int N>
__device__ Pack<T, N> scale(float weight, const Pack<T, N>& gradient) {
  Pack<T, N> scaled;
  for (int e = 0; e < N; ++e) scaled.at[e] = narrow<T>(weight * widen(gradient.at[e]));
  return scaled;
}

template <class T, int N>
__device__ float dot(const Pack<T, N>& a, const Pack<T, N>& b) {
  float sum = 0.0f;
  for (int e = 0; e < N; ++e) sum += widen(a.at[e]) * widen(b.at[e]);
  return sum;
}

// One warp: to = weight * fused; returns <fused, token>.
template <class T, int N>
__device__ float dropped_row(T* to, const T* fused, const T* token, float weight, int vectors) {
  using Vector = Pack<T, N>;
  constexpr int kEach = kInFlight / 2, kStep = kWarp * N;
  float sum = 0.0f;
  int64_t c = lane_id() * N;
  for (int left = vectors - lane_id(); left > 0; left -= kWarp * kEach) {
    Vector x[kEach], g[kEach];
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (u * kWarp < left) x[u] = Vector::load_once(token + c + u * kStep);
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (u * kWarp < left) g[u] = Vector::load(fused + c + u * kStep);  // in L1 after the block's first dropped row
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (u * kWarp < left) {
        scale(weight, g[u]).store(to + c + u * kStep);
        sum += dot(g[u], x[u]);
      }
    }
    c += kEach * kStep;
  }
  return warp_sum(sum);
}

template <class T, int N>
__device__ void clear_row(T* to, int vectors) {
  for (int v = lane_id(); v < vectors; v += kWarp) Pack<T, N>::zero().store(to + int64_t(v) * N);
}

template <class T, int N>
__global__ void __launch_bounds__(128, 4)
    backward_kernel(const ReorganizeBackward call, const ReorganizeBackwardPlan plan) {
  const BlockRows rows(call, plan);
  const int64_t b = rows.b, channels = call.shape.channels;
  const int vectors = int(channels / N);
  for (int row = rows.first + warp_id(); row < rows.last; row += warp_count()) {
    const int place = rows.place[row - rows.first];
    T* to = static_cast<T*>(call.grad_tokens) + (b * call.shape.length + row) * channels;
    float gradient = 0.0f;
    if (place >= 0) {
      copy_row<T, N>(to, row_of<T>(call.grad, b, place), vectors);
    } else if (call.shape.fuse) {
      gradient = dropped_row<T, N>(
          to, row_of<T>(call.grad, b, rows.prefix + rows.keep), row_of<T>(call.tokens, b, row),
          score_of<T>(call.scores, b, row - rows.prefix), vectors);
    } else {
      clear_row<T, N>(to, vectors);
    }
    if (row >= rows.prefix && lane_id() == 0) store_score_gradient<T>(call, b, row - rows.prefix, gradient);
  }
}

// What a block of the backward with `norm` does to its rows. kHeld: no more vectors than threads, so each thread has
// one, in registers. Otherwise a thread walks over its vectors, reads rows again where it needs them, and keeps sums
// and the fused gradient in the block's part of the workspace, where nobody else writes.
template <class T, int N, bool kHeld>
class NormRows {
  using Vector = Pack<T, N>;

 public:
  __device__ NormRows(const ReorganizeBackward& call, int64_t b, float* workspace, float* area)
      : call_(call), b_(b), channels_(call.shape.channels), vectors_(int(channels_ / N)), sum_(area) {
    grad_weight_ = workspace;
    grad_bias_ = workspace + channels_;
    fused_ = reinterpret_cast<T*>(workspace + 2 * channels_);
    if constexpr (kHeld) {
      if (has_vector()) weight_ = Vector::load(static_cast<const T*>(call.weight) + own());
    } else {
      for (int64_t c = own(); c < channels_; c += step())
        for (int e = 0; e < N; ++e) grad_weight_[c + e] = grad_bias_[c + e] = 0.0f;
    }
  }

  // The three rows that the gradient of result row `place` needs, or the two of dropped row `row`.
  struct Loaded {
    Vector a, b, c;
  };
  __device__ Loaded load_result(int place) const {
    Loaded loaded{};
    if (kHeld && has_vector()) {
      loaded.a = Vector::load_once(row_of<T>(call_.stream, b_, place) + own());
      loaded.b = Vector::load_once(row_of<T>(call_.grad_normed, b_, place) + own());
      loaded.c = Vector::load_once(row_of<T>(call_.grad, b_, place) + own());
    }
    return loaded;
  }
  __device__ Loaded load_fused() const {  // every block of the batch row reads it
    const int place = int(call_.shape.prefix + call_.shape.keep);
    Loaded loaded{};
    if (kHeld && has_vector()) {
      loaded.a = Vector::load(row_of<T>(call_.stream, b_, place) + own());
      loaded.b = Vector::load(row_of<T>(call_.grad_normed, b_, place) + own());
      loaded.c = Vector::load(row_of<T>(call_.grad, b_, place) + own());
    }
    return loaded;
  }
  __device__ Loaded load_dropped(int row) const {
    Loaded loaded{};
    if (kHeld && has_vector()) {
      loaded.a = Vector::load_once(row_of<T>(call_.tokens, b_, row) + own());
      loaded.b = Vector::load_once(row_of<T>(call_.update, b_, row) + own());
    }
    return loaded;
  }

  // Gradient of result row `place` before LayerNorm, to `to`; with `counts` its part of the weight's and bias'
  // gradient.
  __device__ void result_row(const Loaded& loaded, int place, T* to, bool counts) {
    const T *stream = row_of<T>(call_.stream, b_, place), *normed = row_of<T>(call_.grad_normed, b_, place);
    const T* grad = row_of<T>(call_.grad, b_, place);
    const auto stream_at = [&](int64_t c) { return kHeld ? loaded.a : Vector::load(stream + c); };
    const auto normed_at = [&](int64_t c) { return kHeld ? loaded.b : Vector::load(normed + c); };
    const auto grad_at = [&](int64_t c) { return kHeld ? loaded.c : Vector::load_once(grad + c); };

    float part = 0.0f;
    for_own([&](int64_t c) { part += sum_of(stream_at(c)); });
    const float mean = sum_(part) / float(channels_);
    part = 0.0f;
    for_own([&](int64_t c) { part += squares_of(stream_at(c), mean); });
    const float inverse = rsqrtf(sum_(part) / float(channels_) + call_.eps);

    float2 along = {0.0f, 0.0f};  // sums of dUnit and dUnit * unit
    for_own([&](int64_t c) {
      const Vector x = stream_at(c), g = normed_at(c), w = weight_at(c);
      for (int e = 0; e < N; ++e) {
        const float unit = (widen(x.at[e]) - mean) * inverse, g_unit = widen(g.at[e]) * widen(w.at[e]);
        along.x += g_unit;
        along.y += g_unit * unit;
      }
    });
    along = sum_(along);
    along = {along.x / float(channels_), along.y / float(channels_)};
    for_own([&](int64_t c) {
      const Vector x = stream_at(c), g = normed_at(c), w = weight_at(c), direct = grad_at(c);
      Vector result;
      for (int e = 0; e < N; ++e) {
        const float unit = (widen(x.at[e]) - mean) * inverse, g_unit = widen(g.at[e]) * widen(w.at[e]);
        result.at[e] = narrow<T>(widen(direct.at[e]) + inverse * (g_unit - along.x - unit * along.y));
        if (counts) count(c, e, widen(g.at[e]) * unit, widen(g.at[e]));
      }
      if (kHeld && !to) {
        fused_vector_ = result;
      } else {
        result.store((to ? to : fused_) + c);
      }
    });
  }

  // Gradient of a dropped row, to `to`; returns that of its score.
  __device__ float dropped_row(const Loaded& loaded, int row, T* to, float weight) {
    const T *token = row_of<T>(call_.tokens, b_, row), *update = row_of<T>(call_.update, b_, row);
    float part = 0.0f;
    for_own([&](int64_t c) {
      const Vector a = kHeld ? loaded.a : Vector::load_once(token + c);
      const Vector b = kHeld ? loaded.b : Vector::load_once(update + c);
      const Vector fused = kHeld ? fused_vector_ : Vector::load(fused_ + c);
      scale(weight, fused).store(to + c);
      part += dot(fused, a + b);
    });
    return sum_(part);
  }

  __device__ void clear_row(T* to) {
    for_own([&](int64_t c) { Vector::zero().store(to + c); });
  }

  __device__ void store_sums() {
    if constexpr (kHeld) {
      if (!has_vector()) return;
      using Part = Pack<float, N == 1 ? 1 : 4>;
#pragma unroll
      for (int e = 0; e < N; e += int(sizeof(Part) / sizeof(float))) {
        Part weight, bias;
        memcpy(weight.at, of_weight_ + e, sizeof weight);
        memcpy(bias.at, of_bias_ + e, sizeof bias);
        weight.store(grad_weight_ + own() + e);
        bias.store(grad_bias_ + own() + e);
      }
    }
  }

 private:
  __device__ int64_t own() const {
    return int64_t(threadIdx.x) * N;
  }
  __device__ int64_t step() const {
    return int64_t(blockDim.x) * N;
  }
  __device__ bool has_vector() const {
    return int(threadIdx.x) < vectors_;
  }
  // Calls f with the first channel of each vector of this thread.
  template <class F>
  __device__ void for_own(F&& f) {
    if constexpr (kHeld) {
      if (has_vector()) f(own());
    } else {
      for (int64_t c = own(); c < channels_; c += step()) f(c);
    }
  }
  __device__ Vector weight_at(int64_t c) const {
    return kHeld ? weight_ : Vector::load(static_cast<const T*>(call_.weight) + c);
  }
  __device__ void count(int64_t c, int e, float of_weight, float of_bias) {
    if constexpr (kHeld) {
      of_weight_[e] += of_weight;
      of_bias_[e] += of_bias;
    } else {
      grad_weight_[c + e] += of_weight;
      grad_bias_[c + e] += of_bias;
    }
  }

  const ReorganizeBackward& call_;
  int64_t b_, channels_;
  int vectors_;
  BlockSum sum_;
  float *grad_weight_, *grad_bias_;  // of this block, in the workspace
  T* fused_;                         // gradient of the fused row before LayerNorm; the next two when it is held
  Vector fused_vector_{}, weight_{};
  float of_weight_[N] = {}, of_bias_[N] = {};
};

template <class T, int N, bool kHeld>
__global__ void __launch_bounds__(512, 1)
    norm_backward_kernel(const ReorganizeBackward call, const ReorganizeBackwardPlan plan) {
  __shared__ float area[4 * kMostWarps];
  const BlockRows rows(call, plan);
  const int64_t b = rows.b, channels = call.shape.channels;
  NormRows<T, N, kHeld> work(call, b, call.workspace + int64_t(blockIdx.x) * (kHeld ? 2 : 3) * channels, area);
  const auto load = [&](int row) {
    const int place = rows.place[row - rows.first];
    return place >= 0 ? work.load_result(place) : work.load_dropped(row);
  };

  auto next = load(rows.first);
  if (call.shape.fuse) {  // the batch row's first block counts the fused row
    work.result_row(work.load_fused(), rows.prefix + rows.keep, nullptr, rows.first == 0);
  }
  for (int row = rows.first; row < rows.last; ++row) {
    const auto loaded = next;
    if (row + 1 < rows.last) next = load(row + 1);
    const int place = rows.place[row - rows.first];
    T* to = static_cast<T*>(call.grad_tokens) + (b * call.shape.length + row) * channels;
    float gradient = 0.0f;
    if (place >= 0) {
      work.result_row(loaded, place, to, true);
    } else if (call.shape.fuse) {
      gradient = work.dropped_row(loaded, row, to, score_of<T>(call.scores, b, row - rows.prefix));
    } else {
      work.clear_row(to);
    }
    if (row >= rows.prefix && threadIdx.x == 0) store_score_gradient<T>(call, b, row - rows.prefix, gradient);
  }
  work.store_sums();
}

// Sums of the blocks' sums: 32 neighbouring channels of the weight's and bias' gradient a block, the blocks' sums dealt
// to 8 warps and joined in their order.
template <class T>
__global__ void __launch_bounds__(256)
    sum_blocks_kernel(const float* workspace, int64_t blocks, int64_t stride, int64_t channels, T* weight, T* bias) {
  constexpr int kWarps = 8;
  __shared__ float part[kWarps][kWarp];
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane_id();
  float sum = 0.0f;
  if (column < 2 * channels) {
#pragma unroll 8
    for (int64_t block = warp_id(); block < blocks; block += kWarps) sum += __ldcs(workspace + block * stride + column);
  }
  part[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() > 0 || column >= 2 * channels) return;
  sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += part[warp][lane_id()];
  (column < channels ? weight[column] : bias[column - channels]) = narrow<T>(sum);
}

// Whether 16-byte vectors fit, and the plan for the vectors that do.
struct NormBackward {
  bool wide, held;
  ReorganizeBackwardPlan plan;
  int64_t stride;  // floats of workspace of a block

  NormBackward(const ReorganizeBackward& call, Element type) {
    const ReorganizeShape& shape = call.shape;
    const int64_t size = element_size(type);
    Alignment alignment(shape, size);
    alignment.with(call.grad).with(call.grad_normed).with(call.stream).with(call.tokens).with(call.update);
    wide = alignment.with(call.weight).with(call.grad_tokens).fits();
    const int64_t bytes = wide ? 16 : size, vectors = shape.channels * size / bytes;
    plan = plan_reorganize_backward(shape.batch, shape.length, shape.keep, vectors, bytes, true, processor_count());
    held = vectors <= plan.threads;
    stride = shape.channels * (held ? 2 : 3);
  }
};

}  // namespace

cudaError_t launch_reorganize_backward(const ReorganizeBackward& call, Element type, cudaStream_t stream) {
  const ReorganizeShape& shape = call.shape;
  const int64_t size = element_size(type);
  const bool wide = Alignment(shape, size).with(call.grad).with(call.tokens).with(call.grad_tokens).fits();
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const ReorganizeBackwardPlan plan = plan_reorganize_backward(
        shape.batch, shape.length, shape.keep, shape.channels / elements(), elements() * sizeof(T), false,
        processor_count());
    return launch(
        backward_kernel<T, elements()>, shape.batch * plan.blocks, plan.threads, plan.rows * sizeof(int32_t), stream,
        call, plan);
  });
}

int64_t add_reorganize_norm_workspace(const ReorganizeBackward& call, Element type) {
  const NormBackward norm(call, type);
  return call.shape.batch * norm.plan.blocks * norm.stride;
}

cudaError_t launch_add_reorganize_norm_backward(const ReorganizeBackward& call, Element type, cudaStream_t stream) {
  const NormBackward norm(call, type);
  const int64_t blocks = call.shape.batch * norm.plan.blocks, channels = call.shape.channels;
  return for_vectors(type, norm.wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const auto kernel =
        norm.held ? norm_backward_kernel<T, elements(), true> : norm_backward_kernel<T, elements(), false>;
    const cudaError_t error =
        launch(kernel, blocks, norm.plan.threads, norm.plan.rows * sizeof(int32_t), stream, call, norm.plan);
    if (error != cudaSuccess) return error;
    return launch(
        sum_blocks_kernel<T>, (2 * channels + kWarp - 1) / kWarp, 256, 0, stream,
        static_cast<const float*>(call.workspace), blocks, norm.stride, channels, static_cast<T*>(call.grad_weight),
        static_cast<T*>(call.grad_bias));
  });
}

}  // namespace xray
