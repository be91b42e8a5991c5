// CUDA forward of token reorganisation, alone and between a residual addition and a LayerNorm.
//
// One launch of two kinds of blocks (see plan_reorganize). Copying blocks take some rows of one batch row each, find
// the place of every candidate among them (cuda_select.cuh) and scatter the kept ones, a warp a row with all its
// 16-byte loads in flight. Fusing blocks, first in the grid because they read the most, find only the limit below which
// candidates are dropped, list the dropped ones by index and sum a slice of channels over them. So each token row is
// read by one block only, nothing passes between blocks, and no sum depends on timing: two runs give the same bits.
//
// With `norm` a warp holds the row residual + update, as rounded to its type, in shared memory for LayerNorm's mean and
// variance (two passes, float32), and one block sums the whole fused row, since its LayerNorm needs all channels.
// Where that block would outlast the others (a small batch of long rows) it is sliced as well, and a second launch of
// one block a batch row normalises the fused rows.
//
// Bytes: B C (N + P + K + 1) elements, and 2 B C (N + P + K + 1) with `norm`: each row once in and once out.
// FLOPs: 2 C a dropped token; 9 C more a result row with `norm`.
//
// What lost: one block for each slice of 512 bytes of a batch row, copying and summing all N rows. It reads as much,
// but needs the whole order in every slice (M log M, not M / 9 places), and has only three blocks for one row of 768
// bfloat16 channels, where this has 123. A thread block cluster would sum the fused row of `norm` in one launch always,
// but sm_80 has none.

#include "common/plan.h"
#include "token_reorganize/cuda_rows.cuh"
#include "token_reorganize/cuda_select.cuh"

