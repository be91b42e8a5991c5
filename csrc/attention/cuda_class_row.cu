// CUDA kernels of the class token's attention: class_scores and its backward. Fixed order of every sum, no atomics.
//
// A key is held by a team of lanes, 8 channels each, in vectors of 16 bytes where rows allow it (for D = 64 eight
// lanes, so four keys a warp at once), and a lane has 32 registers of keys on their way. Team t of a warp's 32
// keys takes those from t * lanes on, one a round: after `lanes` rounds lane i has the sum that belongs to key i.
//
// Forward, first launch: a warp computes the logits of 32 keys of one head, which it leaves in class_row, and their
// statistics, the largest and the sum of exp(logit - largest). Neighbouring warps take neighbouring heads, whose rows
// are neighbours in memory when they come from one projection. Second launch: each block joins the statistics of its
// row's tiles and turns 128 keys of all heads into probabilities and scores. Bytes: B H N D elements, 4 B H N for
// class_row (and 8 more in L2); FLOPs: 2 D a key and head.
//
// Backward: a block takes 256 keys of one head. It sums t over the whole row, then ds is one number a lane; K is read
// once, and its gradient read and written once, where ds is not 0: keys that the forward masked cost nothing. Sums for
// the query go through shared memory, and to the gradient at once where the row is one slice, otherwise to the
// workspace, and a second launch adds up the slices. Bytes: 3 B H N D elements, 4 B H N; FLOPs: 4 D a key and head.
//
// What lost: one block for all heads of a batch row, without a second launch: 64 blocks for 64 images where an H100 has
// 132 processors. Probabilities in the first launch where a head is one block: 4 bytes a key less in L2, 1%, but two
// ways through the code. A launch of its own for t in the backward: it saves the blocks 8 bytes of 384 a key at N =
// 197.

#include "attention/cuda.h"
#include "common/cuda_vector.cuh"
#include "common/plan.h"

namespace xray {
namespace {

constexpr int kTileThreads = 128, kSliceThreads = kSliceKeys;
constexpr int kOwn = 8;  // channels of a lane
constexpr float kMinusInfinity = -INFINITY;

__device__ inline int64_t integer(const Integers& integers, int64_t i) {
  const int64_t at = i * integers.stride;
  return integers.is_long ? static_cast<const int64_t*>(integers.data)[at]
                          : int64_t{static_cast<const int32_t*>(integers.data)[at]};
}

__device__ inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return min(max(value, low), high);
}

// The keys of a row: `begin` is its first, the class token, among the tokens of its batch row. Whatever is in the
// tensors of lengths, all keys are inside.
struct Keys {
  int64_t batch, begin;
  int count, visible;  // keys past the visible ones are masked
  bool packed;

  __device__ Keys(const ClassRowShape& shape, int row)
      : batch(row), begin(0), count(int(shape.length)), visible(count), packed(shape.cu_seqlens.data) {
    if (packed) {
      batch = 0;
      begin = begin_of(shape, row);
      visible = count = int(max(begin_of(shape, row + 1), begin) - begin);
    } else if (shape.key_lengths.data) {
      visible = int(clamp(integer(shape.key_lengths, row), 0, shape.length));
    }
  }
  __device__ static int64_t begin_of(const ClassRowShape& shape, int row) {
    return clamp(integer(shape.cu_seqlens, row), 0, shape.length);
  }
  // The place of the row's first piece of `size` keys (see plan_class_row).
  __device__ static int first_piece(const ClassRowShape& shape, int row, int size) {
    return shape.cu_seqlens.data ? int(begin_of(shape, row) / size) + row : 0;
  }
};

// The row of a piece of `size` keys of batch row `batch`. A warp calls it: packed sequences are searched, 32 at a time.
__device__ inline int row_of_piece(const ClassRowShape& shape, int batch, int piece, int size) {
  if (!shape.cu_seqlens.data) return batch;
  int low = 0;
  for (int step = int(shape.rows); step > 1;) {
    const int end = min(int(shape.rows), low + step);
    step = (step + kWarp - 1) / kWarp;
    const int row = low + lane_id() * step;
    const bool is_before = row < end && Keys::first_piece(shape, row, size) <= piece;
    low += max(0, __popc(__ballot_sync(kAllLanes, is_before)) - 1) * step;
  }
  return low;
}

template <class T>
__device__ const T* row_of(const HeadsIn& heads, int64_t batch, int head, int64_t row) {
  return static_cast<const T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride +
         row * heads.row_stride;
}

template <class T>
__device__ T* row_of(const HeadsInOut& heads, int64_t batch, int head, int64_t row) {
  return static_cast<T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride + row * heads.row_stride;
}

// The lanes that share a key, and what one of them holds of it.
template <class T, int N>
struct Team {
  using Vector = Pack<T, N>;
  static constexpr int kEach = kOwn / N;
  // Keys that a lane has on their way, in 32 registers; single elements take more addresses, so fewer.
  static constexpr int kRounds = N == 1 ? 2 : 8 / kEach;

