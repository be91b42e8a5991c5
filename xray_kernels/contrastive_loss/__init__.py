"""Contrastive losses over image-text pairs that never hold the N x N logits, on one process or on many.

    clip_loss     mean of the row and the column cross-entropy of S = scale * I T^T; a row with several positives has
                  their mean for its target
    siglip_loss   sum_ij -logsigmoid(z_ij (scale * I_i . T_j + bias)) / n, z = +1 for positives, else -1

Row i of the images and row i of the texts belong together; rows with equal `labels` are positives of each other too.

Logits are computed a tile at a time; those that fit the workspace are kept for the backward pass, the others computed
again there. Over W ranks each computes its own n rows against all N = W n texts; row statistics are then whole,
column statistics merge by reductions of N numbers, and the gradients of the texts are reduce-scattered: half the
arithmetic and half the traffic of gathering both modalities.
Sources: CLIP (Radford et al., 2021), figure 3; SigLIP (Zhai et al., ICCV 2023), equation 1; several positives as in
UniCL (Yang et al., CVPR 2022), equation 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xray_kernels import _checks
from xray_kernels.contrastive_loss import distributed, local, ring
from xray_kernels.contrastive_loss.labels import Matching, check_labels, match
from xray_kernels.contrastive_loss.tiling import plan, smallest_workspace, wide_dtype

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
"""What logits may take by default, those that are kept and tiles: 256 MiB."""
EXCHANGES = ("all_gather", "ring")


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """CLIP's loss: mean of the image-to-text and the text-to-image cross-entropy of the scaled similarities.

    Args:
        image_features: (n, D), float32, float16 or bfloat16, any strides, normally L2-normalised; n >= 1. Row
            i and row i of `text_features` belong together.
        text_features: (n, D), same dtype and device.
        logit_scale: factor of the similarities, already exponentiated: a number above 0, or a floating tensor of
            shape () or (1,), which gets its gradient.
        labels: (n,) integers, on the same device; pairs with equal labels, such as those of one caption, are
            positives of each other, over all ranks. The target of a row is then 1/k for each of its k positives.
            None: every pair stands alone.
        group: a `torch.distributed` process group of W ranks with n pairs each, all of which must call; None
            is the default group where torch.distributed is initialised, and one process otherwise.
        exchange: how ranks see all texts: "all_gather", with N x D of memory, or "ring", with n x D: blocks
            of texts travel round the ranks while the block at hand is computed. The result is the same.
        max_workspace_bytes: bound on what is allocated besides the features, their gradients (summed in float32)
            and a few numbers for each row and column. Logits that fit are kept for the backward pass, which then
            computes up to a quarter less.

    Returns:
        The loss, a scalar, float32 for half-precision features. Over a group it is this rank's share: the
        mean over ranks is the loss of all N pairs, and gradients are those of the sum of the shares. So the
        mean of gradients that DDP and FSDP take is the exact gradient of the global loss, for the towers and
        for the scale.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message
            names it. Ranks with unequal n are a ValueError.
    """
    check_features(image_features, text_features, labels, exchange, max_workspace_bytes)
    scale = as_scale(logit_scale, image_features)
    ranks = distributed.resolve_group(group)
    return clip_share(image_features, text_features, scale, labels, ranks, exchange, max_workspace_bytes)[0]


def clip_loss_with_ranks(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`clip_loss`, and how well each pair is found within the batch, from the same tiles of logits.

    Args:
        image_features, text_features, logit_scale, labels, group, exchange, max_workspace_bytes: as for `clip_loss`.

    Returns:
        The loss, and for each of this rank's n pairs, (n,) int32, the rank of its text among all N texts for its
        image, and of its image among all N images for its text: the number of others, positives left out, whose
        logit is not below the pair's own. 0 is best; a tie counts against the pair, so that features that are all
        equal find nothing. In-batch top-5 accuracy is `(ranks < 5).float().mean()`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `clip_loss`.
    """
    check_features(image_features, text_features, labels, exchange, max_workspace_bytes)
    scale = as_scale(logit_scale, image_features)
    ranks = distributed.resolve_group(group)
    return clip_share(image_features, text_features, scale, labels, ranks, exchange, max_workspace_bytes, True)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """SigLIP's loss: a yes-or-no question for every image and text, summed and divided by the batch size.

    Args:
        image_features, text_features, labels, group, exchange, max_workspace_bytes: as for `clip_loss`. The gradients
            are computed along with the loss (3 n N D products in all), with "ring" after it (4 n N D).
        logit_scale, logit_bias: factor of the similarities, already exponentiated, and what is added to them:
            numbers, or floating tensors of shape () or (1,), which get their gradients.

    Returns:
        The loss, a scalar, float32 for half-precision features; over a group this rank's share, as for
        `clip_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `clip_loss`.
    """
    check_features(image_features, text_features, labels, exchange, max_workspace_bytes)
    scale, bias = as_scale(logit_scale, image_features), as_scalar("logit_bias", logit_bias, image_features)
    ranks = distributed.resolve_group(group)
    return siglip_share(image_features, text_features, scale, bias, labels, ranks, exchange, max_workspace_bytes)[0]


