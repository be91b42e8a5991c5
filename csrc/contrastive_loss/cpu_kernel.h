// Blocks of logits of the contrastive losses, for one instruction set (see common/variants.h).
//
// A block, up to 240 x 240 logits, is computed, used and forgotten in the second-level cache (238 KiB of float32; its
// transpose again as much). Features come packed: images as rows, texts as columns, and for gradients both as panels of
// three vectors of channels, so that the right operand of each product streams from the first-level cache:
//   S = I T^T   dI += dS T   dT += dS^T I
// Between the products everything is arithmetic on vectors along the texts:
//   forward   2 exponentials a logit, the maxima over rows and columns first: both log-sum-exps in one pass, U FLOPs
//   backward  2 exponentials a logit, each side's softmax by its own log-sum-exp; 3U, or 2U with kept logits
//   sigmoid   1 exponential, 1 logarithm by series and 2 divisions a logit; 3U with gradients
// with U = 2 n N D. At D = 512 a logit costs 32 cycles of products forward and up to 96 backward on AVX2, two
// exponentials 2. A positive is found by comparing labels, only where a block's ranges of labels meet.
//
// One exponential for both softmaxes, exp(S - m) with m the block's maximum, would spare a cycle a logit, but lose rows
// whose own maximum lies 87 below it.

#include "common/product.h"

// Steps of a product at a time: three vectors of so many rows stay in the first-level cache. Without fused multiply-add
// a long sum of large products rounds twice as often, so there it is made in short blocks.
static constexpr int64_t kSteps = XRAY_LANES == 4 ? 16 : 256;

// ---- packing ----

// Numbers of scratch that `pack_columns` needs.
template <class S>
static int64_t packing_scratch(int64_t channels) {
  return 3 * lanes<S> * channels;
}

// Panels of three vectors of texts: (channels, vectors) each.
template <class T>
static void pack_columns(
    typename Wide<T>::Scalar* to, const T* from, int64_t from_row, int64_t count, int64_t features, int64_t channels,
    typename Wide<T>::Scalar* scratch) {
  using S = typename Wide<T>::Scalar;
  for (int64_t at = 0, vectors; at < count; at += vectors * lanes<S>) {
    vectors = tile_vectors((count - at + lanes<S> - 1) / lanes<S>);
    const int64_t width = vectors * lanes<S>, here = count - at < width ? count - at : width;
    pack_rows(scratch, channels, width, from + at * from_row, from_row, here, features, S(1));
    transpose(to + at * channels, width, scratch, channels, width, channels);
  }
}

// Panels of three vectors of channels: (panel_rows, vectors) each, of which `count` rows are there.
template <class T>
static void pack_panels(
    typename Wide<T>::Scalar* to, int64_t panel_rows, const T* from, int64_t from_row, int64_t count, int64_t features,
    int64_t channels) {
  using S = typename Wide<T>::Scalar;
  for (int64_t at = 0, vectors; at < channels; at += vectors * lanes<S>) {
    vectors = tile_vectors((channels - at) / lanes<S>);
    S* panel = to + at * panel_rows;
    for (int64_t i = 0; i < count; ++i, panel += vectors * lanes<S>)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = at + v * lanes<S>, left = features - c, here = left < lanes<S> ? left : lanes<S>;
        store(panel + v * lanes<S>, here > 0 ? load_first(from + i * from_row + c, here) : typename Wide<S>::Vector{});
      }
  }
}

// ---- products ----

// c (rows, rounded up to a tile; whole vectors of `width`) [+]= a b, b in panels of three vectors.
template <Start start, class S>
static void multiply_panels(
    S* c, int64_t c_row, const S* a, int64_t a_row, const S* b, int64_t panel_rows, int64_t rows, int64_t width,
    int64_t steps) {
  for (int64_t k = 0; k < steps; k += kSteps) {
    const int64_t here = steps - k < kSteps ? steps - k : kSteps;
    for (int64_t at = 0, vectors; at < width; at += vectors * lanes<S>) {
      vectors = tile_vectors((width - at) / lanes<S>);
      const int64_t panel = vectors * lanes<S>;
      const S *left = a + k, *right = b + at * panel_rows + k * panel;
      if (start == Start::kZero && k == 0) {
        multiply<Start::kZero>(c + at, c_row, left, a_row, 1, right, panel, rows, panel, here);
      } else {
        multiply<Start::kSum>(c + at, c_row, left, a_row, 1, right, panel, rows, panel, here);
      }
    }
  }
}

