"""Sample inputs, the plain compositions, and the cost of the contrastive losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.contrastive_loss import clip_loss, siglip_loss
from xray_kernels.testing import Case, Inputs, OpSpec, nbytes, randn


def compose_clip(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, **options: object
) -> Tensor:
    """CLIP's loss as the paper's pseudocode writes it, on the whole matrix."""
    logits = image_features @ text_features.T * logit_scale
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def compose_siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    **options: object,
) -> Tensor:
    """SigLIP's loss as the paper's pseudocode writes it, on the whole matrix."""
    logits = image_features @ text_features.T * logit_scale + logit_bias
    labels = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / logits.shape[0]


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
    **more: object,
) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        inputs = sample_features(n, width, (dtype, device, generator), agreement)
        wide = torch.promote_types(dtype, torch.float32)
        inputs["logit_scale"] = torch.full(shape, scale, dtype=wide, device=device)
        if bias is not None:
            inputs["logit_bias"] = torch.full(shape, bias, dtype=wide, device=device)
        return {**inputs, **more}

    return Case(name, make)


def _cases(bias: float | None) -> tuple[Case, ...]:
    """The same sample inputs for both losses; SigLIP's have a bias."""
    return (
        _case("batch", 72, 32, bias=bias),
        _case("one pair", 1, 16, bias=bias),
        _case("two pairs, parameters of shape (1,)", 2, 24, shape=(1,), bias=bias),
        _case("odd sizes", 101, 37, bias=bias),
        _case("many small tiles", 67, 20, bias=bias, max_workspace_bytes=2**13),
        _case("large logits", 64, 64, scale=100.0, bias=bias),
        _case("large logits that agree", 64, 32, scale=100.0, agreement=30.0, bias=bias),
        _case("two pairs that agree", 2, 8, scale=100.0, agreement=30.0, bias=bias),
        _case("large logits that disagree", 33, 16, scale=100.0, agreement=-3.0, bias=bias),
        _case("one feature", 19, 1, bias=bias),
        _case("zero scale", 20, 16, scale=0.0, bias=bias),
    )


def _traffic(inputs: Inputs) -> tuple[int, int]:
    once = nbytes(inputs["image_features"], inputs["text_features"])
    return once, 2 * once


def _product(inputs: Inputs) -> int:
    n, width = inputs["image_features"].shape
    return 2 * n * n * width


SPECS = (
    OpSpec(
        name="clip_loss",
        function=clip_loss,
        composition=compose_clip,
        cases=_cases(bias=None),
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
