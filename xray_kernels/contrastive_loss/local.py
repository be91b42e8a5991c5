"""The local ops of the contrastive losses: n images against N texts on one device, with their gradients.

Labels say what belongs together: image i and text j are positives of each other where image_labels[i] ==
text_labels[j]. So the same ops serve one process, a rank against a part of the texts of all ranks, and captions
that occur more than once. With U = 2 n N D floating-point operations, one n x N x D matrix product:

    contrastive_pairs                 0    logits of the pairs themselves, which ranks are counted against
    contrastive_statistics            U    log-sum-exp of rows and of columns, positive logits, ranks
    contrastive_statistics_backward   3U   recomputes logits (2U where they were kept); a product for each gradient
    sigmoid_contrastive               3U   the loss and its gradients in one pass; U when none are asked for
    sigmoid_contrastive_backward      0    multiplies these by the gradient that arrives
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xray_kernels import _library
from xray_kernels.contrastive_loss import reference
from xray_kernels.contrastive_loss.tiling import wide_dtype

_TRITON = "xray_kernels.contrastive_loss.triton"


def _fake_pairs(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    return image.new_empty(image.shape[0], dtype=wide_dtype(image.dtype))


def _setup_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _backward_pairs(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
    return None, None, None


def _fake_statistics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    image_labels: Tensor,
    text_labels: Tensor,
    image_pairs: Tensor,
    text_pairs: Tensor,
    kept_rows: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = image.new_empty(image.shape[0], dtype=torch.float64)
    return (
        rows,
        text.new_empty(text.shape[0], dtype=torch.float64),
        torch.empty_like(rows),
        torch.empty_like(image_pairs, dtype=torch.int32),
        torch.empty_like(text_pairs, dtype=torch.int32),
        image.new_empty((kept_rows, text.shape[0]), dtype=wide_dtype(image.dtype)),
    )


def _fake_statistics_backward(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    image_labels: Tensor,
    text_labels: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    kept: Tensor,
    grad_row: Tensor,
    grad_column: Tensor,
    grad_positive: Tensor,
    workspace_bytes: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape if image_grad else (0,)),
        text.new_empty(text.shape if text_grad else (0,)),
        logit_scale.new_empty(()),
    )


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, logit_scale, image_labels, text_labels, *_, ctx.kept_rows, ctx.workspace_bytes = inputs
    row_lse, column_lse, _, image_ranks, text_ranks, kept = output
    ctx.mark_non_differentiable(image_ranks, text_ranks, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, logit_scale, image_labels, text_labels, row_lse, column_lse, kept)


def _backward_statistics(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    image, text, logit_scale, *rest = ctx.saved_tensors
    row_lse, column_lse = rest[2:4]
    image_needs, text_needs, scale_needs = ctx.needs_input_grad[:3]
    filled = (
        torch.zeros_like(like) if grad is None else grad
        for grad, like in zip(grads[:3], (row_lse, column_lse, row_lse), strict=True)
    )
    grad_image, grad_text, grad_scale = contrastive_statistics_backward(
        image, text, logit_scale, *rest, *filled, ctx.workspace_bytes, image_needs or scale_needs, text_needs
    )
    return (
        grad_image if image_needs else None,
        grad_text if text_needs else None,
        grad_scale if scale_needs else None,
        *(None,) * 6,
    )


def _fake_sigmoid(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_labels: Tensor,
    text_labels: Tensor,
    image_pairs: Tensor,
    text_pairs: Tensor,
    workspace_bytes: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(image.dtype)
    total = image.new_empty((), dtype=torch.float64)
    return (
        total,
        image.new_empty(image.shape if image_grad else (0,), dtype=wide),
        text.new_empty(text.shape if text_grad else (0,), dtype=wide),
        torch.empty_like(total),
        torch.empty_like(total),
        torch.empty_like(image_pairs, dtype=torch.int32),
        torch.empty_like(text_pairs, dtype=torch.int32),
    )


def _fake_sigmoid_backward(
    grad: Tensor,
    grad_image: Tensor,
    grad_text: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(grad_image, dtype=dtype),
        torch.empty_like(grad_text, dtype=dtype),
        torch.empty_like(grad_scale),
        torch.empty_like(grad_bias),
    )


def _setup_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, _, logit_scale, logit_bias, *_, ctx.image_grad, ctx.text_grad = inputs
    ctx.dtypes = (image.dtype, logit_scale.dtype, logit_bias.dtype)
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:5])


def _backward_sigmoid(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    image_needs, text_needs, scale_needs, bias_needs = ctx.needs_input_grad[:4]
    if ((image_needs or scale_needs or bias_needs) and not ctx.image_grad) or (text_needs and not ctx.text_grad):
        raise RuntimeError("sigmoid_contrastive was called without the gradients that are now asked for")
    if grad is None:
        return (None,) * 11
    dtype, scale_dtype, bias_dtype = ctx.dtypes
    grad_image, grad_text, grad_scale, grad_bias = sigmoid_contrastive_backward(grad, *ctx.saved_tensors, dtype)
    return (
        grad_image if image_needs else None,
        grad_text if text_needs else None,
        grad_scale.to(scale_dtype) if scale_needs else None,
        grad_bias.to(bias_dtype) if bias_needs else None,
        *(None,) * 7,
    )


contrastive_pairs = _library.define(
    "contrastive_pairs(Tensor image, Tensor text, Tensor logit_scale) -> Tensor",
    reference=reference.contrastive_pairs,
    fake=_fake_pairs,
    backward=_backward_pairs,
    setup_context=_setup_pairs,
    triton=_TRITON,
)
contrastive_statistics_backward = _library.define(
    "contrastive_statistics_backward(Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels,"
    " Tensor text_labels, Tensor row_lse, Tensor column_lse, Tensor kept, Tensor grad_row, Tensor grad_column,"
    " Tensor grad_positive, SymInt workspace_bytes, bool image_grad, bool text_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference.contrastive_statistics_backward,
    fake=_fake_statistics_backward,
    triton=_TRITON,
)
contrastive_statistics = _library.define(
    "contrastive_statistics(Tensor image, Tensor text, Tensor logit_scale, Tensor image_labels, Tensor text_labels,"
    " Tensor image_pairs, Tensor text_pairs, SymInt kept_rows, SymInt workspace_bytes)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.contrastive_statistics,
    fake=_fake_statistics,
    backward=_backward_statistics,
    setup_context=_setup_statistics,
    triton=_TRITON,
)
sigmoid_contrastive_backward = _library.define(
    "sigmoid_contrastive_backward(Tensor grad, Tensor grad_image, Tensor grad_text, Tensor grad_scale,"
    " Tensor grad_bias, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.sigmoid_contrastive_backward,
    fake=_fake_sigmoid_backward,
)
sigmoid_contrastive = _library.define(
    "sigmoid_contrastive(Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor image_labels,"
    " Tensor text_labels, Tensor image_pairs, Tensor text_pairs, SymInt workspace_bytes, bool image_grad,"
    " bool text_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.sigmoid_contrastive,
    fake=_fake_sigmoid,
    backward=_backward_sigmoid,
    setup_context=_setup_sigmoid,
    triton=_TRITON,
)
