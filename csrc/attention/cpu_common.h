// What the CPU bindings of attention share: sequences, heads at their strides, threads that take tasks.
// Included after common/variants.h.
#pragma once

#include <vector>

#include "common/cpu_threads.h"
#include "common/plan.h"
#include "common/tensor.h"

namespace xray {

using Optional = std::optional<Tensor>;

// One sequence: a row of the batch, or a stretch of packed tokens.
struct Sequence {
  int64_t batch, first;  // first token
  int64_t queries, keys, all_keys;
};

inline int64_t integer_at(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(tensor.const_data_ptr())[at]
                                                 : static_cast<const int64_t*>(tensor.const_data_ptr())[at];
}

inline std::vector<Sequence> sequences(
    const Tensor& query, const Tensor& key, const Optional& key_lengths, const Optional& cu_seqlens) {
  const int64_t queries = query.size(2), keys = key.size(2);
  std::vector<Sequence> result;
  if (cu_seqlens) {
    for (int64_t b = 0; b + 1 < cu_seqlens->size(0); ++b) {
      const int64_t first = integer_at(*cu_seqlens, b), last = integer_at(*cu_seqlens, b + 1);
      STD_TORCH_CHECK(
          0 <= first && first <= last && last <= keys, "cu_seqlens must rise from 0 to ", keys, ", got ", first,
          " before ", last);
      result.push_back({0, first, last - first, last - first, last - first});
    }
    return result;
  }
  for (int64_t b = 0; b < query.size(0); ++b) {
    const int64_t length = key_lengths ? integer_at(*key_lengths, b) : keys;
    result.push_back({b, 0, queries, std::clamp<int64_t>(length, 0, keys), keys});
  }
  return result;
}

// scores: the mean over heads of the class rows, in the order of heads
template <class S>
void mean_over_heads(
    Tensor& scores, const Tensor& class_row, const std::vector<Sequence>& sequences, int64_t prefix, bool packed) {
  const int64_t heads = class_row.size(1), length = class_row.size(2), first = packed ? 0 : prefix;
  const S* row = static_cast<const S*>(class_row.const_data_ptr());
  S* to = static_cast<S*>(scores.mutable_data_ptr());
  for (const Sequence& s : sequences) {
    for (int64_t j = packed ? 0 : prefix; j < s.all_keys; ++j) {
      S sum = 0;
      const S* at = row + s.batch * heads * length + s.first + j;
      for (int64_t h = 0; h < heads; ++h) sum += at[h * length];
      to[s.batch * (length - first) + s.first + j - first] = j < prefix ? S(0) : sum / S(heads);
    }
  }
}

inline void mean_over_heads(
    Tensor& scores, const Tensor& class_row, const std::vector<Sequence>& sequences, int64_t prefix, bool packed) {
  if (scores.scalar_type() == ScalarType::Double) {
    mean_over_heads<double>(scores, class_row, sequences, prefix, packed);
  } else {
    mean_over_heads<float>(scores, class_row, sequences, prefix, packed);
  }
}

// The gradient of the class rows, the same for all heads: that of the scores over the heads, 0 at prefix tokens.
template <class S>
std::vector<S> class_row_gradient(
    const Tensor& grad_scores, const std::vector<Sequence>& sequences, int64_t heads, int64_t length, int64_t prefix,
    bool packed) {
  STD_TORCH_CHECK(
      grad_scores.element_size() == sizeof(S), "grad_scores must have the dtype of the scores, ",
      sizeof(S) == 8 ? "float64" : "float32");
  std::vector<S> grad(grad_scores.size(0) * length);
  const S* from = static_cast<const S*>(grad_scores.const_data_ptr());
  for (const Sequence& s : sequences)
    for (int64_t j = prefix; j < s.all_keys; ++j) {
      const int64_t column = packed ? s.first + j : j - prefix;
      grad[s.batch * length + s.first + j] =
          from[s.batch * grad_scores.stride(0) + column * grad_scores.stride(1)] / S(heads);
    }
  return grad;
}

// (B, H, N, D) with dense rows of D.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, row;  // strides

  // T may be const
  explicit Heads(const Tensor& tensor)
      : data(static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()))),
        batch(tensor.stride(0)),
        head(tensor.stride(1)),
        row(tensor.stride(2)) {
  }
  T* at(const Sequence& s, int64_t h) const {
    return data + s.batch * batch + h * head + s.first * row;
  }
};

// A new result (B, H, N, D), stored as (B, N, H, D).
inline Tensor new_tokens(const Tensor& like, int64_t batch, int64_t heads, int64_t length, int64_t head_dim) {
  return torch::stable::transpose(new_result(like, {batch, length, heads, head_dim}), 1, 2);
}

// A task: one sequence of one head, and some of its queries.
struct HeadTask {
  const Sequence& sequence;
  int64_t head, piece, begin, end;
};

// All of them, `piece_queries` each.
class HeadTasks {
 public:
  HeadTasks(std::vector<Sequence> sequences, int64_t heads)
      : sequences_(std::move(sequences)), heads_(heads), longest_(0) {
    for (const Sequence& s : sequences_) longest_ = std::max(longest_, s.queries);
    const int64_t pairs = int64_t(sequences_.size()) * heads;
    pieces = plan_query_pieces(pairs, longest_, torch::stable::get_num_threads());
    piece_queries_ = query_piece_size(longest_, pieces);
  }
  int64_t count() const {
    return int64_t(sequences_.size()) * heads_ * pieces;
  }
  HeadTask operator[](int64_t task) const {
    const Sequence& s = sequences_[task / (heads_ * pieces)];
    const int64_t piece = task % pieces;
    return {
        s, task / pieces % heads_, piece, std::min(s.queries, piece * piece_queries_),
        std::min(s.queries, (piece + 1) * piece_queries_)};
  }
  const std::vector<Sequence>& sequences() const {
    return sequences_;
  }
  int64_t longest() const {
    return longest_;
  }

  int64_t pieces;

 private:
  std::vector<Sequence> sequences_;
  int64_t heads_, longest_, piece_queries_;
};

}  // namespace xray
