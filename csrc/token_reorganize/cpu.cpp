// CPU kernels of token reorganisation: selection, then one pass over the tokens; threads over batch rows, and over
// channels when the batch is smaller than the number of threads.

#include <vector>

#include "common/capability.h"
#include "common/plan.h"
#include "common/tensor.h"
#include "token_reorganize/select.h"

#define XRAY_KERNEL_FILE "token_reorganize/cpu_kernel.h"
#include "common/variants.h"

namespace xray {
namespace {

// Calls the variant of `function` for the instruction set in use.
#if defined(__x86_64__)
#define XRAY_CALL_VARIANT(function, ...)               \
  (capability() == 2   ? avx512::function(__VA_ARGS__) \
   : capability() == 1 ? avx2::function(__VA_ARGS__)   \
                       : baseline::function(__VA_ARGS__))
#else
#define XRAY_CALL_VARIANT(function, ...) baseline::function(__VA_ARGS__)
#endif

float widen(Half value) {
  const Half padded[4] = {value};
  return baseline::load(padded)[0];
}
float widen(BFloat16 value) {
  const BFloat16 padded[4] = {value};
  return baseline::load(padded)[0];
}
float widen(float value) {
  return value;
}
double widen(double value) {
  return value;
}

void narrow(float from, float& to) {
  to = from;
}
template <class H>
void narrow(float from, H& to) {
  H padded[4];
  baseline::store(padded, baseline::Float{from});
  to = padded[0];
}

// The scores (B, M) as float32, or float64 beside float64 tokens.
template <class S>
std::vector<S> read_scores(const Tensor& scores) {
  const int64_t batch = scores.size(0), count = scores.size(1);
  std::vector<S> result(batch * count);
  for_element_type(scores, "scores", [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(scores.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < count; ++i)
        result[b * count + i] = S(widen(from[b * scores.stride(0) + i * scores.stride(1)]));
  });
  return result;
}

std::tuple<Tensor, Tensor> reorganize_tokens(Tensor tokens, Tensor scores, int64_t keep, int64_t prefix, bool fuse) {
  tokens = with_dense_rows(tokens);
  const int64_t batch = tokens.size(0), length = tokens.size(1), channels = tokens.size(2);
  const int64_t candidates = length - prefix, rows = prefix + keep + fuse;
  STD_TORCH_CHECK(0 < keep && keep <= candidates, "num_keep must be from 1 to ", candidates, ", got ", keep);
  Tensor out = torch::stable::new_empty(tokens, {batch, rows, channels});
  Tensor indices = torch::stable::new_empty(tokens, {batch, keep}, ScalarType::Long);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  std::vector<int32_t> place(batch * candidates);

  for_element_type(tokens, "tokens", [&](auto type) {
    using T = decltype(type);
    using S = typename baseline::Wide<T>::Scalar;
    const std::vector<S> score = read_scores<S>(scores);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b)
        select_top(&score[b * candidates], candidates, keep, index + b * keep, &place[b * candidates]);
    });
    const T* from = static_cast<const T*>(tokens.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t pieces = plan_channel_pieces(batch, channels, sizeof(T), torch::stable::get_num_threads());
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      std::vector<S> sum(fuse ? channels : 0);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        XRAY_CALL_VARIANT(
            reorganize_row<T>, to + b * rows * channels, from + b * tokens.stride(0), tokens.stride(1),
            score.data() + b * candidates, place.data() + b * candidates, fuse ? sum.data() : nullptr, length, prefix,
            keep, channels, piece_begin(piece, pieces, channels), piece_begin(piece + 1, pieces, channels));
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
  Tensor grad_tokens = torch::stable::new_empty(tokens, {batch, length, channels});
  Tensor grad_scores = torch::stable::new_empty(scores, {batch, candidates});
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<int32_t> place(batch * candidates, -1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < keep; ++k) {
      const int64_t i = index[b * keep + k];
      STD_TORCH_CHECK(0 <= i && i < candidates, "indices must be from 0 to ", candidates - 1, ", got ", i);
      place[b * candidates + i] = int32_t(k);
    }

  for_element_type(tokens, "tokens", [&](auto type) {
    using T = decltype(type);
    using S = typename baseline::Wide<T>::Scalar;
    const std::vector<S> score = read_scores<S>(scores);
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    const T* token = static_cast<const T*>(tokens.const_data_ptr());
    T* to = static_cast<T*>(grad_tokens.mutable_data_ptr());
    const int64_t pieces = plan_channel_pieces(batch, channels, sizeof(T), torch::stable::get_num_threads());
    std::vector<S> parts(pieces * batch * candidates);
    torch::stable::parallel_for(0, batch * pieces, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / pieces, piece = item % pieces;
        XRAY_CALL_VARIANT(
            reorganize_row_backward<T>, to + b * length * channels, parts.data() + (piece * batch + b) * candidates,
            from + b * grad.stride(0), grad.stride(1), token + b * tokens.stride(0), tokens.stride(1),
            score.data() + b * candidates, place.data() + b * candidates, length, prefix, keep, channels, fuse,
            piece_begin(piece, pieces, channels), piece_begin(piece + 1, pieces, channels));
      }
    });
    // the pieces' parts in a fixed order: the sum does not depend on which thread was first
    for_element_type(grad_scores, "scores", [&](auto score_type) {
      auto* result = static_cast<decltype(score_type)*>(grad_scores.mutable_data_ptr());
      for (int64_t i = 0; i < batch * candidates; ++i) {
        S sum = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) sum += parts[piece * batch * candidates + i];
        if constexpr (std::is_same_v<decltype(score_type), double>) {
          result[i] = sum;
        } else {
          narrow(float(sum), result[i]);
        }
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
