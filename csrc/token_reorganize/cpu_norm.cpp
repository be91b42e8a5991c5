// CPU kernels of add_reorganize_norm: one pass over residual and update; threads over batch rows. When the batch is
// smaller than the number of threads, forward is two passes (sum and reorganise by channels, then normalise by rows),
// and backward takes the rows of the stream, then the dropped tokens, in pieces.

#define XRAY_KERNEL_FILE "token_reorganize/cpu_kernel.h"
#include "common/variants.h"

#include "token_reorganize/cpu_common.h"

namespace xray {
namespace {

template <class S>
std::vector<S> widened(const Tensor& vector, const char* name) {
  std::vector<S> values(vector.size(0));
  read_row(vector, name, 0, vector.stride(0), values);
  return values;
}

std::tuple<Tensor, Tensor, Tensor> add_reorganize_norm(
    Tensor residual, Tensor update, Tensor scores, int64_t keep, Tensor weight, Tensor bias, double eps, int64_t prefix,
    bool fuse) {
  residual = with_dense_rows(residual);
  update = with_dense_rows(update);
  const int64_t batch = residual.size(0), length = residual.size(1), channels = residual.size(2);
  const int64_t candidates = length - prefix, rows = prefix + keep + fuse;
  STD_TORCH_CHECK(0 < keep && keep <= candidates, "num_keep must be from 1 to ", candidates, ", got ", keep);
  Tensor stream = new_result(residual, {batch, rows, channels});
  Tensor normed = new_result(residual, {batch, rows, channels});
  Tensor indices = new_result(residual, {batch, keep}, ScalarType::Long);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());

  for_element_type(residual, "residual", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const std::vector<S> w = widened<S>(weight, "weight"), shift = widened<S>(bias, "bias");
    const T* first_residual = static_cast<const T*>(residual.const_data_ptr());
    const T* first_update = static_cast<const T*>(update.const_data_ptr());
    T* to_stream = static_cast<T*>(stream.mutable_data_ptr());
    T* to_normed = static_cast<T*>(normed.mutable_data_ptr());
    const int64_t pieces = plan_channel_pieces(batch, channels, sizeof(T), torch::stable::get_num_threads());
    const bool past_caches =
        pieces == 1 && writes_past_caches(2 * stream.numel() * sizeof(T), channels, {to_stream, to_normed});
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      RowPlan<S> plan(candidates);
      std::vector<S> sum(fuse ? channels : 0), kept(channels);
      std::vector<int64_t> unused(keep);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        plan.read_scores(scores, b);
        plan.select(keep, piece == 0 ? index + b * keep : unused.data());
        XRAY_CALL_VARIANT(
            add_reorganize_norm_row<T>, to_stream + b * rows * channels,
            pieces == 1 ? to_normed + b * rows * channels : nullptr, first_residual + b * residual.stride(0),
            residual.stride(1), first_update + b * update.stride(0), update.stride(1), plan.scores.data(),
            plan.place.data(), w.data(), shift.data(), eps, kept.data(), fuse ? sum.data() : nullptr, length, prefix,
            keep, channels, piece_begin(piece, pieces, channels), piece_begin(piece + 1, pieces, channels),
            past_caches);
      }
    });
    if (pieces == 1) return;
    torch::stable::parallel_for(0, batch * rows, 16, [&](int64_t first, int64_t last) {
      std::vector<S> kept(channels);
      XRAY_CALL_VARIANT(
          norm_rows<T>, to_normed, to_stream, w.data(), shift.data(), eps, kept.data(), channels, first, last);
    });
  });
  return {stream, normed, indices};
}

