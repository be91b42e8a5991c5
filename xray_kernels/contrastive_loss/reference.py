"""What the contrastive ops mean, in plain PyTorch, a tile of the n x N logits at a time.

Log-sum-exps are kept in float64, n + N numbers: at scale 100 a float32 one is off by 4e-6, and the gradient
multiplies that by the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.contrastive_loss.tiling import spans, tile_shape, wide_dtype


def contrastive_pairs(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """S_ii = scale * I_i . T_i, (n,): the logits that ranks are counted against."""
    wide = wide_dtype(image.dtype)
    return (image.to(wide) * text.to(wide)).sum(1).mul_(logit_scale.to(wide))


def contrastive_statistics(
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
    """Log-sum-exps of rows (n,) and columns (N,) of S = scale * I T^T, and sum_j S_ij over i's own label; float64.

    Then ranks (n,) and (N,), of each image's pair among the texts and the reverse: how many logits of another
    label are not below it. And S itself in its first `kept_rows` rows.
    """
    (n, width), num_texts, wide = image.shape, text.shape[0], wide_dtype(image.dtype)
    row_lse = image.new_full((n,), float("-inf"), dtype=torch.float64)
    column_lse = image.new_full((num_texts,), float("-inf"), dtype=torch.float64)
    positive = image.new_zeros(n, dtype=torch.float64)
    image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
    kept = image.new_empty((kept_rows, num_texts), dtype=wide)
    tall, broad = tile_shape(n, num_texts, width, image.dtype, workspace_bytes)
    for rows in (*spans(kept_rows, tall), *spans(n, tall, kept_rows)):
        images = image[rows].to(wide)
        for columns in spans(num_texts, broad):
            logits = (images @ text[columns].to(wide).T).mul_(logit_scale.to(wide))
            row_lse[rows] = torch.logaddexp(row_lse[rows], _log_sum_exp(logits, 1))
            column_lse[columns] = torch.logaddexp(column_lse[columns], _log_sum_exp(logits, 0))
            is_positive = image_labels[rows, None] == text_labels[columns]
            positive[rows] += torch.where(is_positive, logits, 0).sum(1).double()
            _count(logits, is_positive, image_pairs[rows], text_pairs[columns], image_ranks[rows], text_ranks[columns])
            if rows.start < kept_rows:
                kept[rows, columns] = logits
    return row_lse, column_lse, positive, image_ranks, text_ranks, kept


def contrastive_statistics_backward(
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
    """Gradients of image, text and scale.

    dS_ij = grad_row_i exp(S_ij - row_lse_i) + grad_column_j exp(S_ij - column_lse_j), and + grad_positive_i where
    labels are equal. Of image and text only those asked for, the others empty; the scale's comes with the image's.
    """
    (n, width), num_texts, wide = image.shape, text.shape[0], wide_dtype(image.dtype)
    scale, grad_scale = logit_scale.to(wide), image.new_zeros((), dtype=torch.float64)
    grad_image = image.new_zeros((n, width) if image_grad else (0,), dtype=wide)
    grad_text = text.new_zeros((num_texts, width) if text_grad else (0,), dtype=wide)
    kept_rows = kept.shape[0]
    tall, broad = tile_shape(n, num_texts, width, image.dtype, workspace_bytes)
    for rows in (*spans(kept_rows, tall), *spans(n, tall, kept_rows)):
        images = image[rows].to(wide)
        for columns in spans(num_texts, broad):
            texts = text[columns].to(wide)
            logits = kept[rows, columns] if rows.start < kept_rows else (images @ texts.T).mul_(scale)
            grad = _softmax(logits, row_lse[rows, None], grad_row[rows, None].to(wide))
            grad += _softmax(logits, column_lse[columns], grad_column[columns].to(wide))
            is_positive = image_labels[rows, None] == text_labels[columns]
            grad += torch.where(is_positive, grad_positive[rows, None].to(wide), 0)
            if image_grad:
                grad_image[rows].addmm_(grad, texts)
            if text_grad:
                grad_text[columns].addmm_(grad.T, images)
        if image_grad:  # sum_ij dS_ij I_i.T_j, before the factor `scale` of the image's gradient
            grad_scale += (grad_image[rows] * images).sum(1).double().sum()
    return (
        grad_image.mul_(scale).to(image.dtype),
        grad_text.mul_(scale).to(text.dtype),
        grad_scale.to(logit_scale.dtype),
    )


def sigmoid_contrastive(
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
    """sum_ij -logsigmoid(z_ij (scale * I_i.T_j + bias)), z = +1 where labels are equal and -1 elsewhere; float64.

    And its gradients by image, text (those asked for, the others empty), scale and bias (with the image's): they
    need nothing but the tile at hand, so one pass gives the loss and all of them. Those of features are float32
    or wider: they are rounded once, when the gradient of the loss is known. And ranks, as `contrastive_statistics`.
    """
    (n, width), num_texts, wide = image.shape, text.shape[0], wide_dtype(image.dtype)
    scale, bias = logit_scale.to(wide), logit_bias.to(wide)
    total, grad_scale, grad_bias = (image.new_zeros((), dtype=torch.float64) for _ in range(3))
    grad_image = image.new_zeros((n, width) if image_grad else (0,), dtype=wide)
    grad_text = text.new_zeros((num_texts, width) if text_grad else (0,), dtype=wide)
    image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
    tall, broad = tile_shape(n, num_texts, width, image.dtype, workspace_bytes)
    for rows in spans(n, tall):
        images = image[rows].to(wide)
        for columns in spans(num_texts, broad):
            texts = text[columns].to(wide)
            logits = (images @ texts.T).mul_(scale)
            is_positive = image_labels[rows, None] == text_labels[columns]
            _count(logits, is_positive, image_pairs[rows], text_pairs[columns], image_ranks[rows], text_ranks[columns])
            tile = torch.where(is_positive, logits.add_(bias), -logits)  # z_ij * logit_ij
            total -= F.logsigmoid(tile).sum(1).double().sum()
            if not (image_grad or text_grad):
                continue
            tile = tile.neg_().sigmoid_()
            tile = torch.where(is_positive, -tile, tile)  # -z_ij sigmoid(-z_ij logit_ij)
            if image_grad:
                grad_image[rows].addmm_(tile, texts)
                grad_bias += tile.sum(1).double().sum()
            if text_grad:
                grad_text[columns].addmm_(tile.T, images)
        if image_grad:
            grad_scale += (grad_image[rows] * images).sum(1).double().sum()
    return (
        total,
        grad_image.mul_(scale),
        grad_text.mul_(scale),
        grad_scale,
        grad_bias,
        image_ranks,
        text_ranks,
    )


def sigmoid_contrastive_backward(
    grad: Tensor,
    grad_image: Tensor,
    grad_text: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's gradients times the one that arrives; those of image and text in the features' dtype."""
    factor = grad.to(grad_image.dtype)
    return (
        (grad_image * factor).to(dtype),
        (grad_text * factor).to(dtype),
        grad_scale * grad,
        grad_bias * grad,
    )


def _log_sum_exp(logits: Tensor, dim: int) -> Tensor:
    peak = logits.amax(dim, keepdim=True)
    return peak.squeeze(dim).double() + (logits - peak).exp_().sum(dim).double().log()


def _softmax(logits: Tensor, lse: Tensor, weight: Tensor) -> Tensor:
    """weight * exp(logits - lse); lse is split in two numbers of the logits' dtype so that none of it is lost."""
    high = lse.to(logits.dtype)
    low = (lse - high).to(logits.dtype)
    return (logits - high).sub_(low).exp_().mul_(weight)


def _count(
    logits: Tensor,
    is_positive: Tensor,
    image_pairs: Tensor,
    text_pairs: Tensor,
    image_ranks: Tensor,
    text_ranks: Tensor,
) -> None:
    """Add a tile's part to the ranks, where there are pairs to count against."""
    if image_ranks.numel():
        image_ranks += ((logits >= image_pairs[:, None]) & ~is_positive).sum(1)
    if text_ranks.numel():
        text_ranks += ((logits >= text_pairs) & ~is_positive).sum(0)
