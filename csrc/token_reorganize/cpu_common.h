// What the CPU bindings of this family share: scores of one batch row, and where its tokens go.
// Included after common/variants.h.
#pragma once

#include <limits>
#include <type_traits>
#include <vector>

#include "common/cpu_threads.h"
#include "common/plan.h"
#include "common/tensor.h"
#include "token_reorganize/select.h"

namespace xray {

// A vector of parameters or one row of scores, widened to S; every NaN becomes the usual one (see simd.h).
template <class S>
void read_row(const Tensor& tensor, const char* name, int64_t offset, int64_t stride, std::vector<S>& to) {
  for_element_type(tensor, name, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(tensor.const_data_ptr()) + offset;
    for (size_t i = 0; i < to.size(); ++i) {
      S value;
      if constexpr (std::is_arithmetic_v<T>) {
        value = S(from[i * stride]);
      } else {
        value = S(widen(from[i * stride]));
      }
      to[i] = value == value ? value : std::numeric_limits<S>::quiet_NaN();
    }
  });
}

// The scores of one batch row and the places of its tokens, with room for the next row.
template <class S>
struct RowPlan {
  std::vector<S> scores;
  std::vector<int32_t> place;
  Selector selector;

  explicit RowPlan(int64_t candidates) : scores(candidates), place(candidates) {
  }

  void read_scores(const Tensor& all, int64_t b) {
    read_row(all, "scores", b * all.stride(0), all.stride(1), scores);
  }

  // Forward: select, and write the indices.
  void select(int64_t keep, int64_t* indices) {
    selector.select(scores.data(), int64_t(scores.size()), keep, indices, place.data());
  }

  // Backward: what was selected.
  void recall(const int64_t* indices, int64_t keep) {
    const auto candidates = int64_t(scores.size());
    std::fill(place.begin(), place.end(), -1);
    for (int64_t k = 0; k < keep; ++k) {
      STD_TORCH_CHECK(
          0 <= indices[k] && indices[k] < candidates, "indices must be from 0 to ", candidates - 1, ", got ",
          indices[k]);
      place[indices[k]] = int32_t(k);
    }
  }
};

// Whether rows of `channels` elements, in results of `bytes` at `data`, can and should be written past the caches.
inline bool writes_past_caches(int64_t bytes, int64_t channels, std::initializer_list<const void*> data) {
  bool aligned = channels % 16 == 0;
  for (const void* address : data) aligned = aligned && reinterpret_cast<uintptr_t>(address) % 64 == 0;
  return aligned && plan_past_caches(bytes);
}

}  // namespace xray
