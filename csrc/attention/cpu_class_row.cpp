// CPU kernels of the class token's scores beside an attention of any make; threads take (sequence, head) pairs.

#define XRAY_KERNEL_FILE "attention/cpu_class_kernel.h"
#include "common/variants.h"

#include "attention/cpu_common.h"

namespace xray {
namespace {

std::tuple<Tensor, Tensor> class_scores(
    Tensor query, Tensor key, double scale, int64_t prefix, Optional key_lengths, Optional cu_seqlens,
    int64_t max_seqlen) {
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  const int64_t batch = key.size(0), heads = key.size(1), length = key.size(2);
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(packed || prefix <= length, "num_prefix_tokens must be at most ", length, ", got ", prefix);
  const std::vector<Sequence> all = sequences(query, key, key_lengths, cu_seqlens);
  Tensor class_row = new_result(query, {batch, heads, length}, wide_type(query));
  Tensor scores = new_result(query, {batch, packed ? length : length - prefix}, wide_type(query));
  for_element_type(query, "query", [&](auto type) {
    using T = decltype(type);
    const Heads<const T> q(query), k(key);
    auto* row = static_cast<WideScalar<T>*>(class_row.mutable_data_ptr());
    for_each_task(int64_t(all.size()) * heads, [&] {
      return [&](int64_t task) {
        const Sequence& s = all[task / heads];
        const int64_t h = task % heads;
        XRAY_CALL_VARIANT(
            class_row<T>, row + (s.batch * heads + h) * length + s.first, q.at(s, h), k.at(s, h), k.row, s.keys,
            s.all_keys, query.size(3), scale);
      };
    });
  });
  mean_over_heads(scores, class_row, all, prefix, packed);
  return {scores, class_row};
}

void class_scores_backward(
    Tensor grad_scores, Tensor query, Tensor key, Tensor class_row, double scale, int64_t prefix, Optional cu_seqlens,
    int64_t max_seqlen, Tensor grad_query, Tensor grad_key) {
  if (key.numel() == 0) return;
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  class_row = torch::stable::contiguous(class_row);
  const int64_t heads = key.size(1), length = key.size(2), head_dim = key.size(3);
  for (const Tensor& grad : {grad_query, grad_key})
    STD_TORCH_CHECK(head_dim == 1 || grad.stride(3) == 1, "gradients to add to must have a last stride of 1");
  const std::vector<Sequence> all = sequences(query, key, std::nullopt, cu_seqlens);
  for_element_type(query, "query", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const Heads<const T> q(query), k(key);
    const Heads<T> dq(grad_query), dk(grad_key);
    const S* row = static_cast<const S*>(class_row.const_data_ptr());
    const std::vector<S> grad = class_row_gradient<S>(grad_scores, all, heads, length, prefix, cu_seqlens.has_value());
    for_each_task(int64_t(all.size()) * heads, [&] {
      return [&, sum = std::make_shared<Scratch<S>>(head_dim)](int64_t task) {
        const Sequence& s = all[task / heads];
        const int64_t h = task % heads;
        if (s.all_keys == 0) return;
        XRAY_CALL_VARIANT(
            class_row_backward<T>, dq.at(s, h), dk.at(s, h), dk.row, grad.data() + s.batch * length + s.first,
            row + (s.batch * heads + h) * length + s.first, q.at(s, h), k.at(s, h), k.row, s.all_keys, head_dim, scale,
            sum->data());
      };
    });
  });
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CPU, m) {
  m.impl("class_scores", TORCH_BOX(&xray::class_scores));
  m.impl("class_scores_backward", TORCH_BOX(&xray::class_scores_backward));
}