  int channels, lanes, lane;
  int first;  // of its keys

  __device__ explicit Team(int64_t channels_) : channels(int(channels_)), lanes(kRounds) {
    while (lanes * kOwn < channels) lanes *= 2;
    lane = lane_id() & (lanes - 1);
    first = lane_id() - lane;
  }
  // First channel of vector u: vectors of a row lie side by side in the lanes, single elements in the vectors, where
  // they need fewer addresses.
  __device__ int channel(int u) const {
    return N == 1 ? lane * kEach + u : (u * lanes + lane) * N;
  }
  __device__ bool has(int u) const {
    return channel(u) < channels;
  }
  // Vector u of a row. A lane without one gets its team's first, at no cost: a load without a condition stays one
  // vector, where one with a condition became eight values in registers of their own, and spilled.
  template <class Load>
  __device__ Vector load(int u, Load&& load) const {
    if constexpr (N == 1) return has(u) ? load(channel(u)) : Vector::zero();
    return load(has(u) ? channel(u) : 0);
  }
  // Sum over the team, in each of its lanes.
  __device__ float sum(float value) const {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
    return value;
  }
  // This lane's channels of a row that others read as well.
  __device__ void read(const T* row, Vector (&own)[kEach]) const {
#pragma unroll
    for (int u = 0; u < kEach; ++u) own[u] = load(u, [&](int c) { return Vector::load(row + c); });
  }
};

__device__ inline float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// What exponents are relative to: with nothing but -inf, 0, so that their exponentials are 0 and not NaN.
__device__ inline float finite_top(float top) {
  return top == kMinusInfinity ? 0.0f : top;
}

template <class T, int N>
__global__ void __launch_bounds__(kTileThreads, 5) logits_kernel(const ClassScores call, const ClassRowPlan plan) {
  using Vector = Pack<T, N>;
  constexpr int kEach = Team<T, N>::kEach, kRounds = Team<T, N>::kRounds;
  const int heads = int(call.shape.heads), tiles = int(plan.tiles);
  const int warp = int(blockIdx.x) * (kTileThreads / kWarp) + warp_id();
  const int head = warp % heads, tile = warp / heads % tiles, batch = warp / heads / tiles;
  if (batch >= call.shape.batch) return;
  const int row = row_of_piece(call.shape, batch, tile, kTileKeys);
  const Keys keys(call.shape, row);
  const int start = (tile - Keys::first_piece(call.shape, row, kTileKeys)) * kTileKeys, left = keys.visible - start;
  if (start < 0 || left <= 0) return;
  const Team<T, N> team(call.shape.channels);
  Vector query[kEach];
  team.read(row_of<T>(call.query, batch, head, keys.begin), query);
  const T* from = row_of<T>(call.key, batch, head, keys.begin + start);
  float logit = kMinusInfinity;  // of key lane_id()
  for (int round = 0; round < team.lanes; round += kRounds) {
    Vector key[kRounds][kEach];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int64_t at = min(team.first + round + r, left - 1) * call.key.row_stride;  // past the end the last again
#pragma unroll
      for (int u = 0; u < kEach; ++u) key[r][u] = team.load(u, [&](int c) { return Vector::load_once(from + at + c); });
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float dot = 0.0f;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        float part = 0.0f;
        for (int e = 0; e < N; ++e) part += widen(query[u].at[e]) * widen(key[r][u].at[e]);
        if (team.has(u)) dot += part;
      }
      dot = team.sum(dot);
      if (round + r == team.lane) logit = dot * call.scale;
    }
  }
  const int64_t row_and_head = int64_t{batch} * heads + head;
  if (lane_id() < left) {
    call.class_row[row_and_head * call.shape.length + keys.begin + start + lane_id()] = logit;
  } else {
    logit = kMinusInfinity;
  }
  const float top = warp_max(logit);
  const float sum = warp_sum(expf(logit - finite_top(top)));
  if (lane_id() == 0) {
    float* statistics = call.workspace + 2 * (row_and_head * tiles + tile);
    statistics[0] = top;
    statistics[1] = sum;
  }
}