template <class S>
XRAY_INLINE int64_t vectors_of(int64_t count) {
  return (count + lanes<S> - 1) / lanes<S> * lanes<S>;
}

// The block's logits, rows of xray::kBlockStride. What stands in columns past the last text is not a logit.
template <class S>
static void compute_logits(const xray::LogitBlock<S>& b, S* tile) {
  const int64_t width = vectors_of<S>(b.columns);
  multiply_panels<Start::kZero>(
      tile, xray::kBlockStride, b.image, b.channels, b.text, b.channels, b.rows, width, b.channels);
  for (int64_t i = 0; i < b.rows; ++i)
    for (int64_t j = 0; j < width; j += lanes<S>)
      store(tile + i * xray::kBlockStride + j, load(tile + i * xray::kBlockStride + j) * b.scale);
}

// dI += dS T and dT += dS^T I, as far as asked for; `turned` is scratch.
template <class S>
static void add_gradients(const xray::LogitBlock<S>& b, const xray::FeatureGradients<S>& to, const S* grad, S* turned) {
  if (to.image)
    multiply_panels<Start::kSum>(
        to.image, b.channels, grad, xray::kBlockStride, b.text_panels, b.panel_rows, b.rows, b.channels, b.columns);
  if (to.text) {
    constexpr int64_t unit = lanes<S> > 8 ? lanes<S> : 8;
    const int64_t rows = (b.rows + unit - 1) / unit * unit, columns = (b.columns + unit - 1) / unit * unit;
    transpose(turned, xray::kBlockStride, grad, xray::kBlockStride, rows, columns);
    multiply_panels<Start::kSum>(
        to.text, b.channels, turned, xray::kBlockStride, b.image_panels, b.panel_rows, b.columns, b.channels, b.rows);
  }
}

// ---- positives and ranks ----

// f(i, j) for each image and text of one label.
template <class S, class F>
XRAY_INLINE void for_each_match(const xray::LogitBlock<S>& b, F&& f) {
  if (!b.may_match) return;
  for (int64_t i = 0; i < b.rows; ++i) {
    const int32_t label = b.image_labels[i];
    for (int64_t j = 0; j < b.columns; ++j)
      if (b.text_labels[j] == label) f(i, j);
  }
}

template <class S>
static void count_ranks(const xray::LogitBlock<S>& b, const xray::RankCount<S>& to, const S* tile) {
  using V = typename Wide<S>::Vector;
  using M = decltype(V{} < V{});
  if (!to.image_pairs) return;
  const auto sum = [](M mask, int64_t count) XRAY_LAMBDA {
    int32_t total = 0;
    for (int64_t l = 0; l < count; ++l) total -= int32_t(mask[l]);
    return total;
  };
  for (int64_t i = 0; i < b.rows; ++i) {
    const V pair = V{} + to.image_pairs[i];
    M count{};
    int64_t j = 0;
    for (; j + lanes<S> <= b.columns; j += lanes<S>) count += load(tile + i * xray::kBlockStride + j) >= pair;
    to.image_ranks[i] += sum(count, lanes<S>);
    if (j < b.columns) to.image_ranks[i] += sum(load(tile + i * xray::kBlockStride + j) >= pair, b.columns - j);
  }
  for (int64_t j = 0; j < b.columns; j += lanes<S>) {
    const int64_t here = b.columns - j < lanes<S> ? b.columns - j : lanes<S>;
    const V pair = load_first(to.text_pairs + j, here);
    M count{};
    for (int64_t i = 0; i < b.rows; ++i) count += load(tile + i * xray::kBlockStride + j) >= pair;
    for (int64_t l = 0; l < here; ++l) to.text_ranks[j + l] -= int32_t(count[l]);
  }
  for_each_match(b, [&](int64_t i, int64_t j) XRAY_LAMBDA {
    to.image_ranks[i] -= tile[i * xray::kBlockStride + j] >= to.image_pairs[i];
    to.text_ranks[j] -= tile[i * xray::kBlockStride + j] >= to.text_pairs[j];
  });
}

// ---- the softmax loss ----

template <class S, class V>
static inline S max_lanes(V value) {
  S best = value[0];
  for (size_t l = 1; l < sizeof(V) / sizeof(S); ++l) best = best < value[l] ? S(value[l]) : best;
  return best;
}

