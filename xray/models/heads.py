"""Heads on the vision encoder: the multi-tag classifier of the hashtag stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xray import ops
from xray.models.config import TagConfig
from xray.models.vit import VisionTransformer


class TagHead(nn.Linear):
    """The linear layer over the tags: truncated normal weights of deviation 0.02 and a zero bias at first."""

    def reset_parameters(self) -> None:
        """Initialise weight and bias in place."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def loss(self, features: Tensor, tags: Tensor, offsets: Tensor, guessed: slice) -> tuple[Tensor, Tensor]:
        """The loss of features (B, width) and the likeliest tags of the rows in ``guessed``, without all logits.

        ``tags`` and ``offsets`` are those of ``ops.tag_loss``, which runs in autocast's dtype where that is on.
        """
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(features.device.type):
            dtype = torch.get_autocast_dtype(features.device.type)
            features, weight, bias = features.to(dtype), weight.to(dtype), bias.to(dtype)  # type: ignore[assignment]
        with torch.no_grad():
            guess = torch.addmm(bias, features[guessed], weight.T).argmax(dim=1)
        return ops.tag_loss(features, weight, tags, offsets, bias=bias), guess


class TagClassifier(nn.Module):
    """The encoder and one linear layer over the tags.

    Training on large vocabularies goes through ``self.head.loss(self.encoder(pixels), ...)``, which never forms the
    (B, num_tags) logits that ``forward`` returns.
    """

    def __init__(self, config: TagConfig) -> None:
        super().__init__()
        if not isinstance(config, TagConfig):
            raise TypeError(f"config must be a TagConfig, got {type(config).__name__}")
        self.config = config
        self.encoder = VisionTransformer(config.vision)
        self.head = TagHead(config.vision.width, config.num_tags)

    def forward(self, pixels: Tensor, keep_rate: float | None = None) -> Tensor:
        """Images or clips, as ``VisionTransformer.encode`` takes them, to tag logits (B, num_tags)."""
        return self.head(self.encoder(pixels, keep_rate))
