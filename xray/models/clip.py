"""CLIP (Radford et al., arXiv 2103.00020): an image and a text encoder that meet in one space."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.models.config import ClipConfig
from xray.models.text import TextTransformer
from xray.models.vit import VisionTransformer


class ClipOutput(NamedTuple):
    """What ``clip_loss`` takes: L2-normalised features (B, embed_dim) and the scale itself, shape [1]."""

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor


class Projection(nn.Linear):
    """A linear map without bias into the shared space, normal with deviation ``in_features**-0.5`` at first."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__(width, embed_dim, bias=False)

    def reset_parameters(self) -> None:
        """Initialise the weight in place."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


class Clip(nn.Module):
    """The two encoders, each with a linear projection to the shared space.

    ``logit_scale`` is the logarithm of the scale, of shape [1] because FSDP2 refuses 0-D parameters. It
    starts at ln(1 / 0.07); the training loop clamps it at ln 100.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        if not isinstance(config, ClipConfig):
            raise TypeError(f"config must be a ClipConfig, got {type(config).__name__}")
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.text = TextTransformer(config.text)
        self.vision_projection = Projection(config.vision.width, config.embed_dim)
        self.text_projection = Projection(config.text.width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the scale in place; encoders and projections initialise themselves."""
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def forward(self, pixels: Tensor, token_ids: Tensor, lengths: Tensor, keep_rate: float | None = None) -> ClipOutput:
        """Both encoders at once, for training; arguments as ``encode_image`` and ``encode_text``."""
        image_features = self.encode_image(pixels, keep_rate)
        return ClipOutput(image_features, self.encode_text(token_ids, lengths), self.logit_scale.exp())

    def encode_image(self, pixels: Tensor, keep_rate: float | None = None) -> Tensor:
        """Images or clips, as ``VisionTransformer.encode`` takes them, to (B, embed_dim) of length 1."""
        return _normalize(self.vision_projection(self.vision(pixels, keep_rate)))

    def encode_text(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Captions, as ``TextTransformer`` takes them, to (B, embed_dim) of length 1."""
        return _normalize(self.text_projection(self.text(token_ids, lengths)))


def _normalize(features: Tensor) -> Tensor:
    # The norm in at least float32, the result in the dtype that the loss's matrix products should run in.
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(features.dtype)
