"""Weights of timm's VisionTransformer for our encoder; needs the weights, not timm itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from xray.models.checkpoint import load_encoder_weights
from xray.models.vit import VisionTransformer


def load_timm(encoder: VisionTransformer, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of a timm ``VisionTransformer``, after which outputs equal timm's.

    Names agree with timm's. Where timm gives prefix tokens a position (``no_embed_class=False``) it is added
    to the tokens themselves, which is the same sum. The spatial embedding is interpolated (bicubic, as timm)
    when image sizes differ, the temporal one is set to zero, and the classifier (``head.*``) is ignored.

    Args:
        encoder: changed only when all fits.
        state_dict: of a model with a class token, learned positions and plain blocks: no LayerScale, no query
            or key norm, no norm before the blocks, no pooling head.

    Raises:
        TypeError: ``encoder`` is not a VisionTransformer.
        ValueError: a missing, unexpected or wrongly shaped tensor, by name.
    """
    if not isinstance(encoder, VisionTransformer):
        raise TypeError(f"encoder must be a VisionTransformer, got {type(encoder).__name__}")
    weights = {name: tensor for name, tensor in state_dict.items() if not name.startswith("head.")}
    if missing := [name for name in ("cls_token", "pos_embed") if name not in weights]:
        raise ValueError(f"timm weights lack {missing[0]!r}, without which they do not fit this encoder")
    prefix_names = [name for name in ("cls_token", "reg_token") if name in weights]
    width = encoder.config.width
    for name in (*prefix_names, "pos_embed"):
        shape = tuple(weights[name].shape)
        if len(shape) != 3 or shape[2] != width:
            raise ValueError(f"timm weights have {name!r} of shape {shape} where (1, *, {width}) is needed")
    prefix = torch.cat([weights[name] for name in prefix_names], dim=1)
    positions = weights["pos_embed"]
    count, num_prefix = positions.shape[1], prefix.shape[1]
    if count - num_prefix == encoder.config.patches_per_frame or not _is_square(count):
        if not _is_square(count - num_prefix):
            raise ValueError(
                f"timm weights have a 'pos_embed' of {count} positions, which is no square grid with or "
                f"without {num_prefix} prefix tokens"
            )
        prefix = prefix + positions[:, :num_prefix]
        weights["pos_embed"] = positions[:, num_prefix:]
        weights["cls_token"] = prefix[:, :1]
        if "reg_token" in weights:
            weights["reg_token"] = prefix[:, 1:]
    weights["time_embed"] = torch.zeros_like(encoder.time_embed)
    load_encoder_weights(encoder, weights, "timm weights")


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
