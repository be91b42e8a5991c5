"""Small arguments of the contrastive ops: an implementation is compared with the reference on them before first use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xray_kernels.contrastive_loss import reference
from xray_kernels.contrastive_loss.tiling import wide_dtype


def samples(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of op `name` for a first-use check: several tiles and panels with tails, shared labels, ranks, kept
    logits. The first are the smallest.

    Kernels may round gradients of logits to the features' dtype before they multiply. Features are so short that this
    stays below what the check allows for results in float32, while results of half precision are far above it.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    wide, unit = wide_dtype(dtype), 64 if name == "sigmoid_contrastive" else 32

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, to)

    def share(count: int) -> Tensor:
        """Of a gradient, for each row or column."""
        return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").to(device)

    for n, num_texts, width, kept_rows, workspace, with_ranks in (
        (70, 52, 40, 16, 2**20, True),
        (150, 300, 80, 0, 2**24, True),
        (270, 90, 64, 256, 2**15, False),
    ):
        length = width**-0.5 / unit
        image, text = normal(n, width) * length, normal(num_texts, width) * length
        text[: min(n, num_texts)] += image[: min(n, num_texts)]
        labels = torch.arange(max(n, num_texts), dtype=torch.int32, device=device) % 45
        of_images, of_texts = labels[:n], labels[:num_texts]
        image_pairs, text_pairs = normal(n * with_ranks, to=wide), normal(num_texts * with_ranks, to=wide)
        scale = torch.tensor(6.0 * unit**2, dtype=wide, device=device)
        if name == "contrastive_pairs":
            yield image[:33], text[:33], scale
        elif name == "contrastive_statistics":
            yield image, text, scale, of_images, of_texts, image_pairs, text_pairs, kept_rows, workspace
        elif name == "contrastive_statistics_backward":
            nothing = image_pairs[:0]
            inputs = (image, text, scale, of_images, of_texts)
            row_lse, column_lse, *_, kept = reference.contrastive_statistics(
                *inputs, nothing, nothing, kept_rows, workspace
            )
            yield (
                *inputs, row_lse, column_lse, kept, share(n), share(num_texts), -2 * share(n), workspace, True, True,
            )  # fmt: skip
        else:
            small, bias = scale / 2**16, torch.tensor(-0.5, dtype=wide, device=device)
            yield (
                image, text, small, bias, of_images, of_texts, image_pairs * small, text_pairs * small, workspace,
                True, True,
            )  # fmt: skip