def siglip_loss_with_ranks(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    group: Any = None,
    exchange: str = "all_gather",
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`siglip_loss`, and how well each pair is found within the batch, from the same tiles of logits.

    Args:
        image_features, text_features, logit_scale, logit_bias, labels, group, exchange, max_workspace_bytes: as for
            `siglip_loss`.

    Returns:
        The loss and the ranks, as `clip_loss_with_ranks` gives them.

    Raises:
        TypeError, ValueError, RuntimeError: as for `clip_loss`.
    """
    check_features(image_features, text_features, labels, exchange, max_workspace_bytes)
    scale, bias = as_scale(logit_scale, image_features), as_scalar("logit_bias", logit_bias, image_features)
    ranks = distributed.resolve_group(group)
    return siglip_share(image_features, text_features, scale, bias, labels, ranks, exchange, max_workspace_bytes, True)


def clip_statistics(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    matching: Matching,
    ranks: Any,
    exchange: str,
    max_workspace_bytes: int,
    with_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of this rank's rows and columns over all N, the mean logit of its positives, and its ranks.

    The first three are (n,), float64; ranks are empty unless asked for.
    """
    image_pairs, text_pairs = pair_logits(image, text, scale, ranks, with_ranks)
    if ranks is not None and exchange == "ring":
        row_lse, column_lse, positive, image_ranks, text_ranks = ring.ring_statistics(
            image, text, scale, matching, image_pairs, text_pairs, ranks, max_workspace_bytes
        )
    else:
        every = text if ranks is None else distributed.gather_rows(text, ranks)
        keep = torch.is_grad_enabled() and any(value.requires_grad for value in (image, text, scale))
        kept_rows, workspace_bytes = plan(
            image.shape[0], every.shape[0], image.shape[1], image.dtype, max_workspace_bytes, keep
        )
        row_lse, column_lse, positive, image_ranks, text_ranks, _ = local.contrastive_statistics(
            image,
            every,
            scale,
            matching.image_labels,
            matching.text_labels,
            image_pairs,
            text_pairs,
            kept_rows,
            workspace_bytes,
        )
    if matching.positives is not None:
        positive = positive / matching.positives
    if ranks is not None:
        column_lse = distributed.merge_columns(column_lse, ranks)
        text_ranks = distributed.sum_columns(text_ranks, ranks)
    return row_lse, column_lse, positive, image_ranks, text_ranks


@torch.no_grad()
def pair_logits(image: Tensor, text: Tensor, scale: Tensor, ranks: Any, wanted: bool) -> tuple[Tensor, Tensor]:
    """Logits of this rank's pairs (n,) and of all ranks' (N,), to count ranks against; empty unless wanted."""
    if not wanted:
        empty = image.new_empty(0, dtype=wide_dtype(image.dtype))
        return empty, empty
    pairs = local.contrastive_pairs(image, text, scale)
    return pairs, pairs if ranks is None else distributed.all_gather(pairs, ranks)


def clip_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    ranks: Any,
    exchange: str,
    max_workspace_bytes: int,
    with_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`clip_loss_with_ranks` of checked inputs over the group `ranks`, or on one process where that is None."""
    if ranks is not None:
        distributed.check_equal_rows(image, ranks)
    matching = match(labels, image, ranks)
    row_lse, column_lse, positive, image_ranks, text_ranks = clip_statistics(
        image, text, scale, matching, ranks, exchange, max_workspace_bytes, with_ranks
    )
    loss = ((row_lse - positive).mean() + (column_lse - positive).mean()).div(2)
    return loss.to(wide_dtype(image.dtype)), image_ranks, text_ranks


def siglip_share(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    ranks: Any,
    exchange: str,
    max_workspace_bytes: int,
    with_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`siglip_loss_with_ranks` of checked inputs over the group `ranks`, or on one process where that is None."""
    if ranks is not None:
        distributed.check_equal_rows(image, ranks)
    matching = match(labels, image, ranks)
    image_pairs, text_pairs = pair_logits(image, text, scale, ranks, with_ranks)
    if ranks is not None and exchange == "ring":
        total, image_ranks, text_ranks = ring.ring_sigmoid(
            image, text, scale, bias, matching, image_pairs, text_pairs, ranks, max_workspace_bytes
        )
    else:
        needed = torch.is_grad_enabled()
        total, *_, image_ranks, text_ranks = local.sigmoid_contrastive(
            image,
            text if ranks is None else distributed.gather_rows(text, ranks),
            scale,
            bias,
            matching.image_labels,
            matching.text_labels,
            image_pairs,
            text_pairs,
            max_workspace_bytes,
            needed and any(value.requires_grad for value in (image, scale, bias)),
            needed and text.requires_grad,
        )
    if ranks is not None:
        text_ranks = distributed.sum_columns(text_ranks, ranks)
    return (total / image.shape[0]).to(wide_dtype(image.dtype)), image_ranks, text_ranks


def check_features(image: Tensor, text: Tensor, labels: Tensor | None, exchange: str, max_workspace_bytes: int) -> None:
    for name, features in (("image_features", image), ("text_features", text)):
        _checks.check_tensor(name, features, layout="(n, D)")
    _checks.check_float("image_features", image)
    _checks.check_same("text_features", text, "image_features", image)
    _checks.check_shape("text_features", text, tuple(image.shape), "a text for each row of image_features")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"image_features must have at least one row and one column, got {tuple(image.shape)}")
    check_labels(labels, image)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    least = smallest_workspace(image.shape[0], image.shape[0], image.shape[1], image.dtype)
    _checks.check_int("max_workspace_bytes", max_workspace_bytes, least, None, "one tile of logits must fit")


def as_scale(value: Tensor | float, features: Tensor) -> Tensor:
    """`logit_scale` as a 0-dimensional tensor; a number must be above 0, as what was exponentiated is."""
    scale = as_scalar("logit_scale", value, features)
    if not isinstance(value, Tensor) and value <= 0:
        raise ValueError(f"logit_scale must be above 0, it is the exponential of a parameter, got {value}")
    return scale


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
