// Binds the CUDA kernels of token reorganisation to the ops. Not measured on a GPU yet: selected by XRAY_KERNELS=cuda.

#include "token_reorganize/cuda.h"

#include "common/cuda_stream.h"

namespace xray {
namespace {

Element element(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Half:
      return Element::kHalf;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Double:
      return Element::kDouble;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

ReorganizeShape shape_of(const Tensor& tokens, const Tensor& scores, int64_t keep, int64_t prefix, bool fuse) {
  return {tokens.size(0),   tokens.size(1),   tokens.size(2),   prefix,           keep,
          tokens.stride(0), tokens.stride(1), scores.stride(0), scores.stride(1), fuse};
}

// Selection compares 32-bit keys; float64 scores are for checking gradients and would lose their order.
void check_limits(const ReorganizeShape& shape, const Tensor& scores) {
  const int64_t candidates = shape.length - shape.prefix;
  STD_TORCH_CHECK(
      candidates <= kMostCandidates, "tokens has ", candidates, " candidates; the CUDA kernel takes at most ",
      kMostCandidates, " (XRAY_KERNELS=reference takes any number)");
  STD_TORCH_CHECK(shape.batch <= 65535, "tokens has a batch of ", shape.batch, "; the CUDA kernel takes at most 65535");
  STD_TORCH_CHECK(
      scores.scalar_type() != ScalarType::Double,
      "scores must be float32, float16 or bfloat16 for the CUDA kernel (XRAY_KERNELS=reference takes float64)");
}

std::tuple<Tensor, Tensor> reorganize_tokens(Tensor tokens, Tensor scores, int64_t keep, int64_t prefix, bool fuse) {
  tokens = with_dense_rows(tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const ReorganizeShape shape = shape_of(tokens, scores, keep, prefix, fuse);
  check_limits(shape, scores);
  Tensor out = torch::stable::new_empty(tokens, {shape.batch, prefix + keep + fuse, shape.channels});
  Tensor indices = torch::stable::new_empty(tokens, {shape.batch, keep}, ScalarType::Long);
  Tensor place = torch::stable::new_empty(tokens, {shape.batch, shape.length - prefix}, ScalarType::Int);
  if (shape.batch == 0) return {out, indices};
  auto* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  auto* places = static_cast<int32_t*>(place.mutable_data_ptr());
  const cudaStream_t stream = current_stream(tokens);
  check_launch(
      launch_select(scores.const_data_ptr(), element(scores, "scores"), index, places, shape, stream), "selection");
  check_launch(
      launch_reorganize(
          tokens.const_data_ptr(), element(tokens, "tokens"), scores.const_data_ptr(), element(scores, "scores"), index,
          places, out.mutable_data_ptr(), shape, stream),
      "reorganisation");
  return {out, indices};
}

std::tuple<Tensor, Tensor> reorganize_tokens_backward(
    Tensor grad, Tensor tokens, Tensor scores, Tensor indices, int64_t prefix, bool fuse) {
  grad = torch::stable::contiguous(grad);
  tokens = with_dense_rows(tokens);
  indices = torch::stable::contiguous(indices);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const ReorganizeShape shape = shape_of(tokens, scores, indices.size(1), prefix, fuse);
  check_limits(shape, scores);
  Tensor grad_tokens = torch::stable::new_empty(tokens, {shape.batch, shape.length, shape.channels});
  Tensor grad_scores = torch::stable::new_empty(scores, {shape.batch, shape.length - prefix});
  Tensor place = torch::stable::new_empty(tokens, {shape.batch, shape.length - prefix}, ScalarType::Int);
  if (shape.batch == 0) return {grad_tokens, grad_scores};
  check_launch(
      launch_reorganize_backward(
          grad.const_data_ptr(), tokens.const_data_ptr(), element(tokens, "tokens"), scores.const_data_ptr(),
          element(scores, "scores"), static_cast<const int64_t*>(indices.const_data_ptr()),
          static_cast<int32_t*>(place.mutable_data_ptr()), grad_tokens.mutable_data_ptr(),
          grad_scores.mutable_data_ptr(), shape, current_stream(tokens)),
      "backward");
  return {grad_tokens, grad_scores};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CUDA, m) {
  m.impl("reorganize_tokens", TORCH_BOX(&xray::reorganize_tokens));
  m.impl("reorganize_tokens_backward", TORCH_BOX(&xray::reorganize_tokens_backward));
}