// Sums `parts` (count, C) in order into a tensor of C elements.
template <class S>
void sum_parts(const std::vector<S>& parts, Tensor& result, const char* name) {
  const int64_t channels = result.size(0), count = channels ? int64_t(parts.size()) / channels : 0;
  for_element_type(result, name, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(result.mutable_data_ptr());
    std::vector<double> sum(channels);
    for (int64_t part = 0; part < count; ++part)
      for (int64_t c = 0; c < channels; ++c) sum[c] += parts[part * channels + c];
    for (int64_t c = 0; c < channels; ++c) to[c] = narrow<T>(WideScalar<T>(sum[c]));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_reorganize_norm_backward(
    Tensor grad_stream, Tensor grad_normed, Tensor residual, Tensor update, Tensor scores, Tensor indices,
    Tensor stream, Tensor weight, Tensor bias, double eps, int64_t prefix, bool fuse) {
  grad_stream = with_dense_rows(grad_stream);
  grad_normed = with_dense_rows(grad_normed);
  residual = with_dense_rows(residual);
  update = with_dense_rows(update);
  stream = torch::stable::contiguous(stream);
  indices = torch::stable::contiguous(indices);
  const int64_t batch = residual.size(0), length = residual.size(1), channels = residual.size(2);
  const int64_t candidates = length - prefix, keep = indices.size(1), rows = prefix + keep + fuse;
  Tensor grad_tokens = new_result(residual, {batch, length, channels});
  Tensor grad_scores = new_result(scores, {batch, candidates});
  Tensor grad_weight = new_result(weight, {channels});
  Tensor grad_bias = new_result(bias, {channels});
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());

  for_element_type(residual, "residual", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const std::vector<S> w = widened<S>(weight, "weight");
    const T* from_stream = static_cast<const T*>(grad_stream.const_data_ptr());
    const T* from_normed = static_cast<const T*>(grad_normed.const_data_ptr());
    const T* saved = static_cast<const T*>(stream.const_data_ptr());
    const T* first_residual = static_cast<const T*>(residual.const_data_ptr());
    const T* first_update = static_cast<const T*>(update.const_data_ptr());
    T* to = static_cast<T*>(grad_tokens.mutable_data_ptr());
    const bool past_caches = writes_past_caches(grad_tokens.numel() * sizeof(T), channels, {to});
    const int64_t pieces = plan_row_pieces(batch, length, torch::stable::get_num_threads());
    // each item's parts of the gradients of weight and bias, summed in order afterwards: two runs give the same bits
    std::vector<S> weights(batch * pieces * channels), biases(batch * pieces * channels);
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      RowPlan<S> plan(candidates);
      std::vector<S> kept(channels), grad_fused(fuse ? channels : 0), unused(channels), score_grads(candidates);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        plan.read_scores(scores, b);
        plan.recall(index + b * keep, keep);
        S *weight_part = weights.data() + item * channels, *bias_part = biases.data() + item * channels;
        if (fuse) {  // every piece needs the fused row's gradient, and one of them counts it
          const int64_t i = prefix + keep;
          XRAY_CALL_VARIANT(
              fused_row_backward<T>, grad_fused.data(),
              from_stream + b * grad_stream.stride(0) + i * grad_stream.stride(1),
              from_normed + b * grad_normed.stride(0) + i * grad_normed.stride(1), saved + (b * rows + i) * channels,
              w.data(), eps, kept.data(), piece == 0 ? weight_part : unused.data(),
              piece == 0 ? bias_part : unused.data(), channels);
        }
        XRAY_CALL_VARIANT(
            add_reorganize_norm_kept_backward<T>, to + b * length * channels, from_stream + b * grad_stream.stride(0),
            grad_stream.stride(1), from_normed + b * grad_normed.stride(0), grad_normed.stride(1),
            saved + b * rows * channels, index + b * keep, w.data(), eps, kept.data(), weight_part, bias_part, prefix,
            channels, (prefix + keep) * piece / pieces, (prefix + keep) * (piece + 1) / pieces, past_caches);
        const int64_t begin = candidates * piece / pieces, end = candidates * (piece + 1) / pieces;
        XRAY_CALL_VARIANT(
            add_reorganize_norm_dropped_backward<T>, to + b * length * channels, score_grads.data(),
            fuse ? grad_fused.data() : nullptr, first_residual + b * residual.stride(0), residual.stride(1),
            first_update + b * update.stride(0), update.stride(1), plan.scores.data(), plan.place.data(), prefix,
            channels, begin, end, past_caches);
        for_element_type(grad_scores, "scores", [&](auto score_type) {
          using U = decltype(score_type);
          U* result = static_cast<U*>(grad_scores.mutable_data_ptr()) + b * candidates;
          for (int64_t i = begin; i < end; ++i) result[i] = narrow<U>(WideScalar<U>(score_grads[i]));
        });
      }
    });
    sum_parts(weights, grad_weight, "weight");
    sum_parts(biases, grad_bias, "bias");
  });
  return {grad_tokens, grad_scores, grad_weight, grad_bias};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CPU, m) {
  m.impl("add_reorganize_norm", TORCH_BOX(&xray::add_reorganize_norm));
  m.impl("add_reorganize_norm_backward", TORCH_BOX(&xray::add_reorganize_norm_backward));
}
