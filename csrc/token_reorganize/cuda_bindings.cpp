// Binds the CUDA kernels of token reorganisation to the ops. Not measured on a GPU yet: selected by XRAY_KERNELS=cuda.

#include "token_reorganize/cuda.h"

#include "common/cuda_stream.h"

namespace xray {
namespace {

RowsIn rows(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

ScoresIn scores_in(const Tensor& scores, const Tensor& tokens) {
  STD_TORCH_CHECK(
      scores.scalar_type() == ScalarType::Float || scores.scalar_type() == tokens.scalar_type(),
      "scores must be float32 or the dtype of the tokens for the CUDA kernel");
  return {scores.const_data_ptr(), scores.stride(0), scores.stride(1), scores.scalar_type() == ScalarType::Float};
}

ReorganizeShape shape_of(const Tensor& tokens, int64_t keep, int64_t prefix, bool fuse) {
  const ReorganizeShape shape{tokens.size(0), tokens.size(1), tokens.size(2), prefix, keep, fuse};
  const int64_t candidates = shape.length - prefix;
  STD_TORCH_CHECK(
      candidates <= kMostCandidates, "tokens has ", candidates, " candidates; the CUDA kernel takes at most ",
      kMostCandidates, " (XRAY_KERNELS=reference takes any number)");
  STD_TORCH_CHECK(0 < keep && keep <= candidates, "num_keep must be from 1 to ", candidates, ", got ", keep);
  STD_TORCH_CHECK(
      shape.length <= INT32_MAX && shape.channels <= INT32_MAX, "tokens must have fewer than 2^31 rows and channels");
  return shape;
}

Tensor new_indices(const Tensor& tokens, int64_t keep) {
  return torch::stable::new_empty(tokens, {tokens.size(0), keep}, ScalarType::Long);
}

std::tuple<Tensor, Tensor> reorganize_tokens(Tensor tokens, Tensor scores, int64_t keep, int64_t prefix, bool fuse) {
  const OnDevice device(tokens);
  tokens = with_dense_rows(tokens);
  ReorganizeForward call{};
  call.shape = shape_of(tokens, keep, prefix, fuse);
  Tensor out = torch::stable::new_empty(tokens, {call.shape.batch, prefix + keep + fuse, call.shape.channels});
  Tensor indices = new_indices(tokens, keep);
  if (call.shape.batch == 0) return {out, indices};
  call.tokens = rows(tokens);
  call.scores = scores_in(scores, tokens);
  call.out = out.mutable_data_ptr();
  call.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  check_launch(launch_reorganize(call, element(tokens, "tokens"), device.stream()), "reorganize_tokens");
  return {out, indices};
}

std::tuple<Tensor, Tensor> reorganize_tokens_backward(
    Tensor grad, Tensor tokens, Tensor scores, Tensor indices, int64_t prefix, bool fuse) {
  const OnDevice device(tokens);
  grad = with_dense_rows(grad);
  tokens = with_dense_rows(tokens);
  indices = torch::stable::contiguous(indices);
  ReorganizeBackward call{};
  call.shape = shape_of(tokens, indices.size(1), prefix, fuse);
  Tensor grad_tokens = torch::stable::new_empty(tokens, {call.shape.batch, call.shape.length, call.shape.channels});
  Tensor grad_scores = torch::stable::new_empty(scores, {call.shape.batch, call.shape.length - prefix});
  if (call.shape.batch == 0) return {grad_tokens, grad_scores};
  call.grad = rows(grad);
  call.tokens = rows(tokens);
  call.scores = scores_in(scores, tokens);
  call.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  call.grad_tokens = grad_tokens.mutable_data_ptr();
  call.grad_scores = grad_scores.mutable_data_ptr();
  check_launch(
      launch_reorganize_backward(call, element(tokens, "tokens"), device.stream()), "reorganize_tokens_backward");
  return {grad_tokens, grad_scores};
}

std::tuple<Tensor, Tensor, Tensor> add_reorganize_norm(
    Tensor residual, Tensor update, Tensor scores, int64_t keep, Tensor weight, Tensor bias, double eps, int64_t prefix,
    bool fuse) {
  const OnDevice device(residual);
  residual = with_dense_rows(residual);
  update = with_dense_rows(update);
  weight = torch::stable::contiguous(weight);
  bias = torch::stable::contiguous(bias);
  ReorganizeForward call{};
  call.shape = shape_of(residual, keep, prefix, fuse);
  Tensor stream = torch::stable::new_empty(residual, {call.shape.batch, prefix + keep + fuse, call.shape.channels});
  Tensor normed = torch::stable::new_empty(residual, {call.shape.batch, prefix + keep + fuse, call.shape.channels});
  Tensor indices = new_indices(residual, keep);
  if (call.shape.batch == 0) return {stream, normed, indices};
  call.tokens = rows(residual);
  call.update = rows(update);
  call.scores = scores_in(scores, residual);
  call.weight = weight.const_data_ptr();
  call.bias = bias.const_data_ptr();
  call.eps = float(eps);
  call.out = stream.mutable_data_ptr();
  call.normed = normed.mutable_data_ptr();
  call.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  check_launch(launch_add_reorganize_norm(call, element(residual, "tokens"), device.stream()), "add_reorganize_norm");
  return {stream, normed, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_reorganize_norm_backward(
    Tensor grad_stream, Tensor grad_normed, Tensor residual, Tensor update, Tensor scores, Tensor indices,
    Tensor stream, Tensor weight, Tensor bias, double eps, int64_t prefix, bool fuse) {
  const OnDevice device(residual);
  grad_stream = with_dense_rows(grad_stream);
  grad_normed = with_dense_rows(grad_normed);
  residual = with_dense_rows(residual);
  update = with_dense_rows(update);
  stream = with_dense_rows(stream);
  indices = torch::stable::contiguous(indices);
  weight = torch::stable::contiguous(weight);
  ReorganizeBackward call{};
  call.shape = shape_of(residual, indices.size(1), prefix, fuse);
  const ReorganizeShape& shape = call.shape;
  Tensor grad_tokens = torch::stable::new_empty(residual, {shape.batch, shape.length, shape.channels});
  Tensor grad_scores = torch::stable::new_empty(scores, {shape.batch, shape.length - prefix});
  Tensor grad_weight = torch::stable::new_empty(weight, {shape.channels});
  Tensor grad_bias = torch::stable::new_empty(bias, {shape.channels});
  call.grad = rows(grad_stream);
  call.grad_normed = rows(grad_normed);
  call.stream = rows(stream);
  call.tokens = rows(residual);
  call.update = rows(update);
  call.scores = scores_in(scores, residual);
  call.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  call.weight = weight.const_data_ptr();
  call.eps = float(eps);
  call.grad_tokens = grad_tokens.mutable_data_ptr();
  call.grad_scores = grad_scores.mutable_data_ptr();
  call.grad_weight = grad_weight.mutable_data_ptr();
  call.grad_bias = grad_bias.mutable_data_ptr();
  const Element type = element(residual, "tokens");
  Tensor workspace = torch::stable::new_empty(residual, {add_reorganize_norm_workspace(call, type)}, ScalarType::Float);
  call.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  check_launch(launch_add_reorganize_norm_backward(call, type, device.stream()), "add_reorganize_norm_backward");
  return {grad_tokens, grad_scores, grad_weight, grad_bias};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CUDA, m) {
  m.impl("reorganize_tokens", TORCH_BOX(&xray::reorganize_tokens));
  m.impl("reorganize_tokens_backward", TORCH_BOX(&xray::reorganize_tokens_backward));
  m.impl("add_reorganize_norm", TORCH_BOX(&xray::add_reorganize_norm));
  m.impl("add_reorganize_norm_backward", TORCH_BOX(&xray::add_reorganize_norm_backward));
}
