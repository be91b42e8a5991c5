"""What must follow the tokens through reorganisation: positions, masks, patch numbers, and the way back to patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xray_kernels import _checks


def gather_tokens(values: Tensor, indices: Tensor, *, fused: float | int | bool | None = None) -> Tensor:
    """Take along what belongs to the tokens that `reorganize_tokens` kept, in their new order.

    Args:
        values: (B, M, ...) of any dtype, something for each of the M = N - P non-prefix tokens before reorganisation,
            such as coordinates, a mask or patch numbers; (1, M, ...) when it is the same for all rows.
        indices: (B, K) int64, as returned by `reorganize_tokens`.
        fused: what the fused token gets; it is appended, so that the result goes with the non-prefix tokens after
            reorganisation, and can be gathered again after the next. None appends nothing.

    Returns:
        (B, K, ...), or (B, K + 1, ...) with `fused`. Gradients flow to `values`.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type, shape or device; the message names the argument.
    """
    _check_indices("indices", indices)
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor of shape (B, M, ...), got {type(values).__name__}")
    if values.dim() < 2 or values.shape[0] not in (1, indices.shape[0]):
        raise ValueError(
            f"values must have shape (B, M, ...) with B = {indices.shape[0]}, the rows of indices, or 1, "
            f"got {tuple(values.shape)}"
        )
    _checks.check_same("values", values, "indices", indices, dtype=False)
    batch, keep = indices.shape
    inner = values.shape[2:]
    where = indices.view(batch, keep, *(1 for _ in inner)).expand(batch, keep, *inner)
    kept = values.expand(batch, *values.shape[1:]).gather(1, where)
    if fused is None:
        return kept
    return torch.cat([kept, kept.new_full((batch, 1, *inner), fused)], 1)


class TokenMap(NamedTuple):
    """Where patches and tokens are after a chain of reorganisations.

    Attributes:
        patches: (B, M) int64, the patch of each non-prefix token that is left, in the order of the tokens; -1 for a
            fused token, which stands for many.
        tokens: (B, num_patches) int64, the non-prefix token that now holds each patch: its own, or the fused token that
            it went into; -1 for a patch that was dropped without fusion.
    """

    patches: Tensor
    tokens: Tensor


def token_map(indices: Sequence[Tensor], num_patches: int, *, fuse: bool = True) -> TokenMap:
    """Trace tokens back to patches, and patches forward to tokens, through the layers that reorganised them.

    `patches` is for pictures of what is left. `tokens` is for dense tasks: with (B, P + M, C) encoded tokens,
    `encoded[:, P:].gather(1, map.tokens[..., None].expand(-1, -1, C))` is a feature for every patch of the grid.

    Args:
        indices: the kept indices of each layer in turn, (B, K) int64, as returned by `reorganize_tokens`; at least one.
        num_patches: non-prefix tokens before the first of these layers: frames times patches per frame.
        fuse: whether the layers append a fused token, as `reorganize_tokens` does by default.

    Raises:
        TypeError, ValueError: `indices` is empty, or not a list of such tensors.
    """
    if isinstance(indices, Tensor) or not isinstance(indices, Sequence) or not indices:
        raise ValueError(f"indices must be a list of (B, K) tensors, one for each layer, got {type(indices).__name__}")
    _checks.check_int("num_patches", num_patches, 1, None, "the tokens before the first layer")
    for layer, kept in enumerate(indices):
        _check_indices(f"indices[{layer}]", kept)
    numbers = torch.arange(num_patches, device=indices[0].device).expand(indices[0].shape[0], -1)
    patches = tokens = numbers
    for kept in indices:
        keep = kept.shape[1]
        count = patches.shape[1]
        patches = gather_tokens(patches, kept, fused=-1 if fuse else None)
        # where the tokens before this layer are after it: at their place among the kept, else in the fused token
        places = torch.arange(keep, device=kept.device).expand_as(kept)
        moved = torch.full_like(kept[:, :1], keep if fuse else -1).repeat(1, count).scatter(1, kept, places)
        tokens = torch.where(tokens >= 0, moved.gather(1, tokens.clamp(min=0)), -1)
    return TokenMap(patches, tokens)


def _check_indices(name: str, indices: Tensor) -> None:
    _checks.check_tensor(name, indices, layout="(B, K)")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {indices.dtype}")