// Logits to probabilities, and their mean over heads. 8 threads join the statistics of a head, 16 heads at a time.
__global__ void __launch_bounds__(kChunkKeys) scores_kernel(const ClassScores call, const ClassRowPlan plan) {
  constexpr int kJoin = 8, kHeads = kChunkKeys / kJoin, kInFlight = 4;
  __shared__ float top_of[kHeads], inverse_of[kHeads];
  const int heads = int(call.shape.heads), chunks = int(plan.chunks), prefix = int(call.shape.prefix);
  const int chunk = int(blockIdx.x) % chunks, batch = int(blockIdx.x) / chunks;
  const int row = row_of_piece(call.shape, batch, chunk, kChunkKeys);
  const Keys keys(call.shape, row);
  const int start = (chunk - Keys::first_piece(call.shape, row, kChunkKeys)) * kChunkKeys;
  if (start < 0 || start >= keys.count) return;
  const int first_tile = Keys::first_piece(call.shape, row, kTileKeys);
  const int tiles = (keys.visible + kTileKeys - 1) / kTileKeys;
  const int key = start + int(threadIdx.x);
  float* logits = call.class_row + keys.batch * heads * call.shape.length + keys.begin + key;
  float score = 0.0f;
  for (int first = 0; first < heads; first += kHeads) {
    const int head = first + int(threadIdx.x) / kJoin, last = min(heads, first + kHeads);
    const float* statistics = call.workspace + 2 * ((keys.batch * heads + head) * plan.tiles + first_tile);
    const int own_tiles = head < heads ? tiles : 0;
    float top = kMinusInfinity, sum = 0.0f;
    for (int tile = int(threadIdx.x) % kJoin; tile < own_tiles; tile += kJoin) top = fmaxf(top, statistics[2 * tile]);
    for (int step = kJoin / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    top = finite_top(top);
    for (int tile = int(threadIdx.x) % kJoin; tile < own_tiles; tile += kJoin)
      sum += statistics[2 * tile + 1] * expf(statistics[2 * tile] - top);
    for (int step = kJoin / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    __syncthreads();  // what was joined before is read
    if (threadIdx.x % kJoin == 0) {
      top_of[threadIdx.x / kJoin] = top;
      inverse_of[threadIdx.x / kJoin] = 1.0f / sum;
    }
    __syncthreads();
    if (key >= keys.count) continue;
    for (int h = first; h < last; h += kInFlight) {
      float logit[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
        if (h + u < last && key < keys.visible) logit[u] = logits[(h + u) * call.shape.length];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (h + u >= last) break;
        const float p = key < keys.visible ? expf(logit[u] - top_of[h + u - first]) * inverse_of[h + u - first] : 0.0f;
        logits[(h + u) * call.shape.length] = p;
        score += p;
      }
    }
  }
  if (key >= keys.count) return;
  score /= float(heads);
  if (keys.packed) {
    call.scores[keys.begin + key] = key < prefix ? 0.0f : score;
  } else if (key >= prefix) {
    call.scores[keys.batch * (call.shape.length - prefix) + key - prefix] = score;
  }
}

// Widened, added in float32 and rounded once.
template <class T>
__device__ void add_to(T* to, float value) {
  *to = narrow<T>(widen(*to) + value);
}

template <class T, int N>
__global__ void __launch_bounds__(kSliceThreads, N == 1 ? 2 : 3)
    backward_kernel(const ClassScoresBackward call, const ClassRowPlan plan) {
  using Vector = Pack<T, N>;
  constexpr int kEach = Team<T, N>::kEach, kRounds = (Team<T, N>::kRounds + 2) / 4, kWarps = kSliceThreads / kWarp;
  __shared__ float area[4 * kMostWarps];
  __shared__ float partial[kWarps][kMostHeadDim];
  const int heads = int(call.shape.heads), slices = int(plan.slices), prefix = int(call.shape.prefix);
  const int block = int(blockIdx.x), head = block % heads, slice = block / heads % slices;
  const int batch = block / heads / slices, row = row_of_piece(call.shape, batch, slice, kSliceKeys);
  const Keys keys(call.shape, row);
  const int slice_start = (slice - Keys::first_piece(call.shape, row, kSliceKeys)) * kSliceKeys;
  if (slice_start < 0 || slice_start >= keys.count) return;
  const Team<T, N> team(call.shape.channels);
  Vector query[kEach];
  team.read(row_of<T>(call.query, keys.batch, head, keys.begin), query);

  const int64_t row_and_head = keys.batch * heads + head;
  const float* probability = call.class_row + row_and_head * call.shape.length + keys.begin;
  const float* grad_scores = call.grad_scores + keys.batch * call.grad_batch_stride +
                             (keys.packed ? keys.begin : int64_t{-prefix}) * call.grad_stride;
  const auto grad = [&](int key) { return key < prefix ? 0.0f : grad_scores[key * call.grad_stride]; };
  float part = 0.0f;
#pragma unroll 4
  for (int key = int(threadIdx.x); key < keys.count; key += kSliceThreads) part += probability[key] * grad(key);
  const float total = BlockSum(area)(part), factor = call.scale / float(heads);

  const int start = slice_start + warp_id() * kWarp, own = start + lane_id();
  const float of_own = own < keys.count ? factor * (probability[own] * (grad(own) - total)) : 0.0f;
  const int64_t channel_stride = N == 1 ? call.grad_key.channel_stride : 1;
  float sum[kOwn] = {};
  if (start < keys.count) {
    const T* from = row_of<T>(call.key, keys.batch, head, keys.begin + start);
    T* to = row_of<T>(call.grad_key, keys.batch, head, keys.begin + start);
#pragma unroll 1
    for (int round = 0; round < team.lanes; round += kRounds) {
      Vector key[kRounds][kEach], grad_key[kRounds][kEach];
      float of_logit[kRounds];
      int at[kRounds];
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        of_logit[r] = __shfl_sync(kAllLanes, of_own, team.first + round + r);
        at[r] = of_logit[r] != 0.0f ? team.first + round + r : 0;
#pragma unroll
        for (int u = 0; u < kEach; ++u) {
          const T* of_key = from + at[r] * call.key.row_stride;
          const T* of_grad = to + at[r] * call.grad_key.row_stride;
          key[r][u] = team.load(u, [&](int c) { return Vector::load_once(of_key + c); });
          grad_key[r][u] = team.load(u, [&](int c) { return Vector::load(of_grad + c * channel_stride); });
        }
      }
#pragma unroll
      for (int r = 0; r < kRounds; ++r) {
        if (of_logit[r] == 0.0f) continue;
#pragma unroll
        for (int u = 0; u < kEach; ++u) {
          for (int e = 0; e < N; ++e) {
            sum[u * N + e] += of_logit[r] * widen(key[r][u].at[e]);
            grad_key[r][u].at[e] = narrow<T>(widen(grad_key[r][u].at[e]) + of_logit[r] * widen(query[u].at[e]));
          }
          if (team.has(u))
            grad_key[r][u].store(to + at[r] * call.grad_key.row_stride + team.channel(u) * channel_stride);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kOwn; ++c)
    for (int step = team.lanes; step < kWarp; step *= 2) sum[c] += __shfl_xor_sync(kAllLanes, sum[c], step);
  if (team.first == 0) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) partial[warp_id()][team.channel(c / N) + c % N] = sum[c];
  }
  __syncthreads();
  const int channel = int(threadIdx.x);
  if (channel < team.channels) {
    float of_query = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) of_query += partial[warp][channel];
    if (keys.count <= kSliceKeys) {
      add_to(
          row_of<T>(call.grad_query, keys.batch, head, keys.begin) + channel * call.grad_query.channel_stride,
          of_query);
    } else {
      call.workspace[(row_and_head * slices + slice) * team.channels + channel] = of_query;
    }
  }
}

// A thread adds a channel's slices, in their order, to the gradient of the class token's query.
template <class T>
__global__ void __launch_bounds__(kSliceThreads) query_kernel(const ClassScoresBackward call, const ClassRowPlan plan) {
  const int heads = int(call.shape.heads), channels = int(call.shape.channels);
  const int64_t index = int64_t(blockIdx.x) * kSliceThreads + threadIdx.x;
  const int channel = int(index % channels), head = int(index / channels % heads);
  const int64_t row = index / channels / heads;
  if (row >= call.shape.rows) return;
  const Keys keys(call.shape, int(row));
  if (keys.count <= kSliceKeys) return;
  const int64_t first = (keys.batch * heads + head) * plan.slices + Keys::first_piece(call.shape, int(row), kSliceKeys);
  const float* from = call.workspace + first * channels + channel;
  float sum = 0.0f;
#pragma unroll 4
  for (int slice = 0; slice * kSliceKeys < keys.count; ++slice) sum += __ldcs(from + int64_t(slice) * channels);
  add_to(row_of<T>(call.grad_query, keys.batch, head, keys.begin) + channel * call.grad_query.channel_stride, sum);
}

// Whether vectors of 16 bytes can be used: pointers, strides and rows all multiples of them.
template <class Heads>
bool fits(const ClassRowShape& shape, const Heads& heads, int64_t size) {
  const auto whole = [&](int64_t stride) { return stride * size % 16 == 0; };
  return whole(shape.channels) && reinterpret_cast<uintptr_t>(heads.data) % 16 == 0 && whole(heads.row_stride) &&
         (shape.heads < 2 || whole(heads.head_stride)) && (shape.batch < 2 || whole(heads.batch_stride));
}

ClassRowPlan plan_of(const ClassRowShape& shape) {
  return plan_class_row(shape.length, shape.rows, shape.cu_seqlens.data != nullptr);
}

}  // namespace

