"""Arguments of the contrastive losses: checked once, then made what the ops take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xray_kernels import _checks
from xray_kernels.contrastive_loss.tiling import smallest_workspace, wide_dtype

LOSSES = ("clip_loss", "siglip_loss")
EXCHANGES = ("all_gather", "ring")
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Call(NamedTuple):
    """What a caller gave, and which loss it is for; a `logit_bias` of None is none."""

    loss: str
    image: Tensor
    text: Tensor
    logit_scale: Tensor | float
    logit_bias: Tensor | float | None
    labels: Tensor | None
    exchange: str
    max_workspace_bytes: int
    with_ranks: bool = False


def check(call: Call) -> None:
    """TypeError, ValueError or RuntimeError for the first argument that will not do; no collective is called."""
    image, text = call.image, call.text
    for name, features in (("image_features", image), ("text_features", text)):
        _checks.check_tensor(name, features, layout="(n, D)")
    _checks.check_float("image_features", image)
    _checks.check_same("text_features", text, "image_features", image)
    _checks.check_shape("text_features", text, tuple(image.shape), "a text for each row of image_features")
    if image.shape[0] == 0 or image.shape[1] == 0:
        raise ValueError(f"image_features must have at least one row and one column, got {tuple(image.shape)}")
    _check_labels(call.labels, image)
    if call.exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {call.exchange!r}")
    least = smallest_workspace(image.shape[0], image.shape[0], image.shape[1], image.dtype)
    _checks.check_int("max_workspace_bytes", call.max_workspace_bytes, least, None, "one tile of logits must fit")
    scale = call.logit_scale
    _check_scalar("logit_scale", scale, image)
    if not isinstance(scale, Tensor) and scale <= 0:
        raise ValueError(f"logit_scale must be above 0, it is the exponential of a parameter, got {scale}")
    if call.logit_bias is not None:
        _check_scalar("logit_bias", call.logit_bias, image)


def _check_labels(labels: Tensor | None, features: Tensor) -> None:
    if labels is None:
        return
    _checks.check_tensor("labels", labels, layout="(n,)")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be integers, such as int64, got {labels.dtype}")
    _checks.check_same("labels", labels, "image_features", features, dtype=False)
    _checks.check_shape("labels", labels, (features.shape[0],), "one for each row of image_features")


def _check_scalar(name: str, value: Tensor | float, features: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.shape not in ((), (1,)):
            raise ValueError(f"{name} must have shape () or (1,), got {tuple(value.shape)}")
        _checks.check_float(name, value)
        _checks.check_same(name, value, "image_features", features, dtype=False)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a tensor of shape () or (1,), got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break the graph of a compiled caller
        raise ValueError(f"{name} must be finite, got {value}")


def as_scalar(value: Any, features: Tensor) -> Tensor:
    """A number or a tensor of one element, checked, as a 0-dimensional tensor beside `features`.

    A DTensor, such as a parameter that FSDP2 shards, is gathered: a collective of its mesh. Ranks hold it alike and
    each has a gradient of its own, so the shards get the mean over the mesh, as they do where FSDP itself gathers.
    """
    if not isinstance(value, Tensor):
        return features.new_full((), value, dtype=wide_dtype(features.dtype))
    if hasattr(value, "full_tensor"):  # a DTensor; only those who have one import its module
        from torch.distributed.tensor import Partial

        sharded: Any = value
        mesh = sharded.device_mesh
        value = ScaleGradient.apply(sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim), 1 / mesh.size())
    return value.reshape(())


class ScaleGradient(torch.autograd.Function):
    """The identity, with the gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
