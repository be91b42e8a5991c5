// Binds the CUDA kernels of the contrastive losses to the ops: loops over panels of logits, between products by
// PyTorch. Not measured on a GPU yet: selected by XRAY_KERNELS=cuda.

#include "contrastive_loss/cuda.h"

#include <limits>

#include "common/cuda_stream.h"
#include "contrastive_loss/cuda_product.h"

namespace xray {
namespace {

// Contiguous, and of the type that kernels read; the tensor itself where it is that already.
Tensor as(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// A product of so few logits takes less than its launch in any dtype, so it is one of float32 matrices, whose dS is not
// rounded: in half precision the few large dS of a small batch, its positives, leave their rounding in the gradient.
constexpr int64_t kFewLogits = 64 * 64;

// Features, scale and labels of a call, checked and as kernels want them.
struct Batch {
  Tensor image, text, scale, image_labels, text_labels;
  Element type;
  int64_t rows, columns, width;
  Tensor image_factor, text_factor;  // what products take: the features, or these in float32
  Element factor_type;

  Batch(
      const Tensor& image_, const Tensor& text_, const Tensor& scale_, const Tensor& image_labels_,
      const Tensor& text_labels_)
      : image(with_dense_rows(image_)),
        text(with_dense_rows(text_)),
        scale(as(scale_, ScalarType::Float)),
        image_labels(as_labels(image_labels_, "image_labels", image_.size(0))),
        text_labels(as_labels(text_labels_, "text_labels", text_.size(0))),
        type(element(image_, "image")),
        rows(image_.size(0)),
        columns(text_.size(0)),
        width(image_.size(1)),
        image_factor(image),
        text_factor(text),
        factor_type(type) {
    STD_TORCH_CHECK(
        image.scalar_type() == text.scalar_type() && text.size(1) == width,
        "text must have the dtype and width of image");
    STD_TORCH_CHECK(scale.numel() == 1, "logit_scale must have one element, got ", scale.numel());
    STD_TORCH_CHECK(
        rows <= INT32_MAX && columns <= INT32_MAX, "image and text must have fewer than 2^31 rows for the CUDA kernel");
    if (rows * columns > kFewLogits) return;
    image_factor = as(image, ScalarType::Float);
    text_factor = as(text, ScalarType::Float);
    factor_type = Element::kFloat;
  }
  bool has_half_factors() const {
    return factor_type != Element::kFloat;
  }

 private:
  static Tensor as_labels(const Tensor& labels, const char* name, int64_t count) {
    STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Int, name, " must be int32 for the CUDA kernel");
    STD_TORCH_CHECK(labels.numel() == count, name, " must have ", count, " elements, got ", labels.numel());
    return torch::stable::contiguous(labels);
  }
};

// A part of the logits; the first `kept` rows of all are never in one with others.
struct Part {
  int64_t row, rows, column, columns;
};

template <class F>
void for_parts(const Batch& batch, int64_t kept, const PanelShape& shape, F&& f) {
  for (int64_t row = 0, next = 0; row < batch.rows; row = next) {
    next = std::min(row + shape.tall, row < kept ? kept : batch.rows);
    for (int64_t column = 0; column < batch.columns; column += shape.broad)
      f(Part{row, next - row, column, std::min(shape.broad, batch.columns - column)});
  }
}

Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(matrix), 0, first, count);
}

Tensor part_of(const Tensor& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Tensor some = rows_of(matrix, row, rows);
  return torch::stable::narrow(some, 1, column, columns);
}

Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, 0, 1);
}

Tensor new_panel(const Batch& batch, const PanelShape& shape, ScalarType type) {
  const int64_t stride = (std::min(shape.broad, batch.columns) + kPanelUnit - 1) / kPanelUnit * kPanelUnit;
  return torch::stable::new_empty(batch.image, {shape.tall, stride}, type);
}

// I T^T of a part, at the start of `panel`.
void logits_out(Tensor& panel, const Batch& batch, const Part& part) {
  Tensor out = part_of(panel, 0, part.rows, 0, part.columns);
  product_out(
      out, rows_of(batch.image_factor, part.row, part.rows),
      transposed(rows_of(batch.text_factor, part.column, part.columns)));
}

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The logits of pairs that ranks are counted against, and the ranks; both empty where they are not wanted.
struct Ranks {
  Tensor image_pairs, text_pairs, image_ranks, text_ranks;