int64_t class_scores_workspace(const ClassRowShape& shape) {
  return 2 * shape.batch * shape.heads * plan_of(shape).tiles;
}

cudaError_t launch_class_scores(const ClassScores& call, Element type, cudaStream_t stream) {
  const ClassRowShape& shape = call.shape;
  const ClassRowPlan plan = plan_of(shape);
  constexpr int64_t kWarps = kTileThreads / kWarp;
  const int64_t warps = shape.batch * shape.heads * plan.tiles, size = element_size(type);
  if (warps > INT32_MAX - kWarps) return cudaErrorInvalidConfiguration;  // their number is an int in the kernel
  const bool wide = fits(shape, call.query, size) && fits(shape, call.key, size);
  const cudaError_t error = for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t blocks = (warps + kWarps - 1) / kWarps;
    return launch(logits_kernel<T, elements()>, blocks, kTileThreads, 0, stream, call, plan);
  });
  if (error != cudaSuccess) return error;
  return launch(scores_kernel, shape.batch * plan.chunks, kChunkKeys, 0, stream, call, plan);
}

int64_t class_scores_backward_workspace(const ClassRowShape& shape) {
  return shape.length <= kSliceKeys ? 0 : shape.batch * shape.heads * plan_of(shape).slices * shape.channels;
}

cudaError_t launch_class_scores_backward(const ClassScoresBackward& call, Element type, cudaStream_t stream) {
  const ClassRowShape& shape = call.shape;
  const ClassRowPlan plan = plan_of(shape);
  const int64_t size = element_size(type);
  const bool wide = fits(shape, call.query, size) && fits(shape, call.key, size) && fits(shape, call.grad_key, size) &&
                    call.grad_key.channel_stride == 1;
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t blocks = shape.batch * shape.heads * plan.slices;
    const cudaError_t error = launch(backward_kernel<T, elements()>, blocks, kSliceThreads, 0, stream, call, plan);
    if (error != cudaSuccess || shape.length <= kSliceKeys) return error;
    const int64_t sums = shape.rows * shape.heads * shape.channels;
    return launch(query_kernel<T>, (sums + kSliceThreads - 1) / kSliceThreads, kSliceThreads, 0, stream, call, plan);
  });
}

}  // namespace xray
