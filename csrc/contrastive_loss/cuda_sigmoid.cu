// CUDA kernel of sigmoid_contrastive: the loss of a panel of logits, and its gradient by them.
//
// With x = z_ij (S_ij + bias) and e = exp(-|x|): loss = log(1 + e) - min(x, 0) and dS = -z / (1 + exp(x)), one
// exponential for both. A block takes 64 rows and 32 lanes times 16 bytes of dS in columns, as gradient_kernel does;
// ranks are counted on the way. Sums of loss and dS go from float32 within four rows of a lane to float64, and to the
// block's place among the partial sums, which it owns in every panel: their total is taken once, at the end.
// Bytes: 4 read a logit, 2 or 4 written where gradients are wanted.
//
// |dS| is at most 1, and small for most pairs: 5e-5 where SigLIP starts, 2e-9 for a logit of -20. float16 ends at 6e-8,
// so dS in half precision is multiplied by 4,096: then it ends at 1.5e-11.

#include "contrastive_loss/cuda_panel.cuh"

namespace xray {
namespace {

template <class T, bool kWide>
__global__ void __launch_bounds__(kPanelThreads, kWide ? 2 : 1)
    sigmoid_kernel(const SigmoidPanel call, const int column_tiles) {
  constexpr int kEach = 16 / int(sizeof(T)), kColumns = kEach * kWarp;
  static_assert(kTileRows == kPanelWarps * kRowsAtOnce);
  constexpr float kFactor = sizeof(T) == 2 ? kLargestGradient : 1.0f;
  __shared__ unsigned column_ahead[kColumns];
  __shared__ double sums[2][kPanelWarps];
  const int rows = int(call.rows), first = int(blockIdx.x) / column_tiles * kTileRows + warp_id() * kRowsAtOnce;
  const PanelPairs& pairs = call.pairs;
  const LaneColumns<kEach, kWide> own{int(blockIdx.x) % column_tiles * kColumns, int(call.columns)};
  for (int c = int(threadIdx.x); c < kColumns; c += kPanelThreads) column_ahead[c] = 0;
  __syncthreads();

  const float scale = *call.scale, bias = *call.bias;
  int label[kEach];
  own.read(pairs.column_labels, label);
  float pair[kEach] = {};
  if (pairs.column_pairs) own.read(pairs.column_pairs, pair);
  unsigned ahead[kEach] = {}, row_ahead[kRowsAtOnce] = {};
  double loss = 0.0, grad_bias = 0.0;
#pragma unroll
  for (int batch = 0; batch < kRowsAtOnce; batch += kBatch) {
    float logit[kBatch][kEach], part = 0.0f, grad_part = 0.0f;
#pragma unroll
    for (int r = 0; r < kBatch; ++r)
      own.read_row(call.logits + min(first + batch + r, rows - 1) * call.stride, logit[r]);
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const int row = first + batch + r;
      if (row >= rows) break;
      const int row_label = pairs.row_labels[row];
      const float row_pair = pairs.row_pairs ? pairs.row_pairs[row] : 0.0f;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        if (!own.has(u)) continue;
        const float s = __fmul_rn(logit[r][u], scale);
        const bool is_positive = label[u] == row_label;
        row_ahead[batch + r] += !is_positive && s >= row_pair;
        ahead[u] += !is_positive && s >= pair[u];
        const float x = is_positive ? s + bias : -(s + bias), e = expf(-fabsf(x));
        part += log1pf(e) - fminf(x, 0.0f);
        const float grad = (x < 0.0f ? 1.0f : e) / (1.0f + e);
        logit[r][u] = is_positive ? -grad : grad;
        grad_part += logit[r][u];
        logit[r][u] *= kFactor;
      }
      if (call.out) own.write_row(static_cast<T*>(call.out) + row * call.out_stride, logit[r]);
    }
    loss += double(part);
    grad_bias += double(grad_part);
  }

  if (pairs.row_pairs) {
    const unsigned places = fold_rows(row_ahead, Add());
    const int row = first + lane_id() / lane_of_row(1);
    if (lane_id() % lane_of_row(1) == 0 && row < rows && places) atomicAdd(pairs.row_ranks + row, places);
  }
#pragma unroll
  for (int u = 0; u < kEach; ++u)
    if (pairs.column_pairs && ahead[u]) atomicAdd(column_ahead + own.in_tile(u), ahead[u]);
  // its barrier is also the one between adding to column_ahead and reading it
  loss = block_total(loss, sums[0]);
  grad_bias = block_total(grad_bias, sums[1]);
  if (threadIdx.x == 0) {
    call.partials[2 * blockIdx.x] += loss;
    call.partials[2 * blockIdx.x + 1] += grad_bias;
  }
  for (int c = int(threadIdx.x); c < kColumns && own.first + c < own.count; c += kPanelThreads)
    if (column_ahead[c]) atomicAdd(pairs.column_ranks + own.first + c, column_ahead[c]);
}

}  // namespace

cudaError_t launch_sigmoid(const SigmoidPanel& call, Element type, cudaStream_t stream) {
  const bool wide =
      fits(call.logits, call.stride, 4) && (!call.out || fits(call.out, call.out_stride, element_size(type)));
  return for_vectors(type, wide, [&](auto* null, auto elements) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t row_tiles = divide_up(call.rows, kTileRows);
    const int64_t column_tiles = divide_up(call.columns, kWarp * 16 / int(sizeof(T)));
    return launch(
        sigmoid_kernel<T, elements() != 1>, row_tiles * column_tiles, kPanelThreads, 0, stream, call,
        int(column_tiles));
  });
}

}  // namespace xray
