"""How many bytes a step keeps for its backward pass: an estimate from the shapes of a model alone.

A pre-LN block of width C and MLP width M keeps, of N tokens that enter it and N' that leave its attention (fewer where
EViT drops some), with b bytes a number in the compute dtype, 4 in the residual stream, and H heads:

    none        N (5 b C + 4 C + 4 H) + N' (b C + 4 C + 2 b M)
    selective   N (5 b C + 4 C + 4 H) + N' (b C + b M)
    full        N 4 C

In words, "none": the inputs of both norms and what they give, query, key, value and the heads' output with their
log-sum-exps, and the MLP's hidden layer before and after GELU. "selective" has what matrix products and attention give
and the block's input, "full" that input alone; both compute one block again at a time, which adds the largest block's
"none". An EViT layer adds what reorganisation reads and gives. Compiled graphs may keep less.
"""

from __future__ import annotations

from typing import NamedTuple

from xray import models
from xray.models.config import CHANNELS, Config

WIDE = 4  # bytes of the residual stream, which is float32


class Layer(NamedTuple):
    """What a block's bytes depend on: tokens before and after its attention, whether EViT drops some, and widths."""

    tokens: int
    tokens_left: int
    drops: bool
    width: int
    mlp_width: int
    heads: int


def block_bytes(layer: Layer, checkpointing: str, item: int) -> int:
    """Bytes that one block keeps for one sample; `item` is the size of a number in the compute dtype."""
    before, after, width = layer.tokens, layer.tokens_left, layer.width
    if checkpointing == "full":
        return before * WIDE * width
    attention = before * ((5 * item + WIDE) * width + WIDE * layer.heads)
    reorganized = 0
    if layer.drops:  # the update and the scores; the new stream, and its norm's input is its own
        reorganized = before * (WIDE * width + WIDE) + after * WIDE * width
    if checkpointing == "selective":
        return attention + reorganized + after * item * (width + layer.mlp_width)
    return attention + reorganized + after * ((item + WIDE) * width + 2 * item * layer.mlp_width)


def layers_of(block_tokens: list[int], width: int, mlp_width: int, heads: int) -> list[Layer]:
    """The blocks of a tower that `block_tokens` enter."""
    left = [*block_tokens[1:], block_tokens[-1]]
    return [
        Layer(tokens, after, after < tokens, width, mlp_width, heads)
        for tokens, after in zip(block_tokens, left, strict=True)
    ]


def blocks_of(config: Config, cost: models.Cost) -> list[Layer]:
    """All blocks that a sample of this `cost` passes."""
    vision = config if isinstance(config, models.VisionConfig) else getattr(config, "vision", None)
    found: list[Layer] = []
    if vision is not None:
        found += layers_of(cost.block_tokens, vision.width, vision.mlp_width, vision.heads)
    if isinstance(config, models.MaeConfig):
        width = config.decoder_width
        tokens = [config.vision.num_prefix_tokens + config.vision.patches_per_frame] * config.decoder_depth
        found += layers_of(tokens, width, 4 * width, config.decoder_heads)
    if isinstance(config, models.ClipConfig):
        text = config.text
        found += layers_of([text.context_length] * text.depth, text.width, text.mlp_width, text.heads)
    return found


def sample_bytes(
    config: Config, cost: models.Cost, num_frames: int, image_size: int, checkpointing: str, item: int
) -> int:
    """Bytes that a step keeps of one sample of `num_frames` frames while the last block's gradient is computed."""
    blocks = blocks_of(config, cost)
    vision = config if isinstance(config, models.VisionConfig) else config.vision  # type: ignore[union-attr]
    patches = num_frames * (image_size // vision.patch_size) ** 2
    pixels = CHANNELS * image_size**2 * num_frames
    kept = pixels * WIDE + patches * 2 * WIDE  # the input; tokens before the blocks are the first block's
    kept += sum(block_bytes(layer, checkpointing, item) for layer in blocks)
    kept += 2 * cost.block_tokens[-1] * vision.width * WIDE  # the last norm: its input, and what it gives
    if isinstance(config, models.MaeConfig):
        kept += 2 * pixels * WIDE  # the prediction's error, and its square
    if checkpointing != "none":
        kept += max(block_bytes(layer, "none", item) for layer in blocks)
    return kept
