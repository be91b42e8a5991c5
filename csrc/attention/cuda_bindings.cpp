// Binds the CUDA kernels of the class token's attention to the ops. Not measured on a GPU yet: selected by
// XRAY_KERNELS=cuda.

#include "attention/cuda.h"

#include "common/cuda_stream.h"

namespace xray {
namespace {

HeadsIn heads_in(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

HeadsInOut heads_in_out(Tensor& tensor, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == of.scalar_type() && tensor.dim() == 4 && tensor.size(0) == of.size(0) &&
          tensor.size(1) == of.size(1) && tensor.size(2) == of.size(2) && tensor.size(3) == of.size(3),
      name, " must have the shape and dtype of the tensor that it is the gradient of");
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Integers integers_in(const Tensor& tensor, const char* name) {
  const bool is_long = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || tensor.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  STD_TORCH_CHECK(tensor.dim() == 1, name, " must have one dimension, got ", tensor.dim());
  return {tensor.const_data_ptr(), tensor.stride(0), is_long};
}

ClassRowShape class_row_shape(
    const Tensor& query, const Tensor& key, int64_t prefix, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& cu_seqlens) {
  ClassRowShape shape{};
  shape.rows = shape.batch = key.size(0);
  shape.heads = key.size(1);
  shape.length = key.size(2);
  shape.channels = key.size(3);
  shape.prefix = prefix;
  STD_TORCH_CHECK(
      query.scalar_type() == key.scalar_type() && query.size(0) == shape.batch && query.size(1) == shape.heads &&
          query.size(3) == shape.channels,
      "key must have the batch, heads, head dimension and dtype of query");
  STD_TORCH_CHECK(
      shape.channels <= kMostHeadDim, "query has a head dimension of ", shape.channels,
      "; the CUDA kernel takes at most ", kMostHeadDim, " (XRAY_KERNELS=reference takes any)");
  STD_TORCH_CHECK(shape.length < INT32_MAX - kMostHeadDim, "key must have fewer than 2^31 - 257 tokens");
  STD_TORCH_CHECK(prefix >= 0, "num_prefix_tokens must be at least 0, got ", prefix);
  if (cu_seqlens) {
    STD_TORCH_CHECK(!key_lengths, "packed sequences have no key_lengths: cu_seqlens says their lengths");
    STD_TORCH_CHECK(
        shape.batch == 1 && query.size(2) == shape.length,
        "packed sequences must be one row of the batch, with as many queries as keys");
    shape.cu_seqlens = integers_in(*cu_seqlens, "cu_seqlens");
    STD_TORCH_CHECK(cu_seqlens->size(0) >= 1, "cu_seqlens must have shape (B + 1,), got (0,)");
    shape.rows = cu_seqlens->size(0) - 1;
    return shape;
  }
  STD_TORCH_CHECK(
      prefix <= shape.length, "num_prefix_tokens must be at most ", shape.length, ", the tokens of key, got ", prefix);
  STD_TORCH_CHECK(query.size(2) > 0, "query must have the class token");
  if (key_lengths) {
    shape.key_lengths = integers_in(*key_lengths, "key_lengths");
    STD_TORCH_CHECK(key_lengths->size(0) == shape.batch, "key_lengths must have a length for each row of the batch");
  }
  return shape;
}

// The queries that are read, with dense rows: a copy is of the class tokens only where they are one place.
Tensor class_queries(const Tensor& query, bool packed) {
  if (query.stride(3) == 1 || packed) return with_dense_rows(query);
  return with_dense_rows(torch::stable::narrow(const_cast<Tensor&>(query), 2, 0, 1));
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats(Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor> class_scores(
    Tensor query, Tensor key, double scale, int64_t prefix, std::optional<Tensor> key_lengths,
    std::optional<Tensor> cu_seqlens, int64_t /* max_seqlen */) {
  const OnDevice device(query);
  const Element type = element(query, "query");
  ClassScores call{};
  call.shape = class_row_shape(query, key, prefix, key_lengths, cu_seqlens);
  const ClassRowShape& shape = call.shape;
  Tensor scores = new_floats(query, {shape.batch, cu_seqlens ? shape.length : shape.length - prefix});
  Tensor class_row = new_floats(query, {shape.batch, shape.heads, shape.length});
  if (shape.rows * shape.heads * shape.length == 0) return {scores, class_row};
  query = class_queries(query, cu_seqlens.has_value());
  key = with_dense_rows(key);
  Tensor workspace = new_floats(query, {class_scores_workspace(shape)});
  call.query = heads_in(query);
  call.key = heads_in(key);
  call.scale = float(scale);
  call.scores = floats(scores);
  call.class_row = floats(class_row);
  call.workspace = floats(workspace);
  check_launch(launch_class_scores(call, type, device.stream()), "class_scores");
  return {scores, class_row};
}

void class_scores_backward(
    Tensor grad_scores, Tensor query, Tensor key, Tensor class_row, double scale, int64_t prefix,
    std::optional<Tensor> cu_seqlens, int64_t /* max_seqlen */, Tensor grad_query, Tensor grad_key) {
  const OnDevice device(query);
  const Element type = element(query, "query");
  ClassScoresBackward call{};
  call.shape = class_row_shape(query, key, prefix, std::nullopt, cu_seqlens);
  const ClassRowShape& shape = call.shape;
  STD_TORCH_CHECK(
      grad_scores.scalar_type() == ScalarType::Float && class_row.scalar_type() == ScalarType::Float,
      "grad_scores and class_row must be float32 for the CUDA kernel");
  STD_TORCH_CHECK(
      grad_scores.dim() == 2 && grad_scores.size(0) == shape.batch &&
          grad_scores.size(1) == (cu_seqlens ? shape.length : shape.length - prefix) &&
          class_row.numel() == shape.batch * shape.heads * shape.length,
      "grad_scores and class_row must have the shapes that class_scores returns");
  call.grad_query = heads_in_out(grad_query, query, "grad_query");
  call.grad_key = heads_in_out(grad_key, key, "grad_key");
  if (shape.rows * shape.heads * shape.length == 0) return;
  query = class_queries(query, cu_seqlens.has_value());
  key = with_dense_rows(key);
  class_row = torch::stable::contiguous(class_row);
  Tensor workspace = new_floats(query, {class_scores_backward_workspace(shape)});
  call.grad_scores = static_cast<const float*>(grad_scores.const_data_ptr());
  call.grad_batch_stride = grad_scores.stride(0);
  call.grad_stride = grad_scores.stride(1);
  call.query = heads_in(query);
  call.key = heads_in(key);
  call.scale = float(scale);
  call.class_row = static_cast<const float*>(class_row.const_data_ptr());
  call.workspace = floats(workspace);
  check_launch(launch_class_scores_backward(call, type, device.stream()), "class_scores_backward");
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CUDA, m) {
  m.impl("class_scores", TORCH_BOX(&xray::class_scores));
  m.impl("class_scores_backward", TORCH_BOX(&xray::class_scores_backward));
}