  Ranks(const Batch& batch, const Tensor& image_pairs_, const Tensor& text_pairs_)
      : image_pairs(as(image_pairs_, ScalarType::Float)),
        text_pairs(as(text_pairs_, ScalarType::Float)),
        image_ranks(torch::stable::new_zeros(image_pairs, {image_pairs.numel()}, ScalarType::Int)),
        text_ranks(torch::stable::new_zeros(text_pairs, {text_pairs.numel()}, ScalarType::Int)) {
    for (const auto& [pairs, count, name] :
         {std::tuple(&image_pairs, batch.rows, "image_pairs"), std::tuple(&text_pairs, batch.columns, "text_pairs")})
      STD_TORCH_CHECK(
          pairs->numel() == 0 || pairs->numel() == count, name, " must have ", count, " elements or none, got ",
          pairs->numel());
  }
  PanelPairs of(const Batch& batch, const Part& part) {
    PanelPairs pairs{};
    pairs.row_labels = data<int32_t>(batch.image_labels) + part.row;
    pairs.column_labels = data<int32_t>(batch.text_labels) + part.column;
    if (image_pairs.numel()) {
      pairs.row_pairs = data<float>(std::as_const(image_pairs)) + part.row;
      pairs.row_ranks = data<unsigned>(image_ranks) + part.row;
    }
    if (text_pairs.numel()) {
      pairs.column_pairs = data<float>(std::as_const(text_pairs)) + part.column;
      pairs.column_ranks = data<unsigned>(text_ranks) + part.column;
    }
    return pairs;
  }
};

// The gradient of the images or of the texts, summed over panels in float32.
class GradientSum {
 public:
  GradientSum(const Tensor& features, bool wanted, bool has_logits) : features_(features), wanted_(wanted) {
    const int64_t rows = features.size(0), width = features.size(1);
    if (!wanted) {
      sum_ = torch::stable::new_empty(features, {0}, ScalarType::Float);
    } else if (has_logits) {
      sum_ = torch::stable::new_empty(features, {rows, width}, ScalarType::Float);
    } else {
      sum_ = torch::stable::new_zeros(features, {rows, width}, ScalarType::Float);
    }
  }
  // Adds a b, for the rows from `first` on; `part` is room for it where these rows have a sum already.
  void add(int64_t first, const Tensor& a, const Tensor& b, bool is_first, Tensor& part, cudaStream_t stream) {
    const int64_t rows = a.size(0), width = features_.size(1);
    Tensor sum = rows_of(sum_, first, rows);
    if (is_first) return product_out(sum, a, b);
    Tensor out = rows_of(part, 0, rows);
    product_out(out, a, b);
    check_launch(
        launch_accumulate(data<float>(sum), data<float>(std::as_const(out)), rows * width, stream), "accumulate");
  }
  // The gradient, in float32 or in the dtype of the features, of a sum that is `constant` / `factor` of what it should
  // be; and where `dot` is there, the gradient of the scale.
  Tensor finish(
      const Batch& batch, const float* factor, float constant, bool is_wide, double* dot, cudaStream_t stream) {
    const bool in_place = is_wide || batch.type == Element::kFloat;
    Tensor out = in_place   ? sum_
                 : !wanted_ ? torch::stable::new_empty(features_, {0})
                            : torch::stable::new_empty(features_, {features_.size(0), features_.size(1)});
    if (!wanted_) return out;
    FinishGradient call{};
    call.sum = data<float>(std::as_const(sum_));
    call.rows = features_.size(0);
    call.width = features_.size(1);
    call.scale = data<float>(batch.scale);
    call.factor = factor;
    call.constant = constant;
    call.out = out.mutable_data_ptr();
    call.is_wide = is_wide;
    call.features = features_.const_data_ptr();
    call.feature_stride = features_.stride(0);
    Tensor partials = torch::stable::new_empty(features_, {finish_partials(call.rows)}, ScalarType::Double);
    if (dot) call.partials = data<double>(partials);
    check_launch(launch_finish(call, batch.type, stream), "gradient of features");
    if (dot) check_launch(launch_total(dot, call.partials, partials.numel(), 1, stream), "gradient of logit_scale");
    return out;
  }

 private:
  Tensor features_, sum_;
  bool wanted_;
};

