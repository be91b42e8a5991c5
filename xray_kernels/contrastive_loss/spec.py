"""Sample inputs, the plain compositions, and the cost of the contrastive losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.contrastive_loss import (
    clip_loss,
    clip_loss_with_ranks,
    siglip_loss,
    siglip_loss_with_ranks,
)
from xray_kernels.testing import Case, Inputs, OpSpec, nbytes, randn


def _positives(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Whether image i and text j belong together, (n, n)."""
    if labels is None:
        labels = torch.arange(logits.shape[0], device=logits.device)
    return labels[:, None] == labels


def _ranks(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    own = logits.diagonal()
    rows, columns = ((side >= own[:, None]) & ~positives for side in (logits, logits.T))
    return rows.sum(1, dtype=torch.int32), columns.sum(1, dtype=torch.int32)


def compose_clip_with_ranks(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """CLIP's loss as the paper's pseudocode writes it, on the whole matrix, and ranks by counting in it."""
    logits = image_features @ text_features.T * logit_scale
    positives = _positives(logits, labels)
    if labels is None:
        target = torch.arange(logits.shape[0], device=logits.device)
    else:
        target = positives / positives.sum(1, keepdim=True, dtype=logits.dtype)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, *_ranks(logits, positives)


def compose_siglip_with_ranks(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    labels: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """SigLIP's loss as the paper's pseudocode writes it, on the whole matrix, and ranks by counting in it."""
    logits = image_features @ text_features.T * logit_scale + logit_bias
    positives = _positives(logits, labels)
    signs = 2 * positives.to(logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[0], *_ranks(logits, positives)


def compose_clip(*args: Any, **options: Any) -> Tensor:
    """The loss of `compose_clip_with_ranks`."""
    return compose_clip_with_ranks(*args, **options)[0]


def compose_siglip(*args: Any, **options: Any) -> Tensor:
    """The loss of `compose_siglip_with_ranks`."""
    return compose_siglip_with_ranks(*args, **options)[0]


def sample_features(
    n: int, width: int, like: tuple[torch.dtype, torch.device, torch.Generator], agreement: float = 1.0
) -> Inputs:
    """Unit vectors whose pairs agree: each text is `agreement` * its image + noise as long as the image."""
    exact = (torch.float64, *like[1:])
    image = randn(n, width, like=exact)
    text = agreement * image + randn(n, width, like=exact)
    return {
        "image_features": F.normalize(image, dim=1).to(like[0]),
        "text_features": F.normalize(text, dim=1).to(like[0]),
    }


def _case(
    name: str,
    n: int,
    width: int,
    *,
    scale: float = 14.3,
    shape: tuple[int, ...] = (),
    agreement: float = 1.0,
    bias: float | None = None,
    captions: int | None = None,
    **more: object,
) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        inputs = sample_features(n, width, (dtype, device, generator), agreement)
        wide = torch.promote_types(dtype, torch.float32)
        inputs["logit_scale"] = torch.full(shape, scale, dtype=wide, device=device)
        if bias is not None:
            inputs["logit_bias"] = torch.full(shape, bias, dtype=wide, device=device)
        if captions is not None:  # so many different ones, drawn at random
            labels = torch.randint(captions, (n,), generator=generator) * 2**40
            inputs["labels"] = labels.to(device)
        return {**inputs, **more}

    return Case(name, make)


def _equal_thrice(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Exact logits of up to 2^15, three of which are equal: their log-sum-exp, 2^15 + log 3, is no float32 number."""
    rows = 2.0 * torch.randint(2, (4, 64), generator=generator) - 1
    features = rows.repeat(3, 1).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(2.0**9, dtype=wide, device=device)
    return {"image_features": features, "text_features": features.clone(), "logit_scale": scale}


def _cases(bias: float | None) -> tuple[Case, ...]:
    """The same sample inputs for both losses; SigLIP's have a bias."""
    return (
        _case("batch", 72, 32, bias=bias),
        _case("one pair", 1, 16, bias=bias),
        _case("two pairs, parameters of shape (1,)", 2, 24, shape=(1,), bias=bias),
        _case("odd sizes", 101, 37, bias=bias),
        _case("many small tiles", 67, 20, bias=bias, max_workspace_bytes=2**14),
        _case("large logits", 64, 64, scale=100.0, bias=bias),
        _case("large logits that agree", 64, 32, scale=100.0, agreement=30.0, bias=bias),
        _case("two pairs that agree", 2, 8, scale=100.0, agreement=30.0, bias=bias),
        _case("large logits that disagree", 33, 16, scale=100.0, agreement=-3.0, bias=bias),
        _case("one feature", 19, 1, bias=bias),
        _case("zero scale", 20, 16, scale=0.0, bias=bias),
        _case("captions that occur more than once", 90, 24, captions=30, bias=bias),
        _case("one caption", 17, 8, captions=1, bias=bias),
        _case("several tasks, most logits not kept", 531, 12, bias=bias, max_workspace_bytes=2**21),
    )


def _cases_with_ranks(bias: float | None) -> tuple[Case, ...]:
    return (
        _case("batch", 72, 32, bias=bias),
        _case("one pair", 1, 16, bias=bias),
        _case("odd sizes", 101, 37, bias=bias),
        _case("many small tiles", 67, 20, bias=bias, max_workspace_bytes=2**14),
        _case("captions that occur more than once", 90, 24, captions=30, bias=bias),
        _case("several tasks", 531, 12, bias=bias, max_workspace_bytes=2**21),
    )


def _traffic(inputs: Inputs) -> tuple[int, int]:
    once = nbytes(inputs["image_features"], inputs["text_features"])
    return once, 2 * once


def _product(inputs: Inputs) -> int:
    n, width = inputs["image_features"].shape
    return 2 * n * n * width


def _with_ranks(spec: OpSpec, function: Any, composition: Any, bias: float | None) -> OpSpec:
    name = f"{spec.name}_with_ranks"
    return replace(spec, name=name, function=function, composition=composition, cases=_cases_with_ranks(bias))


LOSSES = (
    OpSpec(
        name="clip_loss",
        function=clip_loss,
        composition=compose_clip,
        cases=(*_cases(bias=None), Case("log-sum-exps that are no float32 numbers", _equal_thrice)),
        traffic=_traffic,
        flops=lambda inputs: (_product(inputs), 3 * _product(inputs)),
    ),
    OpSpec(
        name="siglip_loss",
        function=siglip_loss,
        composition=compose_siglip,
        cases=_cases(bias=-10.0),
        traffic=_traffic,
        flops=lambda inputs: (_product(inputs), 2 * _product(inputs)),
    ),
)
CLIP, SIGLIP = LOSSES
SPECS = (
    *LOSSES,
    _with_ranks(CLIP, clip_loss_with_ranks, compose_clip_with_ranks, None),
    _with_ranks(SIGLIP, siglip_loss_with_ranks, compose_siglip_with_ranks, -10.0),
)
