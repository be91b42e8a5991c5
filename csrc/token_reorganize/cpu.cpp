// CPU kernels of token reorganisation: selection, then one pass over the tokens; threads over batch rows, and over
// channels when the batch is smaller than the number of threads.

#define XRAY_KERNEL_FILE "token_reorganize/cpu_kernel.h"
#include "common/variants.h"

#include "token_reorganize/cpu_common.h"

namespace xray {
namespace {

std::tuple<Tensor, Tensor> reorganize_tokens(Tensor tokens, Tensor scores, int64_t keep, int64_t prefix, bool fuse) {
  tokens = with_dense_rows(tokens);
  const int64_t batch = tokens.size(0), length = tokens.size(1), channels = tokens.size(2);
  const int64_t candidates = length - prefix, rows = prefix + keep + fuse;
  STD_TORCH_CHECK(0 < keep && keep <= candidates, "num_keep must be from 1 to ", candidates, ", got ", keep);
  Tensor out = new_result(tokens, {batch, rows, channels});
  Tensor indices = new_result(tokens, {batch, keep}, ScalarType::Long);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());

  for_element_type(tokens, "tokens", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const T* from = static_cast<const T*>(tokens.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const bool past_caches = writes_past_caches(out.numel() * sizeof(T), channels, {to});
    const int64_t pieces = plan_channel_pieces(batch, channels, sizeof(T), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      RowPlan<S> plan(candidates);
      std::vector<S> sum(fuse ? channels : 0);
      std::vector<int64_t> unused(keep);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        plan.read_scores(scores, b);
        plan.select(keep, piece == 0 ? index + b * keep : unused.data());
        XRAY_CALL_VARIANT(
            reorganize_row<T>, to + b * rows * channels, from + b * tokens.stride(0), tokens.stride(1),
            plan.scores.data(), plan.place.data(), fuse ? sum.data() : nullptr, length, prefix, keep, channels,
            piece_begin(piece, pieces, channels), piece_begin(piece + 1, pieces, channels), past_caches);
      }
    });
  });
  return {out, indices};
}

std::tuple<Tensor, Tensor> reorganize_tokens_backward(
    Tensor grad, Tensor tokens, Tensor scores, Tensor indices, int64_t prefix, bool fuse) {
  grad = with_dense_rows(grad);
  tokens = with_dense_rows(tokens);
  indices = torch::stable::contiguous(indices);
  const int64_t batch = tokens.size(0), length = tokens.size(1), channels = tokens.size(2);
  const int64_t candidates = length - prefix, keep = indices.size(1);
  Tensor grad_tokens = new_result(tokens, {batch, length, channels});
  Tensor grad_scores = new_result(scores, {batch, candidates});
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());

  for_element_type(tokens, "tokens", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    const T* token = static_cast<const T*>(tokens.const_data_ptr());
    T* to = static_cast<T*>(grad_tokens.mutable_data_ptr());
    const bool past_caches = writes_past_caches(grad_tokens.numel() * sizeof(T), channels, {to});
    const int64_t pieces = plan_channel_pieces(batch, channels, sizeof(T), torch::stable::get_num_threads());
    std::vector<S> parts(batch * pieces * candidates);
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      RowPlan<S> plan(candidates);
      std::vector<S> grad_fused(fuse ? channels : 0);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        plan.read_scores(scores, b);
        plan.recall(index + b * keep, keep);
        XRAY_CALL_VARIANT(
            reorganize_row_backward<T>, to + b * length * channels, parts.data() + item * candidates,
            from + b * grad.stride(0), grad.stride(1), token + b * tokens.stride(0), tokens.stride(1),
            plan.scores.data(), index + b * keep, plan.place.data(), fuse ? grad_fused.data() : nullptr, length, prefix,
            keep, channels, piece_begin(piece, pieces, channels), piece_begin(piece + 1, pieces, channels),
            past_caches);
      }
    });
    // the pieces' parts in a fixed order: the sum does not depend on which thread was first
    for_element_type(grad_scores, "scores", [&](auto score_type) {
      using U = decltype(score_type);
      U* result = static_cast<U*>(grad_scores.mutable_data_ptr());
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < candidates; ++i) {
          S sum = 0;
          for (int64_t piece = 0; piece < pieces; ++piece) sum += parts[(b * pieces + piece) * candidates + i];
          result[b * candidates + i] = narrow<U>(WideScalar<U>(sum));
        }
    });
  });
  return {grad_tokens, grad_scores};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CPU, m) {
  m.impl("reorganize_tokens", TORCH_BOX(&xray::reorganize_tokens));
  m.impl("reorganize_tokens_backward", TORCH_BOX(&xray::reorganize_tokens_backward));
}
