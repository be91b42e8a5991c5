// CPU kernels of the contrastive losses: features are packed a panel at a time by all threads, then threads take blocks
// of logits. Every number is summed in one order, whatever the number of threads.

#include "contrastive_loss/cpu_blocks.h"

#define XRAY_KERNEL_FILE "contrastive_loss/cpu_kernel.h"
#define XRAY_AMX_KERNEL_FILE "contrastive_loss/cpu_amx_kernel.h"
#include "common/variants.h"

#include "common/cpu_tiles.h"
#include "contrastive_loss/cpu_grid.h"

namespace xray {
namespace {

template <class T>
struct Features {
  const T* data;
  int64_t row, count;

  explicit Features(const Tensor& tensor)
      : data(static_cast<const T*>(tensor.const_data_ptr())), row(tensor.stride(0)), count(tensor.size(0)) {
  }
  const T* at(int64_t i) const {
    return data + i * row;
  }
};

double scalar_of(const Tensor& tensor) {
  double value = 0;
  for_element_type(tensor, "logit_scale and logit_bias", [&](auto type) {
    using T = decltype(type);
    value = widen(*static_cast<const T*>(tensor.const_data_ptr()));
  });
  return value;
}

// A number in a tensor of no dimensions.
Tensor scalar_like(const Tensor& like, std::optional<ScalarType> type, double value) {
  Tensor result = torch::stable::new_empty(like, {}, type);
  for_element_type(result, "logit_scale", [&](auto type) {
    using T = decltype(type);
    *static_cast<T*>(result.mutable_data_ptr()) = narrow<T>(WideScalar<T>(value));
  });
  return result;
}

template <class T>
T* data_of(Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return tensor.numel() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

// Fewer images are left to vectors: they do not fill a tile, and the few large gradients of their logits would show
// that tiles take them in bfloat16. All ops of a batch decide alike: ties are seen only where logits have the same
// bits.
constexpr int64_t kLeastImages = 16;

template <class T>
bool is_by_tiles(int64_t images) {
  return uses_tiles<T>() && images >= kLeastImages;
}

// Channels of packed features.
template <class T>
int64_t packed_channels(int64_t features, bool by_tiles) {
  XRAY_IF_TILES(T, if (by_tiles) return amx::whole_steps(features));
  return XRAY_CALL_VARIANT(whole_vectors<WideScalar<T>>, features);
}

// Numbers of scratch of a thread that packs.
template <class T>
int64_t packing_numbers(int64_t channels, bool by_tiles) {
  XRAY_IF_TILES(T, if (by_tiles) return amx::packing_scratch(channels));
  return XRAY_CALL_VARIANT(packing_scratch<WideScalar<T>>, channels);
}

// All that a pass over the logits needs of its inputs, and the pass itself.
template <class T>
class Pass {
 public:
  using S = WideScalar<T>;

  Pass(
      const Tensor& image, const Tensor& text, double scale, const Tensor& image_labels, const Tensor& text_labels,
      bool image_grad, bool text_grad, int64_t workspace_bytes)
      : image_(image),
        text_(text),
        image_grad_(image_grad),
        text_grad_(text_grad),
        scale_(S(scale)),
        grid_(
            make_grid<S>(
                image_.count, text_.count, image.size(1),
                packed_channels<T>(image.size(1), is_by_tiles<T>(image_.count)), is_by_tiles<T>(image_.count),
                2 + image_grad + text_grad, workspace_bytes)),
        image_labels_(torch::stable::contiguous(image_labels)),
        text_labels_(torch::stable::contiguous(text_labels)),
        image_ranges_(data_of<int32_t>(image_labels_), image_.count, grid_.block),
        text_ranges_(data_of<int32_t>(text_labels_), text_.count, grid_.block),
        packed_(new_result(
            image, {(2 + image_grad + text_grad) * grid_.panel / grid_.block * grid_.packed}, wide_type(image))) {
  }

  const Grid& grid() const {
    return grid_;
  }

  // work(block, first row, first column, scratch) for each block.
  template <class F>
  void run(F&& work) {
    const int64_t size = grid_.panel / grid_.block * grid_.packed;
    S* image = data_of<S>(packed_);
    S* text = image + size;
    S* text_panels = image_grad_ ? text + size : nullptr;
    S* image_panels = text_grad_ ? text + (1 + image_grad_) * size : nullptr;
    for (int64_t row = 0; row < grid_.rows; row += grid_.panel) {
      const int64_t rows = std::min(grid_.panel, grid_.rows - row);
      pack(image_, row, rows, image, nullptr, image_panels);
      for (int64_t column = 0; column < grid_.columns; column += grid_.panel) {
        const int64_t columns = std::min(grid_.panel, grid_.columns - column);
        if (row == 0 || grid_.columns > grid_.panel) pack(text_, column, columns, nullptr, text, text_panels);
        const auto blocks = [&](int64_t count) { return (count + grid_.block - 1) / grid_.block; };
        for_each_pair(blocks(rows), blocks(columns), grid_.threads, [&] {
          const auto worker = std::make_shared<Worker<T>>(block_scratch(grid_.block, grid_.by_tiles));
          return [&, worker](int64_t i, int64_t j) {
            const int64_t image_at = i * grid_.packed, text_at = j * grid_.packed;
            i *= grid_.block, j *= grid_.block;
            LogitBlock<S> block{};
            block.rows = std::min(grid_.block, rows - i);
            block.columns = std::min(grid_.block, columns - j);
            block.channels = grid_.channels;
            block.panel_rows = grid_.block;
            block.scale = scale_;
            block.image = image + image_at;
            block.text = text + text_at;
            block.text_panels = text_panels ? text_panels + text_at : nullptr;
            block.image_panels = image_panels ? image_panels + image_at : nullptr;
            block.image_labels = data_of<int32_t>(image_labels_) + row + i;
            block.text_labels = data_of<int32_t>(text_labels_) + column + j;
            block.may_match = image_ranges_.meets(row + i, text_ranges_, column + j);
            work(block, row + i, column + j, worker->scratch());
          };
        });
      }
    }
  }

 private:
  // Rows [first, first + count) in the forms that are asked for: of images `rows`, of texts `columns`, and panels.
  void pack(const Features<T>& from, int64_t first, int64_t count, S* rows, S* columns, S* panels) const {
    for_each_task((count + grid_.block - 1) / grid_.block, [&] {
      const auto scratch = std::make_shared<Scratch<S>>(packing_numbers<T>(grid_.channels, grid_.by_tiles));
      return [&, scratch](int64_t number) {
        const int64_t at = number * grid_.block, here = std::min(grid_.block, count - at), to = number * grid_.packed;
        const T* source = from.at(first + at);
        XRAY_IF_TILES(
            T, if (grid_.by_tiles) return (rows ? amx::pack_images : amx::pack_texts)(
                   (rows ? rows : columns) + to, panels ? panels + to : nullptr, grid_.block, source, from.row, here,
                   grid_.features, scratch->data()));
        if (rows)
          XRAY_CALL_VARIANT(
              pack_rows<T>, rows + to, grid_.channels, round_up(here, 16), source, from.row, here, grid_.features,
              S(1));
        if (columns)
          XRAY_CALL_VARIANT(
              pack_columns<T>, columns + to, source, from.row, here, grid_.features, grid_.channels, scratch->data());
        if (panels)
          XRAY_CALL_VARIANT(
              pack_panels<T>, panels + to, grid_.block, source, from.row, here, grid_.features, grid_.channels);
      };
    });
  }

  Features<T> image_, text_;
  bool image_grad_, text_grad_;
  S scale_;
  Grid grid_;
  Tensor image_labels_, text_labels_;
  LabelRanges image_ranges_, text_ranges_;
  Tensor packed_;
};

// Sums of the gradients of one side's features: the result itself where that has whole vectors of the sums' dtype.
// Kernels for tiles keep these in tiles, the texts' transposed, until all are added.
template <class T>
class GradientSums {
 public:
  using S = WideScalar<T>;

  GradientSums(const Tensor& features, bool is_text, bool wanted, const Grid& grid, ScalarType type)
      : result(torch::stable::new_empty(features, {0}, type)),
        is_text_(is_text),
        by_tiles_(grid.by_tiles),
        channels_(grid.channels),
        block_(grid.block),
        count_(wanted ? features.size(0) : 0) {
    if (!wanted) return;
    sums_ = new_result(features, {round_up(count_, 16), channels_}, wide_type(features));
    if (type == wide_type(features) && grid.features == channels_) {
      result = torch::stable::narrow(*sums_, 0, 0, count_);
    } else {
      result = new_result(features, {count_, grid.features}, type);
    }
    for_each_task(blocks(), [&] {
      return [&](int64_t number) {
        const int64_t last = number + 1 == blocks() ? sums_->size(0) : (number + 1) * block_;
        std::fill(at(number * block_), at(last), S(0));
      };
    });
  }
  S* at(int64_t row) {
    return sums_ ? static_cast<S*>(sums_->mutable_data_ptr()) + row * channels_ : nullptr;
  }

  // The sums times `factor` become the result; returns what the images' were times their features, summed.
  template <class U>
  double finish(const Features<T>& features, S factor) {
    std::vector<double> parts(blocks());
    for_each_task(blocks(), [&] {
      const auto scratch = std::make_shared<Scratch<S>>(by_tiles_ ? 16 * channels_ : 0);
      return [&, scratch](int64_t number) {
        const int64_t row = number * block_, here = std::min(block_, count_ - row), width = result.size(1);
        XRAY_IF_TILES(T, if (by_tiles_) amx::sums_to_rows(at(row), here, channels_, is_text_, scratch->data()));
        parts[number] = XRAY_CALL_VARIANT(
            finish_rows, static_cast<U*>(result.mutable_data_ptr()) + row * width, width, at(row), channels_,
            is_text_ ? nullptr : features.at(row), features.row, here, width, factor);
      };
    });
    double total = 0;
    for (double part : parts) total += part;
    return total;
  }

  Tensor result;

 private:
  int64_t blocks() const {
    return (count_ + block_ - 1) / block_;
  }

  std::optional<Tensor> sums_;
  bool is_text_, by_tiles_;
  int64_t channels_, block_, count_;
};

// Ranks that are counted while a pass goes on; empty pairs ask for none.
template <class S>
struct Ranks {
  Tensor image_pairs, text_pairs, image, text;

  Ranks(const Tensor& image_pairs, const Tensor& text_pairs)
      : image_pairs(torch::stable::contiguous(image_pairs)),
        text_pairs(torch::stable::contiguous(text_pairs)),
        image(torch::stable::new_zeros(image_pairs, {image_pairs.numel()}, ScalarType::Int)),
        text(torch::stable::new_zeros(text_pairs, {text_pairs.numel()}, ScalarType::Int)) {
  }
  RankCount<S> at(int64_t row, int64_t column) {
    if (!image.numel()) return {};
    return {
        data_of<S>(std::as_const(image_pairs)) + row, data_of<S>(std::as_const(text_pairs)) + column,
        data_of<int32_t>(image) + row, data_of<int32_t>(text) + column};
  }
};

// Log-sum-exps from maxima and sums.
template <class S>
Tensor log_sum_exps(const Tensor& like, const std::vector<S>& top, const std::vector<S>& sum, int64_t count) {
  Tensor result = torch::stable::new_empty(like, {count}, ScalarType::Double);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) to[i] = double(top[i]) + log(double(sum[i]));
  return result;
}

// One side of the softmax, as vectors want it.
template <class S>
struct SideNumbers {
  std::vector<S> high, low, weight;

