// Launchers of the CUDA kernels of the contrastive losses: what is done to panels of logits between the products of a
// library. Torch-free. A panel is a part of S = scale * I T^T, rows x columns floats. All other pointers of a call are
// contiguous and start at the panel's first row or column.
//
// A product leaves I T^T in a panel; one kernel reads it and leaves sums, ranks or dS; products turn dS into gradients.
// Each panel is read once for all of these. Nothing waits for the host, no floating-point atomics, every sum has a
// fixed order. Bytes and FLOPs for each of the n N logits, with features of width D in bfloat16, and what an H100 would
// need by its data sheet (3.35 TB/s; products at 600 TFLOP/s), in picoseconds, for D = 512:
//
//                                    panel bytes                            memory   products     products take
//     contrastive_statistics         4 written, 4 read                      2.4      2 D FLOP     1.7
//     contrastive_statistics_backward  + 2 for dS written, 2 + 2 read       4.2      6 D FLOP     5.1
//     sigmoid_contrastive            the same                               4.2      6 D FLOP     5.1
//
// A fused tile, as the Triton kernels have, moves none of these bytes: its logits never leave the registers. So if both
// reach the same share of the peak in products, this loses, by a factor of up to 1 + 2.4 / 1.7 where panels go to
// memory. Two things may turn that round: the library's products reach more of the peak than what a compiler makes of a
// loop with exponentials in it, and panels are small enough to stay in the cache, where 4 bytes cost about half. Which
// one wins was not measured, so these kernels are selectable (XRAY_KERNELS=cuda) and not the default.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/dtypes.h"

namespace xray {

// Every block of a kernel over a panel takes a tile of these rows, and of 32 lanes times 16 bytes of columns.
constexpr int kStatisticsRows = 128, kStatisticsColumns = 128, kTileRows = 64, kLeastTileColumns = 128;
// Rows of a panel's buffer begin at multiples of this many elements, so that vectors of 16 bytes fit.
constexpr int64_t kPanelUnit = 8;
// Bytes that a panel takes at most: what is written is to be in the cache of 50 MiB still when it is read. Panels of
// 2,560 x 2,560 logits, for which a product takes 11 us by the numbers above: longer than its launch.
constexpr int64_t kPanelBytes = 48 << 20;
// Largest magnitude of dS in half precision, a power of two; 16 times that overflows.
constexpr float kLargestGradient = 4096.0f;

struct PanelShape {
  int64_t tall, broad;
};

// The largest panel, square unless the logits are shorter or narrower, that takes no more than `workspace` bytes:
// `element` for each logit, `side` for each row and column; at least one logit. Cut sides are multiples of the tiles'.
inline PanelShape plan_panels(int64_t rows, int64_t columns, double element, double side, int64_t workspace) {
  const double budget = double(std::min(workspace, kPanelBytes));
  const auto most = [&](double other) { return int64_t((budget - side * other) / (element * other + side)); };
  const auto cut = [](int64_t length, int64_t most) {
    most = std::max<int64_t>(most, 1);
    if (most >= length) return std::max<int64_t>(length, 1);
    return most < 256 ? most : most / 256 * 256;
  };
  columns = (columns + kPanelUnit - 1) / kPanelUnit * kPanelUnit;
  const int64_t square = int64_t((std::sqrt(side * side + element * budget) - side) / element);
  PanelShape shape{cut(rows, square), 0};
  shape.broad = cut(columns, most(double(shape.tall)));
  if (shape.broad < columns && shape.broad >= kPanelUnit) shape.broad = shape.broad / kPanelUnit * kPanelUnit;
  shape.tall = cut(rows, most(double((shape.broad + kPanelUnit - 1) / kPanelUnit * kPanelUnit)));
  return shape;
}

struct Pairs {
  const void *image, *text;  // (n, D), last stride 1
  int64_t rows, width, image_stride, text_stride;
  const float* scale;
  float* out;
};

// Which logits of a panel are positives, and the logits of the pairs that ranks are counted against (null: not wanted).
struct PanelPairs {
  const int32_t *row_labels, *column_labels;
  const float *row_pairs, *column_pairs;
  unsigned *row_ranks, *column_ranks;  // added to
};

struct StatisticsPanel {
  float* logits;
  int64_t stride, rows, columns;
  const float* scale;
  bool keep;  // multiply the panel itself
  PanelPairs pairs;
  float *row_partials, *column_partials;    // see statistics_row_partials
  double *row_lse, *column_lse, *positive;  // joined with what is there
};

// Floats of partial results for a panel.
inline int64_t statistics_row_partials(int64_t rows, int64_t columns) {
  return 4 * rows * ((columns + kStatisticsColumns - 1) / kStatisticsColumns);
}
inline int64_t statistics_column_partials(int64_t rows, int64_t columns) {
  return 2 * columns * ((rows + kStatisticsRows - 1) / kStatisticsRows);
}

struct GradientPanel {
  const float* logits;
  int64_t stride, rows, columns;
  const float* scale;  // null where logits are multiplied already
  const int32_t *row_labels, *column_labels;
  const double *row_lse, *column_lse, *grad_row, *grad_column, *grad_positive;
  const float* factor;  // of dS; null is 1
  void* out;            // may be the logits; vectors of 16 bytes fit
  int64_t out_stride;
};

struct SigmoidPanel {
  const float* logits;
  int64_t stride, rows, columns;
  const float *scale, *bias;
  PanelPairs pairs;
  double* partials;  // two for each tile, added to: loss and gradient of the bias
  void* out;         // dS; null where no gradient is wanted
  int64_t out_stride;
};

inline int64_t sigmoid_tiles(int64_t rows, int64_t columns) {
  return ((rows + kTileRows - 1) / kTileRows) * ((columns + kLeastTileColumns - 1) / kLeastTileColumns);
}

// The power of two that dS in float16 is multiplied by (see cuda_gradient.cu).
struct GradientFactor {
  const double *grad_row, *grad_column, *grad_positive;
  int64_t rows, columns;
  float* factor;
};

// Turns a sum of products of dS into a gradient: out = constant * sum * scale / factor.
struct FinishGradient {
  const float* sum;  // (rows, width), contiguous
  int64_t rows, width;
  const float *scale, *factor;  // null: no factor
  float constant;               // what the sum is multiplied by beside these
  void* out;                    // contiguous; may be the sum
  bool is_wide;                 // float32, not the dtype of the features
  const void* features;
  int64_t feature_stride;
  double* partials;  // of constant / factor times sum x features, one a block; null: not wanted
};

constexpr int64_t kFinishRows = 8;
inline int64_t finish_partials(int64_t rows) {
  return (rows + kFinishRows - 1) / kFinishRows;
}

cudaError_t launch_pairs(const Pairs& call, Element type, cudaStream_t stream);
cudaError_t launch_statistics(const StatisticsPanel& call, cudaStream_t stream);
cudaError_t launch_gradient_factor(const GradientFactor& call, cudaStream_t stream);
cudaError_t launch_gradient(const GradientPanel& call, Element type, cudaStream_t stream);
cudaError_t launch_sigmoid(const SigmoidPanel& call, Element type, cudaStream_t stream);
// to += from, `count` floats
cudaError_t launch_accumulate(float* to, const float* from, int64_t count, cudaStream_t stream);
cudaError_t launch_finish(const FinishGradient& call, Element type, cudaStream_t stream);
// *to = the sum of from[0], from[step], ..., `count` of them
cudaError_t launch_total(double* to, const double* from, int64_t count, int64_t step, cudaStream_t stream);

}  // namespace xray
