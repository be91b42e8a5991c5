"""Contrastive losses over image-text pairs that never hold the N x N logits, on one process or on many.

    clip_loss     mean of the row and the column cross-entropy of S = scale * I T^T; a row with several positives has
                  their mean for its target
    siglip_loss   sum_ij -logsigmoid(z_ij (scale * I_i . T_j + bias)) / n, z = +1 for positives, else -1

Row i of the images and row i of the texts belong together; rows with equal `labels` are positives of each other too.

Logits are computed a tile at a time; those that fit the workspace are kept for the backward pass, the others computed
again there. Over W ranks each computes its own n rows against all N = W n texts; row statistics are then whole,
column statistics merge by reductions of N numbers, and texts travel out and their gradients home while other texts
are computed: half the arithmetic and half the traffic of gathering both modalities.
Sources: CLIP (Radford et al., 2021), figure 3; SigLIP (Zhai et al., ICCV 2023), equation 1; several positives as in
UniCL (Yang et al., CVPR 2022), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xray_kernels.contrastive_loss import distributed, local
from xray_kernels.contrastive_loss.inputs import Call, as_scalar, check
from xray_kernels.contrastive_loss.labels import match
from xray_kernels.contrastive_loss.tiling import plan, wide_dtype

DEFAULT_WORKSPACE_BYTES = 256 * 2**20
"""What logits may take by default, those that are kept and tiles: 256 MiB."""


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
            shape () or (1,), which gets its gradient. A DTensor, such as a parameter that FSDP2 shards when it is
            used outside of `forward`, gets in its shards the mean of the gradients over its mesh.
        labels: (n,) integers, on the same device; pairs with equal labels, such as those of one caption, are
            positives of each other, over all ranks. The target of a row is then 1/k for each of its k positives.
            None: every pair stands alone.
        group: a `torch.distributed` process group of W ranks with n pairs each, all of which must call; None
            is the default group where torch.distributed is initialised, and one process otherwise. Where it has
            a backend for the CPU, beside an accelerator's too ("cpu:gloo,cuda:nccl"), what one rank refuses is an
            error on all of them at every call, otherwise at the first call and where shapes change.
        exchange: how ranks see all texts: "all_gather", with N x D of memory, or "ring", with n x D, which
            fetches the texts again for the backward pass: 3 n D numbers sent to each other rank in all, instead
            of 2. The result is the same.
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
            names it. Ranks whose n, D, dtype or options differ are a ValueError on each of them, as after a last
            batch that is not full everywhere; where another rank refuses its input, RuntimeError names it.
    """
    call = Call("clip_loss", image_features, text_features, logit_scale, None, labels, exchange, max_workspace_bytes)
    return compute(call, distributed.resolve_group(group))[0]


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
    call = Call(
        "clip_loss", image_features, text_features, logit_scale, None, labels, exchange, max_workspace_bytes, True
    )
    return compute(call, distributed.resolve_group(group))


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
            are computed along with the loss (3 n N D products in all), in a "ring" of ranks after it (4 n N D).
        logit_scale, logit_bias: factor of the similarities, already exponentiated, and what is added to them:
            numbers, or floating tensors of shape () or (1,), DTensors too, which get their gradients.

    Returns:
        The loss, a scalar, float32 for half-precision features; over a group this rank's share, as for
        `clip_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `clip_loss`.
    """
    call = Call(
        "siglip_loss", image_features, text_features, logit_scale, logit_bias, labels, exchange, max_workspace_bytes
    )
    return compute(call, distributed.resolve_group(group))[0]


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
    call = Call(
        "siglip_loss",
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        labels,
        exchange,
        max_workspace_bytes,
        True,
    )
    return compute(call, distributed.resolve_group(group))


def compute(
    call: Call, ranks: Any, local_loss: bool = True, gather_with_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the ranks of its pairs over the group `ranks`, or on one process where that is None.

    The flags are those of open_clip's `ClipLoss`, for CLIP's loss over a group.
    """
    if ranks is not None:
        from xray_kernels.contrastive_loss import across_ranks  # loads the compiler, which one process can do without

        if call.loss == "siglip_loss":
            return across_ranks.siglip(call, ranks)
        loss, *found = across_ranks.clip(call, ranks, local_loss, gather_with_grad)
    else:
        check(call)
        if call.loss == "siglip_loss":
            return _siglip(call)
        loss, *found = _clip(call)
    if call.logit_bias is not None:  # it shifts all logits alike
        loss = loss + 0.0 * as_scalar(call.logit_bias, call.image).to(loss.dtype)
    return loss, *found


def _clip(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    image, text = call.image, call.text
    scale, matching = as_scalar(call.logit_scale, image), match(call.labels, image, None)
    pairs = pair_logits(call, scale)
    needed = torch.is_grad_enabled() and any(value.requires_grad for value in (image, text, scale))
    n, width = image.shape
    kept_rows, workspace_bytes = plan(n, n, width, image.dtype, call.max_workspace_bytes, needed)
    row_lse, column_lse, positive, image_ranks, text_ranks, _ = local.contrastive_statistics(
        image,
        text,
        scale,
        matching.image_labels,
        matching.text_labels,
        pairs,
        pairs,
        kept_rows,
        workspace_bytes,
    )
    if matching.positives is not None:
        positive = positive / matching.positives
    loss = ((row_lse - positive).mean() + (column_lse - positive).mean()).div(2)
    return loss.to(wide_dtype(image.dtype)), image_ranks, text_ranks


def _siglip(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    image, text = call.image, call.text
    scale = as_scalar(call.logit_scale, image)
    bias = as_scalar(0.0 if call.logit_bias is None else call.logit_bias, image)
    matching, pairs = match(call.labels, image, None), pair_logits(call, scale)
    needed = torch.is_grad_enabled()
    total, *_, image_ranks, text_ranks = local.sigmoid_contrastive(
        image,
        text,
        scale,
        bias,
        matching.image_labels,
        matching.text_labels,
        pairs,
        pairs,
        call.max_workspace_bytes,
        needed and any(value.requires_grad for value in (image, scale, bias)),
        needed and text.requires_grad,
    )
    return (total / image.shape[0]).to(wide_dtype(image.dtype)), image_ranks, text_ranks


@torch.no_grad()
def pair_logits(call: Call, scale: Tensor) -> Tensor:
    """Logits of the pairs themselves (n,), which ranks are counted against; empty unless these are wanted."""
    if call.with_ranks:
        return local.contrastive_pairs(call.image, call.text, scale)
    return call.image.new_empty(0, dtype=wide_dtype(call.image.dtype))