// Two log-sum-exps become one, lane by lane; -infinity and 0 is that of nothing.
template <class S, class V>
XRAY_INLINE void merge(S* top, S* sum, V part_top, V part_sum) {
  const V before = load(top), best = before < part_top ? part_top : before;
  const V total = load(sum) * exp2_of((before - best) * S(kLog2E)) + part_sum * exp2_of((part_top - best) * S(kLog2E));
  store(top, best);
  store(sum, total);
}

// Adds a block's logits to the statistics; `tops` is scratch, two numbers for each row.
template <class S>
static void add_statistics(const xray::LogitBlock<S>& b, const xray::Statistics<S>& to, S* tile, S* tops) {
  using V = typename Wide<S>::Vector;
  constexpr int64_t L = lanes<S>;
  const int64_t width = vectors_of<S>(b.columns);
  S* sums = tops + vectors_of<S>(b.rows);
  if (b.kept)
    for (int64_t i = 0; i < b.kept_count; ++i)
      memcpy(b.kept + i * b.kept_row, tile + i * xray::kBlockStride, b.columns * sizeof(S));
  for_each_match(b, [&](int64_t i, int64_t j) XRAY_LAMBDA { to.positive[i] += tile[i * xray::kBlockStride + j]; });
  count_ranks(b, to.ranks, tile);
  for (int64_t i = 0; i < b.rows; ++i) {
    S* row = tile + i * xray::kBlockStride;
    for (int64_t j = b.columns; j < width; ++j) row[j] = S(-__builtin_inf());
    V best = load(row);
    for (int64_t j = L; j < width; j += L) {
      const V logit = load(row + j);
      best = best < logit ? logit : best;
    }
    tops[i] = max_lanes<S>(best);
    V sum{};
    for (int64_t j = 0; j < width; j += L) sum += exp2_of((load(row + j) - tops[i]) * S(kLog2E));
    sums[i] = sum_lanes<S>(sum);
  }
  for (int64_t i = b.rows; i < vectors_of<S>(b.rows); ++i) tops[i] = sums[i] = 0;
  for (int64_t i = 0; i < b.rows; i += L) merge(to.row_top + i, to.row_sum + i, load(tops + i), load(sums + i));
  for (int64_t j = 0; j < width; j += L) {
    V best = load(tile + j), sum{};
    for (int64_t i = 1; i < b.rows; ++i) {
      const V logit = load(tile + i * xray::kBlockStride + j);
      best = best < logit ? logit : best;
    }
    for (int64_t i = 0; i < b.rows; ++i) sum += exp2_of((load(tile + i * xray::kBlockStride + j) - best) * S(kLog2E));
    merge(to.column_top + j, to.column_sum + j, best, sum);
  }
}

template <class S>
static void forward_block(const xray::LogitBlock<S>& b, const xray::Statistics<S>& to, S* scratch) {
  compute_logits(b, scratch);
  add_statistics(b, to, scratch, scratch + b.panel_rows * xray::kBlockStride);
}

// The logits that were kept.
template <class S>
static void copy_kept(const xray::LogitBlock<S>& b, S* tile) {
  for (int64_t i = 0; i < b.rows; ++i)
    memcpy(tile + i * xray::kBlockStride, b.kept + i * b.kept_row, b.columns * sizeof(S));
}

// Logits become their gradients.
template <class S>
static void softmax_gradient(const xray::LogitBlock<S>& b, const xray::SoftmaxGradient<S>& in, S* tile) {
  using V = typename Wide<S>::Vector;
  for (int64_t i = 0; i < b.rows; ++i) {
    S* row = tile + i * xray::kBlockStride;
    const S high = in.row.high[i], low = in.row.low[i], weight = in.row.weight[i];
    for (int64_t j = 0; j < b.columns; j += lanes<S>) {
      const V logit = load(row + j), column_high = load(in.column.high + j), column_low = load(in.column.low + j);
      const V by_row = exp2_of(((logit - high) - low) * S(kLog2E));
      const V by_column = exp2_of(((logit - column_high) - column_low) * S(kLog2E));
      store(row + j, by_row * weight + by_column * load(in.column.weight + j));
    }
  }
  for_each_match(b, [&](int64_t i, int64_t j) XRAY_LAMBDA { tile[i * xray::kBlockStride + j] += in.positive[i]; });
}

template <class S>
static void backward_block(
    const xray::LogitBlock<S>& b, const xray::SoftmaxGradient<S>& in, const xray::FeatureGradients<S>& to, S* scratch) {
  if (b.kept) {
    copy_kept(b, scratch);
  } else {
    compute_logits(b, scratch);
  }
  softmax_gradient(b, in, scratch);
  add_gradients(b, to, scratch, scratch + b.panel_rows * xray::kBlockStride);
}