// Both gradients of features from dS of one panel after the other.
class Gradients {
 public:
  Gradients(const Batch& batch, int64_t kept, const PanelShape& shape, bool image_grad, bool text_grad)
      : image(batch.image, image_grad, batch.columns > 0),
        text(batch.text, text_grad, batch.rows > 0),
        batch_(batch),
        image_grad_(image_grad),
        text_grad_(text_grad) {
    const bool is_whole = shape.tall >= batch.rows && shape.broad >= batch.columns && (kept == 0 || kept == batch.rows);
    const int64_t rows = is_whole ? 0 : std::max(shape.tall, shape.broad);
    part_ = torch::stable::new_empty(batch.image, {rows, batch.width}, ScalarType::Float);
  }
  void add(const Tensor& grads, const Part& part, cudaStream_t stream) {
    const Tensor of_part = part_of(grads, 0, part.rows, 0, part.columns);
    if (image_grad_)
      image.add(
          part.row, of_part, rows_of(batch_.text_factor, part.column, part.columns), part.column == 0, part_, stream);
    if (text_grad_)
      text.add(
          part.column, transposed(of_part), rows_of(batch_.image_factor, part.row, part.rows), part.row == 0, part_,
          stream);
  }

  GradientSum image, text;

 private:
  const Batch& batch_;
  bool image_grad_, text_grad_;
  Tensor part_;
};

// Panels for an op with gradients: logits, dS in half precision beside them, and room for a product with dS.
PanelShape gradient_panels(const Batch& batch, bool with_grads, int64_t workspace) {
  return plan_panels(
      batch.rows, batch.columns, with_grads && batch.has_half_factors() ? 6 : 4,
      with_grads ? 4.0 * batch.width + 16 : 16, workspace);
}

