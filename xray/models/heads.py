"""Heads on the vision encoder: the multi-tag classifier of the hashtag stage."""

from __future__ import annotations

from torch import Tensor, nn

from xray.models.config import TagConfig
from xray.models.vit import VisionTransformer


class TagHead(nn.Linear):
    """The linear layer over the tags: truncated normal weights of deviation 0.02 and a zero bias at first."""

    def reset_parameters(self) -> None:
        """Initialise weight and bias in place."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class TagClassifier(nn.Module):
    """The encoder and one linear layer over the tags.

    Training on large vocabularies goes through ``ops.tag_loss(self.encoder(pixels), self.head.weight, ...)``,
    which never forms the (B, num_tags) logits that ``forward`` returns.
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