namespace xray {
namespace {

// One warp: out = residual + update and its LayerNorm. `held` is the warp's place for a row in shared memory, or null
// for a row too long; then each lane reads again what it wrote.
template <class T, int N>
__device__ void add_norm_row(
    const ReorganizeForward& call, T* out, T* normed, const T* residual, const T* update, T* held, int vectors) {
  using Vector = Pack<T, N>;
  constexpr int kEach = kInFlight / 2, kStep = kWarp * N;
  int64_t c = lane_id() * N;
  for (int left = vectors - lane_id(); left > 0; left -= kWarp * kEach) {
    Vector a[kEach], b[kEach];  // nothing but loads under a condition: then they are predicated, and all in flight
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (u * kWarp < left) a[u] = Vector::load_once(residual + c + u * kStep);
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (u * kWarp < left) b[u] = Vector::load_once(update + c + u * kStep);
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (u * kWarp < left) {
        const Vector sum = a[u] + b[u];
        sum.store(out + c + u * kStep);
        if (held) sum.store(held + c + u * kStep);
      }
    }
    c += kEach * kStep;
  }
  WarpSum sum;
  normalise_stored_row<T, N>(call, normed, held ? held : out, vectors, lane_id(), kWarp, sum);
}

template <class T, int N, bool kNorm>
__device__ void copy_block(const ReorganizeForward& call, const ReorganizePlan& plan, int64_t block) {
  const ReorganizeShape& shape = call.shape;
  const int64_t b = block / plan.copy_blocks;
  const int first = int(block % plan.copy_blocks * plan.rows), prefix = int(shape.prefix), keep = int(shape.keep);
  const int last = min(int(shape.length), first + int(plan.rows)), vectors = int(shape.channels / N);
  Selection select(dynamic_shared(), int(shape.length) - prefix, [&](int i) { return score_of<T>(call.scores, b, i); });
  select.bucket_all();
  unsigned char* place_of_row = dynamic_shared() + plan.select_bytes + warp_id() * plan.held_bytes;
  T* held = kNorm && plan.held_bytes ? reinterpret_cast<T*>(place_of_row) : nullptr;
  for (int row = first + warp_id(); row < last; row += warp_count()) {
    int to = row;
    if (row >= prefix) {
      const int place = select.place_of(row - prefix, keep);
      if (place == keep) continue;
      if (lane_id() == 0) call.indices[b * keep + place] = row - prefix;
      to = prefix + place;
    }
    const int64_t at = (b * (prefix + keep + shape.fuse) + to) * shape.channels;
    T* out = static_cast<T*>(call.out) + at;
    const T* token = row_of<T>(call.tokens, b, row);
    if constexpr (kNorm) {
      add_norm_row<T, N>(
          call, out, static_cast<T*>(call.normed) + at, token, row_of<T>(call.update, b, row), held, vectors);
    } else {
      copy_row<T, N>(out, token, vectors);
    }
  }
}

// Threads share the dropped rows: `lanes` neighbours read one row's vectors, as many such teams as fit take rows in
// turn, four in flight each, and their sums are joined in the order of the teams.
template <class T, int N, bool kNorm>
__device__ void fuse_block(const ReorganizeForward& call, const ReorganizePlan& plan, int64_t block) {
  using Vector = Pack<T, N>;
  constexpr int kRows = 4;
  const ReorganizeShape& shape = call.shape;
  const int64_t b = block / plan.fuse_blocks;
  const int vectors = int(shape.channels / N), prefix = int(shape.prefix), keep = int(shape.keep);
  const int begin = int(block % plan.fuse_blocks * plan.fuse_vectors);
  const int end = min(vectors, begin + int(plan.fuse_vectors));
  const int candidates = int(shape.length) - prefix, dropped = candidates - keep;
  Selection select(dynamic_shared(), candidates, [&](int i) { return score_of<T>(call.scores, b, i); });
  const uint16_t* list = select.list_dropped(select.keep_limit(keep));
  float* weight = reinterpret_cast<float*>(dynamic_shared() + (2 * candidates + 15) / 16 * 16);  // where the keys were
  float* partial = weight + (candidates + 3) / 4 * 4;
  for (int d = threadIdx.x; d < dropped; d += kReorganizeThreads) weight[d] = score_of<T>(call.scores, b, list[d]);
  __syncthreads();

  const int64_t at = (b * (prefix + keep + 1) + prefix + keep) * shape.channels;
  T* out = static_cast<T*>(call.out) + at;
  const int lanes = min(kReorganizeThreads, end - begin), teams = kReorganizeThreads / lanes;
  const int team = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes;
  for (int chunk = begin; chunk < end; chunk += lanes) {
    const int width = min(lanes, end - chunk) * N;
    const bool has_work = team < teams && lane * N < width;
    const int64_t c = int64_t(chunk + lane) * N;
    const T* token = row_of<T>(call.tokens, b, prefix) + c;
    const T* change = kNorm ? row_of<T>(call.update, b, prefix) + c : nullptr;
    float sum[N] = {};
    for (int first = team; has_work && first < dropped; first += teams * kRows) {
      Vector row[kRows], update[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {  // past the end the last row again: no branch between the loads
        const int i = list[min(first + u * teams, dropped - 1)];
        row[u] = Vector::load_once(token + i * call.tokens.row_stride);
        if constexpr (kNorm) update[u] = Vector::load_once(change + i * call.update.row_stride);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (first + u * teams < dropped) {
          if constexpr (kNorm) row[u] = row[u] + update[u];
#pragma unroll
          for (int e = 0; e < N; ++e) sum[e] += weight[first + u * teams] * widen(row[u].at[e]);
        }
      }
    }
    __syncthreads();  // the sums of the chunk before are read
    if (has_work) {
#pragma unroll
      for (int e = 0; e < N; ++e) partial[team * width + lane * N + e] = sum[e];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < width; e += kReorganizeThreads) {
      float total = 0.0f;
      for (int t = 0; t < teams; ++t) total += partial[t * width + e];
      out[int64_t(chunk) * N + e] = narrow<T>(total);
    }
  }
  if constexpr (kNorm) {
    if (plan.fuse_blocks > 1) return;
    __shared__ float area[4 * kMostWarps];
    BlockSum sum(area);
    __syncthreads();  // the row is written
    normalise_stored_row<T, N>(
        call, static_cast<T*>(call.normed) + at, out, vectors, int(threadIdx.x), kReorganizeThreads, sum);
  }
}

template <class T, int N, bool kNorm>
__global__ void __launch_bounds__(kReorganizeThreads, kNorm ? 2 : 3)
    reorganize_kernel(const ReorganizeForward call, const ReorganizePlan plan) {
  const int64_t fusing = call.shape.batch * plan.fuse_blocks;
  if (blockIdx.x < fusing) {
    fuse_block<T, N, kNorm>(call, plan, blockIdx.x);
  } else {
    copy_block<T, N, kNorm>(call, plan, blockIdx.x - fusing);
  }
}

// One block a batch row: LayerNorm of the fused row that a launch before this one wrote.
template <class T, int N>
__global__ void __launch_bounds__(kReorganizeThreads) norm_fused_kernel(const ReorganizeForward call) {
  __shared__ float area[4 * kMostWarps];
  BlockSum sum(area);
  const ReorganizeShape& shape = call.shape;
  const int64_t rows = shape.prefix + shape.keep + 1;
  const int64_t at = (int64_t(blockIdx.x) * rows + rows - 1) * shape.channels;
  normalise_stored_row<T, N>(
      call, static_cast<T*>(call.normed) + at, static_cast<const T*>(call.out) + at, int(shape.channels / N),
      int(threadIdx.x), kReorganizeThreads, sum);
}

template <class T, int N, bool kNorm>
cudaError_t launch_forward(const ReorganizeForward& call, cudaStream_t stream) {
  const ReorganizeShape& shape = call.shape;
  const ReorganizePlan plan = plan_reorganize(
      shape.batch, shape.length, shape.prefix, shape.keep, shape.channels / N, N * sizeof(T), N, shape.fuse, kNorm,
      processor_count());
  const cudaError_t error = launch(
      reorganize_kernel<T, N, kNorm>, shape.batch * (plan.copy_blocks + plan.fuse_blocks), kReorganizeThreads,
      plan.select_bytes + kReorganizeThreads / kWarp * plan.held_bytes, stream, call, plan);
  if (!kNorm || error != cudaSuccess || plan.fuse_blocks < 2) return error;
  return launch(norm_fused_kernel<T, N>, shape.batch, kReorganizeThreads, 0, stream, call);
}

}  // namespace

cudaError_t launch_reorganize(const ReorganizeForward& call, Element type, cudaStream_t stream) {
  const bool wide = Alignment(call.shape, element_size(type)).with(call.tokens).with(call.out).fits();
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    return launch_forward<std::remove_pointer_t<decltype(null)>, elements(), false>(call, stream);
  });
}

cudaError_t launch_add_reorganize_norm(const ReorganizeForward& call, Element type, cudaStream_t stream) {
  Alignment alignment(call.shape, element_size(type));
  alignment.with(call.tokens).with(call.update).with(call.weight).with(call.bias).with(call.out).with(call.normed);
  return for_vectors(type, alignment.fits(), [&](auto* null, auto elements) {
    return launch_forward<std::remove_pointer_t<decltype(null)>, elements(), true>(call, stream);
  });
}

}  // namespace xray
