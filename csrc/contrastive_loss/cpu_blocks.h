// A block of logits, as the bindings hand it to the kernels: a block of images against a block of texts.
#pragma once

#include <cstdint>

namespace xray {

// Rows and columns of a block at most; every smaller one is a multiple of 16, so whole vectors and whole tiles of the
// product at every width.
constexpr int64_t kMostBlock = 240;
constexpr int64_t kBlockStride = kMostBlock + 8;  // of its rows: not a multiple of 1 KiB, which would share cache sets

// Numbers of scratch of a thread that computes blocks: two of them, and two for each row.
inline int64_t block_scratch(int64_t block) {
  return 2 * block * (kBlockStride + 1);
}

// The two packed forms that a block of features may be needed in: for logits, and (block, channels) in panels for the
// gradient of the other side.
template <class S>
struct LogitBlock {
  int64_t rows, columns, channels;  // of features, as packed
  const S *image, *text;            // packed for logits
  const S *image_panels, *text_panels;
  int64_t panel_rows;  // rows of a panel in memory
  S scale;
  const int32_t *image_labels, *text_labels;
  bool may_match;  // else no image has the label of a text
  S* kept;         // logits to keep, of the first `kept_count` rows, or that were kept, of all; null: none
  int64_t kept_row, kept_count;
};

// What both losses count on the way: how many logits of another label are not below a pair's own. Null: nothing.
template <class S>
struct RankCount {
  const S *image_pairs, *text_pairs;
  int32_t *image_ranks, *text_ranks;
};

// Running log-sum-exps of a block's rows and columns as maximum and sum, and the sums of the rows' positive logits.
template <class S>
struct Statistics {
  S *row_top, *row_sum, *column_top, *column_sum;
  double* positive;
  RankCount<S> ranks;
};

// The gradient of logits: weight * exp(logit - lse), lse in two numbers so that none of it is lost.
template <class S>
struct SoftmaxSide {
  const S *high, *low, *weight;
};

template <class S>
struct SoftmaxGradient {
  SoftmaxSide<S> row, column;
  const S* positive;  // added to a row's positives
};

// The sigmoid loss of a block and the gradients of its sums.
template <class S>
struct Sigmoid {
  S bias;
  double *total, *grad_bias;
  RankCount<S> ranks;
};

// Sums of gradients, rows of whole vectors; null where not asked for.
template <class S>
struct FeatureGradients {
  S *image, *text;
};

}  // namespace xray
