"""Contrastive losses over image-text pairs that never hold the N x N logits, on one process or on many.

    clip_loss     mean of the row and the column cross-entropy of S = scale * I T^T, positives on the diagonal
    siglip_loss   sum_ij -logsigmoid(z_ij (scale * I_i . T_j + bias)) / n, z = +1 on the diagonal, else -1

Logits are computed a tile at a time and again in the backward pass. Over W ranks each computes its own n rows
against all N = W n texts; row statistics are then whole, column statistics merge by reductions of N numbers,
and the gradients of the texts are reduce-scattered: half the arithmetic and half the traffic of gathering
both modalities.
Sources: CLIP (Radford et al., 2021), figure 3; SigLIP (Zhai et al., ICCV 2023), equation 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xray_kernels import _checks
from xray_kernels.contrastive_loss import distributed, local, ring
from xray_kernels.contrastive_loss.tiling import smallest_workspace, wide_dtype

DEFAULT_WORKSPACE_BYTES = 64 * 2**20
"""What the tiles of logits may take by default: 64 MiB."""
EXCHANGES = ("all_gather", "ring")


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """CLIP's loss: mean of the image-to-text and the text-to-image cross-entropy of the scaled similarities.

    Args:
        image_features: (n, D), float32, float16 or bfloat16, any strides, normally L2-normalised; n >= 1. Row
            i and row i of `text_features` belong together.
        text_features: (n, D), same dtype and device.
        logit_scale: factor of the similarities, already exponentiated: a number, or a floating tensor of
            shape () or (1,), which gets its gradient.
        group: a `torch.distributed` process group of W ranks with n pairs each, all of which must call; None
            is the default group where torch.distributed is initialised, and one process otherwise.
        exchange: how ranks see all texts: "all_gather", with N x D of memory, or "ring", with n x D: blocks
            of texts travel round the ranks while the block at hand is computed. The result is the same.
        max_workspace_bytes: bound on what is allocated besides the features, their gradients (summed in float32)
            and a few numbers for each row and column.

    Returns:
        The loss, a scalar, float32 for half-precision features. Over a group it is this rank's share: the
        mean over ranks is the loss of all N pairs, and gradients are those of the sum of the shares. So the
        mean of gradients that DDP and FSDP take is the exact gradient of the global loss, for the towers and
        for the scale.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message
            names it. Ranks with unequal n are a ValueError.
    """
    check_features(image_features, text_features, exchange, max_workspace_bytes)
    scale = as_scalar("logit_scale", logit_scale, image_features)
    ranks = distributed.resolve_group(group)
    return clip_share(image_features, text_features, scale, ranks, exchange, max_workspace_bytes)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """SigLIP's loss: a yes-or-no question for every image and text, summed and divided by the batch size.

    Args:
        image_features, text_features, group, exchange, max_workspace_bytes: as for `clip_loss`. The gradients
            are computed along with the loss (3 n N D products in all), with "ring" after it (4 n N D).
        logit_scale, logit_bias: factor of the similarities, already exponentiated, and what is added to them:
            numbers, or floating tensors of shape () or (1,), which get their gradients.

    Returns:
        The loss, a scalar, float32 for half-precision features; over a group this rank's share, as for
        `clip_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `clip_loss`.
    """
    check_features(image_features, text_features, exchange, max_workspace_bytes)
    scale = as_scalar("logit_scale", logit_scale, image_features)
    bias = as_scalar("logit_bias", logit_bias, image_features)
    ranks = distributed.resolve_group(group)
    return siglip_share(image_features, text_features, scale, bias, ranks, exchange, max_workspace_bytes)


def clip_statistics(
    image: Tensor, text: Tensor, scale: Tensor, ranks: Any, exchange: str, max_workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of this rank's rows and columns over all N, and its positive logits: (n,), float64."""
    if ranks is None:
        return local.contrastive_statistics(image, text, scale, 0, max_workspace_bytes)
    distributed.check_equal_rows(image, ranks)
    if exchange == "ring":
        row_lse, column_lse, positive = ring.ring_statistics(image, text, scale, ranks, max_workspace_bytes)
    else:
        row_lse, column_lse, positive = local.contrastive_statistics(
            image,
            distributed.gather_rows(text, ranks),
            scale,
            distributed.first_row(image, ranks),
            max_workspace_bytes,
        )
    return row_lse, distributed.merge_columns(column_lse, ranks), positive


def clip_share(
    image: Tensor, text: Tensor, scale: Tensor, ranks: Any, exchange: str, max_workspace_bytes: int
) -> Tensor:
    """`clip_loss` of checked inputs over the group `ranks`, or on one process where that is None."""
    row_lse, column_lse, positive = clip_statistics(image, text, scale, ranks, exchange, max_workspace_bytes)
    return ((row_lse - positive).mean() + (column_lse - positive).mean()).div(2).to(wide_dtype(image.dtype))


def siglip_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    ranks: Any,
    exchange: str,
    max_workspace_bytes: int,
) -> Tensor:
    """`siglip_loss` of checked inputs over the group `ranks`, or on one process where that is None."""
    offset = 0
    if ranks is not None:
        distributed.check_equal_rows(image, ranks)
        if exchange == "all_gather":
            text, offset = distributed.gather_rows(text, ranks), distributed.first_row(image, ranks)
    if ranks is not None and exchange == "ring":
        total = ring.ring_sigmoid(image, text, scale, bias, ranks, max_workspace_bytes)
    else:
        needed = torch.is_grad_enabled()
        image_grad = needed and any(value.requires_grad for value in (image, scale, bias))
        text_grad = needed and text.requires_grad
        total, *_ = local.sigmoid_contrastive(
            image, text, scale, bias, offset, max_workspace_bytes, image_grad, text_grad
        )
    return (total / image.shape[0]).to(wide_dtype(image.dtype))


def check_features(image: Tensor, text: Tensor, exchange: str, max_workspace_bytes: int) -> None:
    for name, features in (("image_features", image), ("text_features", text)):
        _checks.check_tensor(name, features, layout="(n, D)")
    _checks.check_float("image_features", image)
    _checks.check_same("text_features", text, "image_features", image)
    _checks.check_shape("text_features", text, tuple(image.shape), "a text for each row of image_features")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"image_features must have at least one row and one column, got {tuple(image.shape)}")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    least = smallest_workspace(image.shape[0], image.shape[0], image.shape[1], image.dtype)
    _checks.check_int("max_workspace_bytes", max_workspace_bytes, least, None, "one tile of logits must fit")


def as_scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-dimensional tensor beside `features`."""
    if isinstance(value, Tensor):
        if value.shape not in ((), (1,)):
            raise ValueError(f"{name} must have shape () or (1,), got {tuple(value.shape)}")
        _checks.check_float(name, value)
        _checks.check_same(name, value, "image_features", features, dtype=False)
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a tensor of shape () or (1,), got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break the graph of a compiled caller
        raise ValueError(f"{name} must be finite, got {value}")
    return features.new_full((), value, dtype=wide_dtype(features.dtype))
