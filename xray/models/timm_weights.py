"""Weights of timm's VisionTransformer for our encoder, and of ours for timm's; needs no timm."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xray.models.checkpoint import fill, image_encoder, write
from xray.models.heads import TagClassifier
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
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    fill(dict(encoder.named_parameters()), shapes, weights.__getitem__, "timm weights")


def to_timm(model: nn.Module, *, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The image encoder of a model as the state dict of a timm ``VisionTransformer`` with ``no_embed_class=True``.

    timm's model then gives the features that ours gives for images at keep rate 1: to timm an image has no time, so
    the first frame's temporal embedding joins the spatial one. A TagClassifier's head goes along as timm's.

    Args:
        model: a VisionTransformer, MaskedAutoencoder, TagClassifier or Clip.
        state_dict: the weights to take instead of ``model.state_dict()``, under the same names, for a model whose
            own parameters are sharded.

    Raises:
        TypeError: a model without an image encoder.
    """
    prefix, _ = image_encoder(model)
    weights = model.state_dict() if state_dict is None else state_dict
    ours = {name.removeprefix(prefix): tensor.detach() for name, tensor in weights.items() if name.startswith(prefix)}
    ours["pos_embed"] = ours["pos_embed"] + ours.pop("time_embed")[:, :1]
    if isinstance(model, TagClassifier):
        ours |= {name: weights[name].detach() for name in ("head.weight", "head.bias")}
    return ours


def save_timm(
    model: nn.Module, path: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None, **metadata: str
) -> None:
    """Write ``to_timm(model)`` to one safetensors file, whole or not at all.

    The header holds what builds the model that loads it: ``timm_model``, the arguments of timm's
    ``VisionTransformer`` as JSON, and ``layer_norm_eps``, which those cannot hold (1e-6 is timm's own).

    Args:
        model, state_dict: as ``to_timm``.
        path: the file to write; an existing one is replaced.
        **metadata: extra strings for the header, such as ``tags``, a JSON list that names the head's outputs.

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: a model without an image encoder.
    """
    config = image_encoder(model)[1].config
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "reg_tokens": config.num_registers,
        "no_embed_class": True,
        "num_classes": model.config.num_tags if isinstance(model, TagClassifier) else 0,
    }
    header = {"timm_model": json.dumps(arguments), "layer_norm_eps": repr(config.layer_norm_eps)}
    write(path, to_timm(model, state_dict=state_dict), {**metadata, **header})


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