// ---- the sigmoid loss ----

// log(1 + x) of x in [0, 1], within 2 units in the last place: 2 artanh(s), s = x / (2 + x), of which |s| <= 1/3.
XRAY_INLINE Float log1p_of(Float x) {
  const Float s = x / (x + 2.0f), q = s * s;
  Float p = 0.08333334f * q + 0.09090909f;
  p = p * q + 0.11111111f;
  p = p * q + 0.14285714f;
  p = p * q + 0.2f;
  p = p * q + 0.33333333f;
  return 2.0f * (s + s * q * p);
}

// float64 is for checking gradients
XRAY_INLINE Double log1p_of(Double x) {
  double at[lanes<double>];
  store(at, x);
  for (double& value : at) value = log1p(value);
  return load(at);
}

// Adds -log sigmoid(z x), x = logit + bias; z = 1 for positives, -1 for all others. Logits become their gradients.
// `positives` is scratch as large.
template <class S>
static void sigmoid_gradient(const xray::LogitBlock<S>& b, const xray::Sigmoid<S>& in, S* tile, S* positives) {
  using V = typename Wide<S>::Vector;
  count_ranks(b, in.ranks, tile);
  // Positives are left out of the vectors as -infinity, whose loss and gradient are 0, and wait.
  for_each_match(b, [&](int64_t i, int64_t j) XRAY_LAMBDA {
    positives[i * xray::kBlockStride + j] = tile[i * xray::kBlockStride + j];
    tile[i * xray::kBlockStride + j] = S(-__builtin_inf());
  });
  double total = 0, grad_bias = 0;
  for (int64_t i = 0; i < b.rows; ++i) {
    S* row = tile + i * xray::kBlockStride;
    V loss{}, sum{};
    for (int64_t j = 0; j < b.columns; j += lanes<S>) {
      V x = load(row + j) + in.bias;
      if (b.columns - j < lanes<S>)
        for (int64_t l = b.columns - j; l < lanes<S>; ++l) x[l] = S(-__builtin_inf());
      const V size = x < 0 ? x : -x, e = exp2_of(size * S(kLog2E)), inverse = S(1) / (e + S(1));
      loss += (x < 0 ? V{} : x) + log1p_of(e);
      const V grad = x < 0 ? e * inverse : inverse;
      sum += grad;
      store(row + j, grad);
    }
    total += sum_lanes<S>(loss);
    grad_bias += sum_lanes<S>(sum);
  }
  for_each_match(b, [&](int64_t i, int64_t j) XRAY_LAMBDA {
    const double x = double(positives[i * xray::kBlockStride + j]) + double(in.bias), e = exp(x < 0 ? x : -x);
    const double grad = -(x < 0 ? 1 : e) / (1 + e);
    total += (x < 0 ? -x : 0) + log1p(e);
    grad_bias += grad;
    tile[i * xray::kBlockStride + j] = S(grad);
  });
  *in.total += total;
  *in.grad_bias += grad_bias;
}

template <class S>
static void sigmoid_block(
    const xray::LogitBlock<S>& b, const xray::Sigmoid<S>& in, const xray::FeatureGradients<S>& to, S* scratch) {
  S* turned = scratch + b.panel_rows * xray::kBlockStride;
  compute_logits(b, scratch);
  sigmoid_gradient(b, in, scratch, turned);
  if (to.image || to.text) add_gradients(b, to, scratch, turned);
}

// ---- whole rows ----

// Sums of gradients times `factor`, to their place and dtype; returns the sum over channels of these sums times the
// features, in float64, where these are given.
template <class T, class U>
static double finish_rows(
    T* to, int64_t to_row, const typename Wide<T>::Scalar* sums, int64_t sums_row, const U* features,
    int64_t features_row, int64_t count, int64_t channels, typename Wide<T>::Scalar factor) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto* from = sums + i * sums_row;
    if (features)
      total += sum_over<U>(0, channels, [&](int64_t c, int64_t n) XRAY_LAMBDA {
        return load_first(from + c, n) * load_first(features + i * features_row + c, n);
      });
    for_each_vector<T>(0, channels, [&](int64_t c, int64_t n) XRAY_LAMBDA {
      store_first(to + i * to_row + c, load_first(from + c, n) * factor, n);
    });
  }
  return total;
}