  SideNumbers(Tensor lse, Tensor grad, const char* name) : high(numbers<S>(lse.numel())), low(high), weight(high) {
    STD_TORCH_CHECK(
        lse.scalar_type() == ScalarType::Double && grad.scalar_type() == ScalarType::Double, name,
        " and its gradient must be float64");
    lse = torch::stable::contiguous(lse);
    grad = torch::stable::contiguous(grad);
    const double* from = static_cast<const double*>(lse.const_data_ptr());
    const double* weights = static_cast<const double*>(grad.const_data_ptr());
    for (int64_t i = 0; i < lse.numel(); ++i) {
      high[i] = S(from[i]);
      low[i] = S(from[i] - double(high[i]));
      weight[i] = S(weights[i]);
    }
  }
  SoftmaxSide<S> at(int64_t i) const {
    return {high.data() + i, low.data() + i, weight.data() + i};
  }
};

// ---- the ops ----

// The pairs' own logits, in the very order of additions of a block, so that ties are seen.
Tensor contrastive_pairs(Tensor image, Tensor text, Tensor logit_scale) {
  image = with_dense_rows(image);
  text = with_dense_rows(text);
  Tensor result = torch::stable::new_empty(image, {image.size(0)}, wide_type(image));
  const double scale = scalar_of(logit_scale);
  for_element_type(image, "image_features", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    const Features<T> images(image), texts(text);
    const int64_t features = image.size(1), count = images.count;
    const bool by_tiles = is_by_tiles<T>(count);
    const int64_t channels = packed_channels<T>(features, by_tiles);
    constexpr int64_t few = 16;
    for_each_task((count + few - 1) / few, [&] {
      const int64_t packed = packed_block(few, channels, by_tiles), packing = packing_numbers<T>(channels, by_tiles);
      const auto worker = std::make_shared<Worker<T>>(2 * packed + packing + block_scratch(few, by_tiles));
      return [=, &images, &texts, &result](int64_t number) {
        const int64_t first = number * few, here = std::min(few, count - first);
        S *rows = worker->scratch(), *columns = rows + packed, *unpacked = columns + packed, *tile = unpacked + packing;
        LogitBlock<S> block{};
        block.rows = block.columns = here;
        block.channels = channels;
        block.panel_rows = few;
        block.image = rows;
        block.text = columns;
        block.scale = S(scale);
        S* to = static_cast<S*>(result.mutable_data_ptr()) + first;
        XRAY_IF_TILES(
            T, if (by_tiles) return amx::compute_pairs(
                   block, to, images.at(first), images.row, texts.at(first), texts.row, features, unpacked, tile));
        XRAY_CALL_VARIANT(pack_rows<T>, rows, channels, few, images.at(first), images.row, here, features, S(1));
        XRAY_CALL_VARIANT(pack_columns<T>, columns, texts.at(first), texts.row, here, features, channels, unpacked);
        XRAY_CALL_VARIANT(compute_logits<S>, block, tile);
        for (int64_t i = 0; i < here; ++i) to[i] = tile[i * kBlockStride + i];
      };
    });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics(
    Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels, Tensor text_labels, Tensor image_pairs,
    Tensor text_pairs, int64_t kept_rows, int64_t workspace_bytes) {
  image = with_dense_rows(image);
  text = with_dense_rows(text);
  const int64_t n = image.size(0), num_texts = text.size(0);
  Tensor kept = new_result(image, {kept_rows, num_texts}, wide_type(image));
  Tensor positive = torch::stable::new_zeros(image, {n}, ScalarType::Double);
  const double scale = scalar_of(logit_scale);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> results;
  for_element_type(image, "image_features", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    Pass<T> pass(image, text, scale, image_labels, text_labels, false, false, workspace_bytes);
    const S nothing = -std::numeric_limits<S>::infinity();
    auto row_top = numbers<S>(n, nothing), row_sum = numbers<S>(n);
    auto column_top = numbers<S>(num_texts, nothing), column_sum = numbers<S>(num_texts);
    Ranks<S> ranks(image_pairs, text_pairs);
    pass.run([&](LogitBlock<S>& block, int64_t row, int64_t column, S* scratch) {
      const Statistics<S> to{
          row_top.data() + row,
          row_sum.data() + row,
          column_top.data() + column,
          column_sum.data() + column,
          static_cast<double*>(positive.mutable_data_ptr()) + row,
          ranks.at(row, column)};
      block.kept_row = num_texts;
      block.kept_count = std::clamp<int64_t>(kept_rows - row, 0, block.rows);
      if (block.kept_count) block.kept = data_of<S>(kept) + row * num_texts + column;
      XRAY_IF_TILES(T, if (pass.grid().by_tiles) return amx::forward_block(block, to, scratch));
      XRAY_CALL_VARIANT(forward_block<S>, block, to, scratch);
    });
    results = {
        log_sum_exps(image, row_top, row_sum, n),
        log_sum_exps(image, column_top, column_sum, num_texts),
        positive,
        ranks.image,
        ranks.text,
        kept};
  });
  return *results;
}

std::tuple<Tensor, Tensor, Tensor> contrastive_statistics_backward(
    Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels, Tensor text_labels, Tensor row_lse,
    Tensor column_lse, Tensor kept, Tensor grad_row, Tensor grad_column, Tensor grad_positive, int64_t workspace_bytes,
    bool image_grad, bool text_grad) {
  image = with_dense_rows(image);
  text = with_dense_rows(text);
  kept = torch::stable::contiguous(kept);
  grad_positive = torch::stable::contiguous(grad_positive);
  const double scale = scalar_of(logit_scale);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> results;
  for_element_type(image, "image_features", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    Pass<T> pass(image, text, scale, image_labels, text_labels, image_grad, text_grad, workspace_bytes);
    const SideNumbers<S> rows(row_lse, grad_row, "row_lse"), columns(column_lse, grad_column, "column_lse");
    const double* from = static_cast<const double*>(grad_positive.const_data_ptr());
    const std::vector<S> positive(from, from + image.size(0));
    GradientSums<T> image_sums(image, false, image_grad, pass.grid(), image.scalar_type());
    GradientSums<T> text_sums(text, true, text_grad, pass.grid(), text.scalar_type());
    if (image_grad || text_grad)
      pass.run([&](LogitBlock<S>& block, int64_t row, int64_t column, S* scratch) {
        block.kept_row = text.size(0);
        if (row + block.rows <= kept.size(0))
          block.kept = const_cast<S*>(data_of<S>(std::as_const(kept))) + row * block.kept_row + column;
        const SoftmaxGradient<S> in{rows.at(row), columns.at(column), positive.data() + row};
        const FeatureGradients<S> to{image_sums.at(row), text_sums.at(column)};
        XRAY_IF_TILES(T, if (pass.grid().by_tiles) return amx::backward_block(block, in, to, scratch));
        XRAY_CALL_VARIANT(backward_block<S>, block, in, to, scratch);
      });
    const double grad_scale = image_sums.template finish<T>(Features<T>(image), S(scale));
    text_sums.template finish<T>(Features<T>(text), S(scale));
    results = {image_sums.result, text_sums.result, scalar_like(logit_scale, std::nullopt, grad_scale)};
  });
  return *results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive(
    Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor image_labels, Tensor text_labels,
    Tensor image_pairs, Tensor text_pairs, int64_t workspace_bytes, bool image_grad, bool text_grad) {
  image = with_dense_rows(image);
  text = with_dense_rows(text);
  const double scale = scalar_of(logit_scale), bias = scalar_of(logit_bias);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> results;
  for_element_type(image, "image_features", [&](auto type) {
    using T = decltype(type);
    using S = WideScalar<T>;
    Pass<T> pass(image, text, scale, image_labels, text_labels, image_grad, text_grad, workspace_bytes);
    GradientSums<T> image_sums(image, false, image_grad, pass.grid(), wide_type(image));
    GradientSums<T> text_sums(text, true, text_grad, pass.grid(), wide_type(text));
    Ranks<S> ranks(image_pairs, text_pairs);
    const int64_t block_rows = (image.size(0) + pass.grid().block - 1) / pass.grid().block;
    std::vector<double> totals(block_rows), grad_biases(block_rows);  // by rows, whose blocks come in order
    pass.run([&](LogitBlock<S>& block, int64_t row, int64_t column, S* scratch) {
      const int64_t number = row / pass.grid().block;
      const Sigmoid<S> in{S(bias), &totals[number], &grad_biases[number], ranks.at(row, column)};
      const FeatureGradients<S> to{image_sums.at(row), text_sums.at(column)};
      XRAY_IF_TILES(T, if (pass.grid().by_tiles) return amx::sigmoid_block(block, in, to, scratch));
      XRAY_CALL_VARIANT(sigmoid_block<S>, block, in, to, scratch);
    });
    double total = 0, grad_bias = 0;
    for (int64_t i = 0; i < block_rows; ++i) {
      total += totals[i];
      grad_bias += grad_biases[i];
    }
    const double grad_scale = image_sums.template finish<S>(Features<T>(image), S(scale));
    text_sums.template finish<S>(Features<T>(text), S(scale));
    const auto as_double = [&](double value) { return scalar_like(image, ScalarType::Double, value); };
    results = {as_double(total),
               image_sums.result,
               text_sums.result,
               as_double(grad_scale),
               as_double(image_grad ? grad_bias : 0),
               ranks.image,
               ranks.text};
  });
  return *results;
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CPU, m) {
  m.impl("contrastive_pairs", TORCH_BOX(&xray::contrastive_pairs));
  m.impl("contrastive_statistics", TORCH_BOX(&xray::contrastive_statistics));
  m.impl("contrastive_statistics_backward", TORCH_BOX(&xray::contrastive_statistics_backward));
  m.impl("sigmoid_contrastive", TORCH_BOX(&xray::sigmoid_contrastive));
}