Tensor contrastive_pairs(Tensor image, Tensor text, Tensor logit_scale) {
  const OnDevice device(image);
  const Element type = element(image, "image");
  STD_TORCH_CHECK(
      image.scalar_type() == text.scalar_type() && image.size(0) == text.size(0) && image.size(1) == text.size(1),
      "text must have the shape and dtype of image");
  image = with_dense_rows(image);
  text = with_dense_rows(text);
  const Tensor scale = as(logit_scale, ScalarType::Float);
  Tensor out = torch::stable::new_empty(image, {image.size(0)}, ScalarType::Float);
  Pairs call{};
  call.image = image.const_data_ptr();
  call.text = text.const_data_ptr();
  call.rows = image.size(0);
  call.width = image.size(1);
  call.image_stride = image.stride(0);
  call.text_stride = text.stride(0);
  call.scale = data<float>(scale);
  call.out = data<float>(out);
  check_launch(launch_pairs(call, type, device.stream()), "contrastive_pairs");
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> contrastive_statistics(
    Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels, Tensor text_labels, Tensor image_pairs,
    Tensor text_pairs, int64_t kept_rows, int64_t workspace_bytes) {
  const OnDevice device(image);
  const Batch batch(image, text, logit_scale, image_labels, text_labels);
  Ranks ranks(batch, image_pairs, text_pairs);
  STD_TORCH_CHECK(
      0 <= kept_rows && kept_rows <= batch.rows, "kept_rows must be from 0 to ", batch.rows, ", got ", kept_rows);
  Tensor row_lse = torch::stable::new_empty(batch.image, {batch.rows}, ScalarType::Double);
  Tensor column_lse = torch::stable::new_empty(batch.image, {batch.columns}, ScalarType::Double);
  torch::stable::fill_(row_lse, -std::numeric_limits<double>::infinity());
  torch::stable::fill_(column_lse, -std::numeric_limits<double>::infinity());
  Tensor positive = torch::stable::new_zeros(batch.image, {batch.rows}, ScalarType::Double);
  Tensor kept = torch::stable::new_empty(batch.image, {kept_rows, batch.columns}, ScalarType::Float);

  // a row has 16 bytes of partial results a tile, a column 8
  const PanelShape shape = plan_panels(
      batch.rows, batch.columns, 4 + 16.0 / kStatisticsColumns + 8.0 / kStatisticsRows, 32, workspace_bytes);
  const auto new_floats = [&](int64_t count) {
    return torch::stable::new_empty(batch.image, {count}, ScalarType::Float);
  };
  Tensor panel = new_panel(batch, {kept_rows < batch.rows ? shape.tall : 0, shape.broad}, ScalarType::Float);
  Tensor row_partials = new_floats(statistics_row_partials(shape.tall, shape.broad));
  Tensor column_partials = new_floats(statistics_column_partials(shape.tall, shape.broad));
  for_parts(batch, kept_rows, shape, [&](const Part& part) {
    StatisticsPanel call{};
    call.keep = part.row < kept_rows;
    Tensor logits = call.keep ? part_of(kept, part.row, part.rows, part.column, part.columns) : panel;
    logits_out(logits, batch, part);
    call.logits = data<float>(logits);
    call.stride = logits.stride(0);
    call.rows = part.rows;
    call.columns = part.columns;
    call.scale = data<float>(batch.scale);
    call.pairs = ranks.of(batch, part);
    call.row_partials = data<float>(row_partials);
    call.column_partials = data<float>(column_partials);
    call.row_lse = data<double>(row_lse) + part.row;
    call.column_lse = data<double>(column_lse) + part.column;
    call.positive = data<double>(positive) + part.row;
    check_launch(launch_statistics(call, device.stream()), "contrastive_statistics");
  });
  return {row_lse, column_lse, positive, ranks.image_ranks, ranks.text_ranks, kept};
}

std::tuple<Tensor, Tensor, Tensor> contrastive_statistics_backward(
    Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels, Tensor text_labels, Tensor row_lse,
    Tensor column_lse, Tensor kept, Tensor grad_row, Tensor grad_column, Tensor grad_positive, int64_t workspace_bytes,
    bool image_grad, bool text_grad) {
  const OnDevice device(image);
  const Batch batch(image, text, logit_scale, image_labels, text_labels);
  const int64_t kept_rows = kept.size(0);
  STD_TORCH_CHECK(
      kept.scalar_type() == ScalarType::Float && kept_rows <= batch.rows && kept.size(1) == batch.columns,
      "kept must be what contrastive_statistics returned");
  for (Tensor* tensor : {&row_lse, &column_lse, &grad_row, &grad_column, &grad_positive}) {
    const int64_t count = tensor == &column_lse || tensor == &grad_column ? batch.columns : batch.rows;
    STD_TORCH_CHECK(tensor->numel() == count, "log-sum-exps and their gradients must be one a row or column");
    *tensor = as(*tensor, ScalarType::Double);
  }
  kept = with_dense_rows(kept);

  const PanelShape shape = gradient_panels(batch, true, workspace_bytes);
  Tensor panel = new_panel(batch, shape, ScalarType::Float);
  Tensor grads = batch.has_half_factors() ? new_panel(batch, shape, batch.image.scalar_type()) : panel;
  Gradients gradients(batch, kept_rows, shape, image_grad, text_grad);
  Tensor grad_scale = torch::stable::new_zeros(batch.image, {}, ScalarType::Double);
  Tensor factor = torch::stable::new_empty(batch.image, {1}, ScalarType::Float);
  const float* factor_data = nullptr;
  if (batch.factor_type == Element::kHalf) {
    GradientFactor call{};
    call.grad_row = data<double>(std::as_const(grad_row));
    call.grad_column = data<double>(std::as_const(grad_column));
    call.grad_positive = data<double>(std::as_const(grad_positive));
    call.rows = batch.rows;
    call.columns = batch.columns;
    call.factor = data<float>(factor);
    check_launch(launch_gradient_factor(call, device.stream()), "contrastive_statistics_backward");
    factor_data = call.factor;
  }
  for_parts(batch, kept_rows, shape, [&](const Part& part) {
    GradientPanel call{};
    if (part.row < kept_rows) {
      call.logits = data<float>(std::as_const(kept)) + part.row * kept.stride(0) + part.column;
      call.stride = kept.stride(0);
    } else {
      logits_out(panel, batch, part);
      call.logits = data<float>(std::as_const(panel));
      call.stride = panel.stride(0);
      call.scale = data<float>(batch.scale);
    }
    call.rows = part.rows;
    call.columns = part.columns;
    call.row_labels = data<int32_t>(batch.image_labels) + part.row;
    call.column_labels = data<int32_t>(batch.text_labels) + part.column;
    call.row_lse = data<double>(std::as_const(row_lse)) + part.row;
    call.column_lse = data<double>(std::as_const(column_lse)) + part.column;
    call.grad_row = data<double>(std::as_const(grad_row)) + part.row;
    call.grad_column = data<double>(std::as_const(grad_column)) + part.column;
    call.grad_positive = data<double>(std::as_const(grad_positive)) + part.row;
    call.factor = factor_data;
    call.out = grads.mutable_data_ptr();
    call.out_stride = grads.stride(0);
    check_launch(launch_gradient(call, batch.factor_type, device.stream()), "contrastive_statistics_backward");
    gradients.add(grads, part, device.stream());
  });
  double* dot = image_grad ? data<double>(grad_scale) : nullptr;
  Tensor grad_image = gradients.image.finish(batch, factor_data, 1.0f, false, dot, device.stream());
  Tensor grad_text = gradients.text.finish(batch, factor_data, 1.0f, false, nullptr, device.stream());
  return {grad_image, grad_text, torch::stable::to(grad_scale, logit_scale.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive(
    Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor image_labels, Tensor text_labels,
    Tensor image_pairs, Tensor text_pairs, int64_t workspace_bytes, bool image_grad, bool text_grad) {
  const OnDevice device(image);
  const Batch batch(image, text, logit_scale, image_labels, text_labels);
  Ranks ranks(batch, image_pairs, text_pairs);
  const Tensor bias = as(logit_bias, ScalarType::Float);
  STD_TORCH_CHECK(bias.numel() == 1, "logit_bias must have one element, got ", bias.numel());

  const bool with_grads = image_grad || text_grad;
  const PanelShape shape = gradient_panels(batch, with_grads, workspace_bytes);
  Tensor panel = new_panel(batch, shape, ScalarType::Float);
  Tensor grads = with_grads && batch.has_half_factors() ? new_panel(batch, shape, batch.image.scalar_type()) : panel;
  Gradients gradients(batch, 0, shape, image_grad, text_grad);
  const int64_t tiles = sigmoid_tiles(shape.tall, shape.broad);
  Tensor partials = torch::stable::new_zeros(batch.image, {tiles, 2}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(batch.image, {}, ScalarType::Double);
  Tensor grad_scale = torch::stable::new_zeros(batch.image, {}, ScalarType::Double);
  Tensor grad_bias = torch::stable::new_zeros(batch.image, {}, ScalarType::Double);
  for_parts(batch, 0, shape, [&](const Part& part) {
    logits_out(panel, batch, part);
    SigmoidPanel call{};
    call.logits = data<float>(std::as_const(panel));
    call.stride = panel.stride(0);
    call.rows = part.rows;
    call.columns = part.columns;
    call.scale = data<float>(batch.scale);
    call.bias = data<float>(bias);
    call.pairs = ranks.of(batch, part);
    call.partials = data<double>(partials);
    call.out = with_grads ? grads.mutable_data_ptr() : nullptr;
    call.out_stride = grads.stride(0);
    check_launch(launch_sigmoid(call, batch.factor_type, device.stream()), "sigmoid_contrastive");
    if (with_grads) gradients.add(grads, part, device.stream());
  });
  const auto sum = [&](Tensor& to, int64_t which) {
    check_launch(
        launch_total(data<double>(to), data<double>(partials) + which, tiles, 2, device.stream()),
        "sigmoid_contrastive");
  };
  sum(total, 0);
  if (image_grad) sum(grad_bias, 1);
  const float constant = batch.has_half_factors() ? 1.0f / kLargestGradient : 1.0f;
  double* dot = image_grad ? data<double>(grad_scale) : nullptr;
  Tensor grad_image = gradients.image.finish(batch, nullptr, constant, true, dot, device.stream());
  Tensor grad_text = gradients.text.finish(batch, nullptr, constant, true, nullptr, device.stream());
  return {total, grad_image, grad_text, grad_scale, grad_bias, ranks.image_ranks, ranks.text_ranks};
}

}  // namespace
}  // namespace xray

STABLE_TORCH_LIBRARY_IMPL(xray_kernels, CUDA, m) {
  m.impl("contrastive_pairs", TORCH_BOX(&xray::contrastive_pairs));
  m.impl("contrastive_statistics", TORCH_BOX(&xray::contrastive_statistics));
  m.impl("contrastive_statistics_backward", TORCH_BOX(&xray::contrastive_statistics_backward));
  m.impl("sigmoid_contrastive", TORCH_BOX(&xray::sigmoid_contrastive));
}
