"""Masked autoencoding (He et al., CVPR 2022): hide most patches, encode the rest, predict the hidden."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xray.models.config import CHANNELS, MaeConfig
from xray.models.layers import Block, Linear, resize_positions, sin_cos_positions
from xray.models.vit import VisionTransformer


class MaeOutput(NamedTuple):
    """What the masked autoencoder gives.

    Attributes:
        loss: scalar float32, mean squared error over the pixels of hidden patches.
        prediction: (B, N, 3 * patch_size**2), the normalised pixels predicted for every patch.
        mask: (B, N) bool, True where the patch was hidden.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder on the visible patches, with EViT off, and a small decoder that predicts the hidden ones.

    Takes images only: of a clip's neighbouring frames one gives the other away. Targets are pixels normalised
    by the mean and standard deviation of their own patch.
    """

    def __init__(self, config: MaeConfig) -> None:
        super().__init__()
        if not isinstance(config, MaeConfig):
            raise TypeError(f"config must be a MaeConfig, got {type(config).__name__}")
        self.config = config
        vision, width = config.vision, config.decoder_width
        self.encoder = VisionTransformer(vision)
        self.decoder_embed = Linear(vision.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, vision.patches_per_frame, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.decoder_heads, 4 * width, vision.layer_norm_eps) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.decoder_pred = Linear(width, CHANNELS * vision.patch_size**2)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mask token and decoder positions in place; encoder and layers initialise themselves."""
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed.copy_(sin_cos_positions(self.config.vision.grid_size, self.config.decoder_width))

    def forward(
        self, pixels: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> MaeOutput:
        """Hide patches at random, predict them and score the prediction.

        Args:
            pixels: images (B, 3, H, W), or clips of one frame (B, 3, 1, H, W), floating point, H = W a multiple
                of ``patch_size``; N patches an image.
            generator: source of the masks; the same state gives the same masks whatever device the pixels are
                on, because noise is drawn on the generator's own device. None draws from the global one.
            noise: (B, N) floating point, instead of a generator: each image's patches of least noise are hidden,
                as ``mask_from_noise`` says. With noise of its own a sample has its mask in whatever batch it is.

        Raises:
            ValueError: wrong shape, more than one frame, so small an image that none or all of its patches
                would be hidden, or a generator as well as noise.
            TypeError: pixels or noise that are not a floating-point tensor.
        """
        self.encoder.check_pixels(pixels)
        if pixels.ndim == 5 and pixels.shape[2] != 1:
            raise ValueError(
                f"pixels must be images or clips of one frame to be masked, got shape {tuple(pixels.shape)}"
            )
        num_patches = (pixels.shape[-1] // self.config.vision.patch_size) ** 2
        if noise is None:
            mask = self.random_mask(pixels.shape[0], generator, num_patches)
        elif generator is not None:
            raise ValueError("noise and generator must not both be given: either decides the masks")
        else:
            self._check_noise(noise, (pixels.shape[0], num_patches))
            mask = self.mask_from_noise(noise)
        mask = mask.to(pixels.device)
        prediction = self._predict(pixels, mask)
        target, _, _ = self._target(pixels)
        error = (prediction.float() - target).square().mean(dim=-1)  # (B, N)
        loss = (error * mask).sum() / mask.sum()
        return MaeOutput(loss, prediction, mask)

    def random_mask(
        self, batch: int, generator: torch.Generator | None = None, num_patches: int | None = None
    ) -> Tensor:
        """``mask_from_noise`` of uniform noise, on the generator's device; N is ``num_patches``, or the native one."""
        device = generator.device if generator is not None else None
        num_patches = self.config.vision.patches_per_frame if num_patches is None else num_patches
        return self.mask_from_noise(torch.rand(batch, num_patches, generator=generator, device=device))

    def mask_from_noise(self, noise: Tensor) -> Tensor:
        """Noise (B, N) to (B, N) bool, True where a patch is hidden: the ``config.num_masked_of(N)`` least of each row.

        Of equal values the first counts as less.
        """
        ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
        return ranks < self.config.num_masked_of(noise.shape[1])

    def _check_noise(self, noise: Tensor, shape: tuple[int, int]) -> None:
        if not isinstance(noise, Tensor) or not noise.is_floating_point():
            kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise must be a floating-point tensor, got {kind}")
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must be {shape}, a number for each patch, got shape {tuple(noise.shape)}")

    def _predict(self, pixels: Tensor, mask: Tensor) -> Tensor:
        num_patches = mask.shape[1]
        num_visible = num_patches - self.config.num_masked_of(num_patches)
        # A stable sort puts the visible patches first, in their own order, with no host synchronisation.
        visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_visible]
        patches = self.encoder.embed(pixels)
        patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        latent = self.decoder_embed(self.encoder.transform(patches, keep_rate=1.0).tokens)
        prefix, latent = latent.tensor_split([self.config.vision.num_prefix_tokens], dim=1)
        full = self.mask_token.to(latent.dtype).expand(mask.shape[0], mask.shape[1], -1)
        full = full.scatter(1, visible[..., None].expand(-1, -1, latent.shape[-1]), latent)
        positions = resize_positions(self.decoder_pos_embed, math.isqrt(num_patches))
        tokens = torch.cat([prefix, full + positions], dim=1)
        for block in self.decoder_blocks:
            tokens, _ = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens[:, prefix.shape[1] :]))

    def _target(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised patches (B, N, 3pp), and their mean and deviation (B, N, 1) before, all float32."""
        patches = patchify(_as_images(pixels).float(), self.config.vision.patch_size)
        mean = patches.mean(dim=-1, keepdim=True)
        deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return (patches - mean) / deviation, mean, deviation

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) float32: the visible patches as given, the hidden ones as predicted.

        The model predicts normalised pixels, so each hidden patch borrows its true mean and deviation, as in
        the MAE paper's own pictures. A generator in the same state hides the same patches as ``forward``.
        """
        output = self(pixels, generator)
        _, mean, deviation = self._target(pixels)
        predicted = output.prediction.float() * deviation + mean
        given = patchify(_as_images(pixels).float(), self.config.vision.patch_size)
        return unpatchify(torch.where(output.mask[..., None], predicted, given), self.config.vision.patch_size)

    def hide(self, pixels: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
        """What the model saw: pictures (B, 3, H, W) float32, ``value`` in the patches of ``mask`` (B, N)."""
        patches = patchify(_as_images(pixels).float(), self.config.vision.patch_size)
        return unpatchify(patches.masked_fill(mask[..., None], value), self.config.vision.patch_size)


def _as_images(pixels: Tensor) -> Tensor:
    return pixels.squeeze(2) if pixels.ndim == 5 else pixels


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, patches, 3 * patch_size**2): patches row by row, each (channel, row, column)."""
    grid = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, h, p, w, p)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of ``patchify`` for square images."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (CHANNELS, patch_size, patch_size)).unflatten(1, (side, side))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
