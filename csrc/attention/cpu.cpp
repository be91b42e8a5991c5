// CPU kernels of attention, with the class token's scores: threads take (batch, head) pairs, and slices of the queries
// where there are fewer pairs than threads. Every number is summed by one thread, or in a fixed order.

#include "attention/cpu_head.h"

#define XRAY_KERNEL_FILE "attention/cpu_kernel.h"
#define XRAY_AMX_KERNEL_FILE "attention/cpu_amx_kernel.h"
#include "common/variants.h"

#include "attention/cpu_common.h"
#include "common/cpu_tiles.h"

namespace xray {
namespace {

template <class T>
HeadIn<T> head_in(
    const Heads<const T>& query, const Heads<const T>& key, const Heads<const T>& value, const HeadTask& task,
    int64_t head_dim, bool is_causal, double scale) {
  const Sequence& s = task.sequence;
  return {
      query.at(s, task.head),
      key.at(s, task.head),
      value.at(s, task.head),
      query.row,
      key.row,
      value.row,
      s.queries,
      s.keys,
      head_dim,
      is_causal,
      scale};
}

// ---- the variant for the instruction set in use: bfloat16 has one for AMX ----

template <class T>
std::shared_ptr<Worker<T>> forward_worker(int64_t keys, int64_t head_dim) {
  XRAY_IF_TILES(T, return std::make_shared<Worker<T>>(amx::forward_scratch(keys, head_dim)));
  return std::make_shared<Worker<T>>(XRAY_CALL_VARIANT(forward_scratch<WideScalar<T>>, keys, head_dim));
}

template <class T>
std::shared_ptr<Worker<T>> backward_worker(int64_t queries, int64_t head_dim) {
  XRAY_IF_TILES(T, return std::make_shared<Worker<T>>(amx::backward_scratch(queries, head_dim)));
  return std::make_shared<Worker<T>>(XRAY_CALL_VARIANT(backward_scratch<WideScalar<T>>, queries, head_dim));
}

template <class T>
void run_head(
    const HeadIn<T>& in, const HeadOut<T, WideScalar<T>>& out, int64_t begin, int64_t end, const Worker<T>& worker) {
  XRAY_IF_TILES(T, return amx::attention_head(in, out, begin, end, worker.scratch()));
  XRAY_CALL_VARIANT(attention_head<T>, in, out, begin, end, worker.scratch());
}

template <class T>
void run_head_backward(
    const HeadIn<T>& in, const HeadGradIn<T, WideScalar<T>>& grads, const HeadGradOut<T, WideScalar<T>>& to,
    int64_t begin, int64_t end, const Worker<T>& worker) {
  XRAY_IF_TILES(T, return amx::attention_head_backward(in, grads, to, begin, end, worker.scratch()));
  XRAY_CALL_VARIANT(attention_head_backward<T>, in, grads, to, begin, end, worker.scratch());
}

// ---- the ops ----

// out, statistics and, where `class_row` is not empty, each class token's probabilities.
void forward(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale, bool is_causal, const HeadTasks& tasks,
    Tensor& out, Tensor& statistics, Tensor* class_row) {
  const int64_t heads = query.size(1), queries = query.size(2), keys = key.size(2), head_dim = query.size(3);
  for_element_type(query, "query", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const Heads<const T> q(query), k(key), v(value);
    const Heads<T> o(out);
    S* top = static_cast<S*>(statistics.mutable_data_ptr());
    S* row = class_row ? static_cast<S*>(class_row->mutable_data_ptr()) : nullptr;
    const int64_t plane = query.size(0) * heads * queries;
    for_each_task(tasks.count(), [&] {
      return [&, worker = forward_worker<T>(keys, head_dim)](int64_t number) {
        const HeadTask task = tasks[number];
        if (task.begin == task.end) return;
        const Sequence& s = task.sequence;
        const int64_t head = s.batch * heads + task.head;
        S* own = row ? row + head * keys + s.first : nullptr;
        if (own && task.begin == 0) std::fill(own + s.keys, own + s.all_keys, S(0));
        const HeadOut<T, S> to{
            o.at(s, task.head), o.row, top + head * queries + s.first, top + plane + head * queries + s.first, own};
        const HeadIn<T> in = head_in(q, k, v, task, head_dim, is_causal, scale);
        run_head<T>(in, to, task.begin, task.end, *worker);
      };
    });
  });
}

std::tuple<Tensor, Tensor> attention(
    Tensor query, Tensor key, Tensor value, double scale, bool is_causal, Optional key_lengths, Optional cu_seqlens,
    int64_t max_seqlen) {
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  value = with_dense_rows(value);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const HeadTasks tasks(sequences(query, key, key_lengths, cu_seqlens), heads);
  Tensor out = new_tokens(query, batch, heads, length, query.size(3));
  Tensor statistics = new_result(query, {2, batch, heads, length}, wide_type(query));
  forward(query, key, value, scale, is_causal, tasks, out, statistics, nullptr);
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_with_scores(
    Tensor query, Tensor key, Tensor value, double scale, int64_t prefix, Optional key_lengths, Optional cu_seqlens,
    int64_t max_seqlen) {
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  value = with_dense_rows(value);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(
      key.size(2) == length && (packed || prefix <= length), "num_prefix_tokens must be at most ", length, ", got ",
      prefix);
  const HeadTasks tasks(sequences(query, key, key_lengths, cu_seqlens), heads);
  Tensor out = new_tokens(query, batch, heads, length, query.size(3));
  Tensor statistics = new_result(query, {2, batch, heads, length}, wide_type(query));
  Tensor class_row = new_result(query, {batch, heads, length}, wide_type(query));
  Tensor scores = new_result(query, {batch, packed ? length : length - prefix}, wide_type(query));
  forward(query, key, value, scale, false, tasks, out, statistics, &class_row);
  mean_over_heads(scores, class_row, tasks.sequences(), prefix, packed);
  return {out, scores, statistics, class_row};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, Optional grad_scores, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics,
    Optional class_row, double scale, bool is_causal, Optional key_lengths, Optional cu_seqlens, int64_t max_seqlen,
    int64_t prefix) {
  grad_out = with_dense_rows(grad_out);
  query = with_dense_rows(query);
  key = with_dense_rows(key);
  value = with_dense_rows(value);
  out = with_dense_rows(out);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
  const int64_t head_dim = query.size(3);
  const HeadTasks tasks(sequences(query, key, key_lengths, cu_seqlens), heads);
  Tensor grad_query = new_tokens(query, batch, heads, queries, head_dim);
  Tensor grad_key = new_tokens(key, batch, heads, keys, head_dim);
  Tensor grad_value = new_tokens(value, batch, heads, keys, head_dim);
  const int64_t pieces = tasks.pieces, part_size = batch * heads * keys * head_dim;
  Tensor parts = torch::stable::new_empty(query, {pieces > 1 ? pieces * 2 * part_size : 0}, wide_type(query));
  statistics = torch::stable::contiguous(statistics);
  if (class_row) class_row = torch::stable::contiguous(*class_row);

  for_element_type(query, "query", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const Heads<const T> q(query), k(key), v(value), g(grad_out), o(out);
    const Heads<T> dq(grad_query), dk(grad_key), dv(grad_value);
    const S* top = static_cast<const S*>(statistics.const_data_ptr());
    S* part = pieces > 1 ? static_cast<S*>(parts.mutable_data_ptr()) : nullptr;
    std::vector<S> grad_class;
    if (grad_scores && class_row)
      grad_class = class_row_gradient<S>(*grad_scores, tasks.sequences(), heads, keys, prefix, cu_seqlens.has_value());
    const S* row = grad_class.empty() ? nullptr : static_cast<const S*>(class_row->const_data_ptr());
    const int64_t plane = batch * heads * queries;
    for_each_task(tasks.count(), [&] {
      return [&, worker = backward_worker<T>(tasks.longest(), head_dim)](int64_t number) {
        const HeadTask task = tasks[number];
        const Sequence& s = task.sequence;
        const int64_t head = s.batch * heads + task.head;
        S* own = part ? part + task.piece * 2 * part_size + (head * keys + s.first) * head_dim : nullptr;
        HeadGradIn<T, S> in{
            g.at(s, task.head),
            o.at(s, task.head),
            g.row,
            o.row,
            top + head * queries + s.first,
            top + plane + head * queries + s.first,
            nullptr,
            0};
        if (row && task.begin == 0) {
          in.grad_class = grad_class.data() + s.batch * keys + s.first;
          for (int64_t j = 0; j < s.keys; ++j) in.grad_class_sum += row[head * keys + s.first + j] * in.grad_class[j];
        }
        const HeadGradOut<T, S> to{
            dq.at(s, task.head),
            dk.at(s, task.head),
            dv.at(s, task.head),
            dq.row,
            dk.row,
            dv.row,
            s.all_keys,
            own,
            own ? own + part_size : nullptr};
        const HeadIn<T> head_inputs = head_in(q, k, v, task, head_dim, is_causal, scale);
        run_head_backward<T>(head_inputs, in, to, task.begin, task.end, *worker);
      };
    });
    if (!part) return;
    const int64_t pairs = int64_t(tasks.sequences().size()) * heads;
    for_each_task(pairs, [&] {
      return [&](int64_t pair) {
        const Sequence& s = tasks.sequences()[pair / heads];
        const S* own = part + ((s.batch * heads + pair % heads) * keys + s.first) * head_dim;
        for (const Heads<T>* to : {&dk, &dv}) {
          XRAY_CALL_VARIANT(
              add_parts<T>, to->at(s, pair % heads), to->row, own, 2 * part_size, pieces, head_dim, s.all_keys);
          own += part_size;
        }
      };
    });
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&xray::attention));
  m.impl("attention_with_scores", TORCH_BOX(&xray::attention_with_scores));
  m.impl("attention_backward", TORCH_BOX(&xray::attention_backward));
}
