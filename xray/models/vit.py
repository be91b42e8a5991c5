"""The unified vision transformer: images and clips through one encoder, with EViT token reorganisation."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xray.models.config import CHANNELS, VisionConfig, check_keep_rate
from xray.models.costs import num_kept
from xray.models.layers import Block, resize_positions, sin_cos_positions


class EncoderOutput(NamedTuple):
    """What the encoder gives.

    Attributes:
        tokens: (B, M, width) all tokens that are left, normalised: class token, registers, then the rest.
        pooled: (B, width) the normalised class token.
        kept: one (B, K) int64 per layer that dropped tokens: the kept ones, best first, as indices into that
            layer's non-prefix tokens, whose last is the previous layer's fused token. `xray.ops.token_map` turns
            them into patch numbers.
    """

    tokens: Tensor
    pooled: Tensor
    kept: list[Tensor]


class PatchProjection(nn.Conv2d):
    """The convolution over patches, initialised as the linear layer that it is."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__(CHANNELS, width, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Initialise weight and bias in place."""
        nn.init.xavier_uniform_(self.weight.view(self.out_channels, -1))
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class PatchEmbed(nn.Module):
    """Square patches of a frame to tokens by one projection, shared by all frames."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, width)

    def forward(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) -> (F, patches, width), patches row by row."""
        return self.proj(frames).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Encoder of images and clips with joint space-time attention.

    Frames become 2-D patches with spatial and temporal position embeddings, in front of them one class token
    and ``config.num_registers`` registers without positions. An image is a clip of one frame. The temporal
    embedding starts at zero, so an image model starts out unchanged by it. Frames of another side than
    ``image_size`` take the spatial embedding interpolated to their grid. Parameters carry timm's names;
    ``load_timm`` loads timm's weights and ``save_timm`` gives them back.

    Sources: ViT (Dosovitskiy et al., arXiv 2010.11929), EViT (Liang et al., ICLR 2022), registers (Darcet et
    al., arXiv 2309.16588).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if not isinstance(config, VisionConfig):
            raise TypeError(f"config must be a VisionConfig, got {type(config).__name__}")
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, width)) if config.num_registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.patches_per_frame, width))
        self.time_embed = nn.Parameter(torch.empty(1, config.num_frames, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, config.layer_norm_eps) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise prefix tokens and positions in place; the layers initialise themselves."""
        nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        self.pos_embed.copy_(sin_cos_positions(self.config.grid_size, self.config.width))
        nn.init.zeros_(self.time_embed)

    def forward(self, pixels: Tensor, keep_rate: float | None = None) -> Tensor:
        """Encode to one vector a sample: the normalised class token, (B, width). Arguments as ``encode``.

        It is what ``encode`` gives as ``pooled``, for less: the last block computes the class token alone.
        """
        tokens, _ = self._blocks(self.embed(pixels), self._rate(keep_rate), len(self.blocks) - 1)
        class_token, _ = self.blocks[-1](tokens, queries=tokens[:, :1])
        return self.norm(class_token.squeeze(1))

    def encode(self, pixels: Tensor, keep_rate: float | None = None) -> EncoderOutput:
        """Encode images or clips, keeping all that the encoder knows.

        Args:
            pixels: images (B, 3, H, W) or clips (B, 3, T, H, W), floating point, H = W a multiple of
                ``patch_size``, T from 1 to ``num_frames``.
            keep_rate: share of the tokens that each EViT layer keeps, in (0, 1]; None takes the config's; 1
                is the dense encoder.

        Raises:
            ValueError: wrong shape, too many frames, or a keep rate out of range.
            TypeError: pixels that are not a floating-point tensor.
        """
        return self.transform(self.embed(pixels), self._rate(keep_rate))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels, as for ``encode``, to patch tokens with positions, (B, T * (H / patch_size)**2, width)."""
        self.check_pixels(pixels)
        clips = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
        batch, _, num_frames = clips.shape[:3]
        frames = clips.transpose(1, 2).flatten(0, 1).to(self.patch_embed.proj.weight.dtype)  # (B*T, 3, H, W)
        tokens = self.patch_embed(frames).unflatten(0, (batch, num_frames))  # (B, T, patches, C)
        positions = resize_positions(self.pos_embed, clips.shape[-1] // self.config.patch_size)[:, None]
        positions = positions + self.time_embed[:, :num_frames, None]
        return (tokens + positions).flatten(1, 2)

    def transform(self, patches: Tensor, keep_rate: float) -> EncoderOutput:
        """Prefix tokens, blocks and final norm over patch tokens (B, N, width), ``embed``'s or some."""
        tokens, kept = self._blocks(patches, keep_rate, len(self.blocks))
        tokens = self.norm(tokens)
        return EncoderOutput(tokens, tokens[:, 0], kept)

    def _rate(self, keep_rate: float | None) -> float:
        rate = self.config.keep_rate if keep_rate is None else keep_rate
        check_keep_rate(rate)
        return rate

    def _blocks(self, patches: Tensor, keep_rate: float, count: int) -> tuple[Tensor, list[Tensor]]:
        """Prefix tokens and the first `count` blocks: all tokens that are left, and the kept indices."""
        prefix: Tensor = self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        num_prefix_tokens = self.config.num_prefix_tokens
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches], dim=1)
        kept = []
        for index, block in enumerate(islice(self.blocks, count)):
            candidates = tokens.shape[1] - num_prefix_tokens
            num_keep = None
            if index in self.config.evit_blocks and num_kept(keep_rate, candidates) < candidates:
                num_keep = num_kept(keep_rate, candidates)
            tokens, indices = block(tokens, num_keep=num_keep, num_prefix_tokens=num_prefix_tokens)
            if indices is not None:
                kept.append(indices)
        return tokens, kept

    def check_pixels(self, pixels: Tensor) -> None:
        """Raise TypeError or ValueError, in one sentence, unless ``encode`` can take these pixels."""
        if not isinstance(pixels, Tensor):
            raise TypeError(f"pixels must be a tensor, got {type(pixels).__name__}")
        if not pixels.is_floating_point():
            raise TypeError(f"pixels must be floating point and normalised, got {pixels.dtype}")
        shape, patch_size = tuple(pixels.shape), self.config.patch_size
        if pixels.ndim not in (4, 5):
            raise ValueError(f"pixels must be (B, 3, H, W) or (B, 3, T, H, W), got shape {shape}")
        if shape[1] != CHANNELS:
            raise ValueError(f"pixels must have {CHANNELS} channels in dimension 1, got shape {shape}")
        if shape[-1] != shape[-2] or shape[-1] % patch_size or not shape[-1]:
            raise ValueError(
                f"pixels must be square with a side that is a multiple of patch_size {patch_size}, such as this "
                f"model's own image_size {self.config.image_size}, got shape {shape}"
            )
        if pixels.ndim == 5 and not 1 <= shape[2] <= self.config.num_frames:
            raise ValueError(
                f"pixels must have 1 to {self.config.num_frames} frames (this model's num_frames), got shape {shape}"
            )
