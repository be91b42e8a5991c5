"""Small arguments of the contrastive ops, on which an implementation is compared with the reference at first use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.contrastive_loss import reference
from xray_kernels.contrastive_loss.tiling import wide_dtype


def samples(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of op `name` for a first-use check: several tiles and panels, odd sizes, captions that recur, ranks,
    logits that are kept.

    Kernels may round the gradient of the logits to the dtype of the features. Where the sums of that are float32, the
    features are long and the scale is small: so are the gradients, and of small numbers the check asks less digits.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    wide = wide_dtype(dtype)
    length = 1000.0 if name == "sigmoid_contrastive" else 1.0
    for n, num_texts, width, workspace_bytes, with_ranks in ((150, 300, 40, 2**24, True), (270, 90, 64, 2**15, False)):
        image, text = (length * F.normalize(normal(rows, width)) for rows in (n, num_texts))
        image, text = image.to(device, dtype), text.to(device, dtype)
        scale = torch.tensor(10 / length**2, device=device, dtype=wide)
        if name == "contrastive_pairs":
            yield image[:num_texts], text[:n], scale
            continue
        labels: Any = [torch.randint(60, (rows,), generator=generator).int().to(device) for rows in (n, num_texts)]
        pairs: Any = [
            torch.linspace(-2.0, 2.0, rows if with_ranks else 0, device=device, dtype=wide) for rows in (n, num_texts)
        ]
        if name == "sigmoid_contrastive":
            bias = torch.tensor(-3.0, device=device, dtype=wide)
            yield image, text, scale, bias, *labels, *pairs, workspace_bytes, True, True
            continue
        kept_rows = 0 if with_ranks else 256
        if name == "contrastive_statistics":
            yield image, text, scale, *labels, *pairs, kept_rows, workspace_bytes
            continue
        nothing = pairs[0][:0]
        row_lse, column_lse, _, _, _, kept = reference.contrastive_statistics(
            image, text, scale, labels[0], labels[1], nothing, nothing, kept_rows, workspace_bytes
        )
        grads = (normal(rows).to(device, torch.float64) / rows for rows in (n, num_texts, n))
        yield image, text, scale, *labels, row_lse, column_lse, kept, *grads, workspace_bytes, True, True
