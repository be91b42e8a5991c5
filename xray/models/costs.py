"""What models cost: parameters, floating-point operations and token counts, from their configurations alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from xray.models.config import (
    CHANNELS,
    ClipConfig,
    Config,
    MaeConfig,
    TagConfig,
    TextConfig,
    VisionConfig,
    check_keep_rate,
)


class Cost(NamedTuple):
    """What a model costs.

    Attributes:
        parameters: trainable scalars.
        flops: floating-point operations of one forward pass of one sample, counting a multiply-add as two;
            matrix products only (projections, attention, MLP, heads), as is usual for such figures. Causal
            attention counts in full, as is usual too; losses are not counted.
        block_tokens: tokens, prefix included, entering the attention of each block of the image encoder (of a
            text encoder alone: of its blocks).
        kept_tokens: non-prefix tokens kept by each EViT layer that drops any, its fused token not counted. Where only
            the class token is read, the last block drops none.
        parts: ``parameters`` by part: "vision", and where there are such "text", "projections", "logit_scale",
            "decoder", "head".
    """

    parameters: int
    flops: int
    block_tokens: list[int]
    kept_tokens: list[int]
    parts: dict[str, int]


def num_kept(keep_rate: float, num_candidates: int) -> int:
    """Tokens that an EViT layer keeps of ``num_candidates`` non-prefix tokens: the ceiling of their share."""
    return math.ceil(keep_rate * num_candidates)


def model_cost(
    config: Config,
    *,
    keep_rate: float | None = None,
    num_frames: int = 1,
    image_size: int | None = None,
    text_tokens: int | None = None,
) -> Cost:
    """Parameters, forward FLOPs and token counts of a model for one sample: an image or clip, a caption, or both.

    It counts what ``forward`` does, whose encoders read one token (`encoder_cost` with ``pooled``).

    Args:
        config: of any model here.
        keep_rate, num_frames, image_size: as ``encoder_cost``; masked autoencoding takes whole images only.
        text_tokens: length that captions are padded to; None takes ``context_length``.

    Raises:
        ValueError: an argument out of range, or one that this model has no use for.
        TypeError: ``config`` is no configuration of a model.
    """
    text = config.text if isinstance(config, ClipConfig) else config
    if text_tokens is not None and not isinstance(text, TextConfig):
        raise ValueError(f"text_tokens must not be given for a {type(config).__name__}, which has no text encoder")
    if isinstance(config, TextConfig):
        return _text_cost(config, text_tokens)
    if isinstance(config, MaeConfig):
        if keep_rate not in (None, 1) or num_frames != 1:
            raise ValueError(
                f"keep_rate and num_frames must be 1 for a MaeConfig, got keep_rate {keep_rate} and "
                f"num_frames {num_frames}"
            )
        return _mae_cost(config, image_size)
    vision = getattr(config, "vision", config)
    if not isinstance(vision, VisionConfig):
        raise TypeError(f"config must be a model's configuration, got {type(config).__name__}")
    cost = encoder_cost(vision, keep_rate=keep_rate, num_frames=num_frames, image_size=image_size, pooled=True)
    if isinstance(config, TagConfig):
        head = (vision.width + 1) * config.num_tags
        return _with_parts(cost, {"head": head}, 2 * vision.width * config.num_tags)
    if isinstance(config, ClipConfig):
        captions = _text_cost(config.text, text_tokens)
        projections = (vision.width + config.text.width) * config.embed_dim
        parts = {**captions.parts, "projections": projections, "logit_scale": 1}
        return _with_parts(cost, parts, captions.flops + 2 * projections)
    return cost


def encoder_cost(
    config: VisionConfig,
    *,
    keep_rate: float | None = None,
    num_frames: int = 1,
    image_size: int | None = None,
    pooled: bool = False,
) -> Cost:
    """Parameters, forward FLOPs and token counts of an encoder for one image or one clip.

    Args:
        config: the encoder.
        keep_rate: share kept by each EViT layer; None takes ``config.keep_rate``.
        num_frames: frames of the sample, 1 for an image.
        image_size: side of the frames in pixels; None takes ``config.image_size``.
        pooled: count ``forward``, whose last block computes the class token alone, instead of ``encode``.

    Raises:
        ValueError: ``keep_rate`` outside (0, 1], ``num_frames`` outside 1 to ``config.num_frames``, or an
            ``image_size`` that is not a positive multiple of ``config.patch_size``.
    """
    rate = config.keep_rate if keep_rate is None else keep_rate
    check_keep_rate(rate)
    if not 1 <= num_frames <= config.num_frames:
        raise ValueError(f"num_frames must lie in 1 to {config.num_frames}, got {num_frames}")
    patches = num_frames * _patches(config, image_size)
    flops, block_tokens, kept_tokens = _encoder_blocks(config, patches, rate, pooled)
    parameters = _encoder_parameters(config)
    return Cost(parameters, flops + _embed_flops(config, patches), block_tokens, kept_tokens, {"vision": parameters})


def _with_parts(cost: Cost, parts: dict[str, int], flops: int) -> Cost:
    parameters = cost.parameters + sum(parts.values())
    return cost._replace(parameters=parameters, flops=cost.flops + flops, parts={**cost.parts, **parts})


def _patches(config: VisionConfig, image_size: int | None) -> int:
    size = config.image_size if image_size is None else image_size
    if size < 1 or size % config.patch_size:
        raise ValueError(f"image_size must be a positive multiple of patch_size {config.patch_size}, got {size}")
    return (size // config.patch_size) ** 2


def _block_parameters(width: int, hidden: int) -> int:
    return 4 * width + (4 * width * width + 4 * width) + (2 * width * hidden + width + hidden)


def _attention_flops(tokens: int, width: int) -> int:
    return 2 * tokens * 4 * width * width + 4 * tokens * tokens * width


def _mlp_flops(tokens: int, width: int, hidden: int) -> int:
    return 2 * tokens * 2 * width * hidden


def _last_block_flops(tokens: int, width: int, hidden: int) -> int:
    """Keys and values of all tokens, all else of the one that is read."""
    return 2 * (2 * tokens + 2) * width * width + 4 * tokens * width + _mlp_flops(1, width, hidden)


def _encoder_parameters(config: VisionConfig) -> int:
    width = config.width
    return (
        (CHANNELS * config.patch_size**2 + 1) * width
        + (config.patches_per_frame + config.num_frames + config.num_prefix_tokens) * width
        + config.depth * _block_parameters(width, config.mlp_width)
        + 2 * width
    )


def _embed_flops(config: VisionConfig, patches: int) -> int:
    return 2 * patches * CHANNELS * config.patch_size**2 * config.width


def _encoder_blocks(
    config: VisionConfig, candidates: int, keep_rate: float, pooled: bool = False
) -> tuple[int, list[int], list[int]]:
    """FLOPs, tokens entering each block and tokens kept, of the blocks over so many non-prefix tokens."""
    prefix, flops = config.num_prefix_tokens, 0
    block_tokens, kept_tokens = [], []
    for block in range(config.depth):
        block_tokens.append(prefix + candidates)
        if pooled and block == config.depth - 1:
            flops += _last_block_flops(prefix + candidates, config.width, config.mlp_width)
            break
        flops += _attention_flops(prefix + candidates, config.width)
        if block in config.evit_blocks and num_kept(keep_rate, candidates) < candidates:
            kept_tokens.append(num_kept(keep_rate, candidates))
            candidates = kept_tokens[-1] + 1
        flops += _mlp_flops(prefix + candidates, config.width, config.mlp_width)
    return flops, block_tokens, kept_tokens


def _text_cost(config: TextConfig, text_tokens: int | None) -> Cost:
    width, hidden = config.width, config.mlp_width
    tokens = config.context_length if text_tokens is None else text_tokens
    if not 1 <= tokens <= config.context_length:
        raise ValueError(f"text_tokens must lie in 1 to {config.context_length} (context_length), got {tokens}")
    parameters = (
        (config.vocab_size + config.context_length) * width
        + config.depth * _block_parameters(width, hidden)
        + 2 * width
    )
    flops = (config.depth - 1) * (_attention_flops(tokens, width) + _mlp_flops(tokens, width, hidden))
    flops += _last_block_flops(tokens, width, hidden)
    return Cost(parameters, flops, [tokens] * config.depth, [], {"text": parameters})


def _mae_cost(config: MaeConfig, image_size: int | None) -> Cost:
    vision, width = config.vision, config.decoder_width
    hidden, pixels = 4 * width, CHANNELS * vision.patch_size**2
    patches = _patches(vision, image_size)
    visible = patches - config.num_masked_of(patches)
    flops, block_tokens, _ = _encoder_blocks(vision, visible, 1.0)
    tokens = vision.num_prefix_tokens + patches
    flops += (
        _embed_flops(vision, patches)
        + 2 * (vision.num_prefix_tokens + visible) * vision.width * width
        + config.decoder_depth * (_attention_flops(tokens, width) + _mlp_flops(tokens, width, hidden))
        + 2 * patches * width * pixels
    )
    decoder = (
        (vision.width + 1) * width
        + width
        + vision.patches_per_frame * width
        + config.decoder_depth * _block_parameters(width, hidden)
        + 2 * width
        + (width + 1) * pixels
    )
    encoder = _encoder_parameters(vision)
    return Cost(encoder + decoder, flops, block_tokens, [], {"vision": encoder, "decoder": decoder})
