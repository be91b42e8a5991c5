"""Small arguments of the attention ops, on which an implementation is compared with the reference before first use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xray_kernels.attention import reference


def samples(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of op `name` for a first-use check: causal, of unequal lengths, packed, and with scores."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, to)

    lengths = torch.tensor([70, 0, 33], device=device)
    bounds = torch.tensor([0, 40, 40, 105], dtype=torch.int32, device=device)
    # grad_scores, by which class_scores_backward is chosen, is float32 beside half types too; Triton's interpreter
    # can not do bfloat16
    types = [dtype]
    if name == "class_scores_backward" and dtype == torch.float32:
        types += [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]
    of_scores = name in ("attention_with_scores", "class_scores", "class_scores_backward")
    for of_tokens in types:
        for batch, tokens, head_dim, is_causal, *packing in (
            (3, 70, 32, False, lengths, None, 70),
            (1, 105, 80, False, None, bounds, 65),
            (2, 100, 64, True, None, None, 100),
        ):
            query, key, value, grad_out = (normal(batch, 2, tokens, head_dim, to=of_tokens) for _ in range(4))
            scale, prefix = head_dim**-0.5, 2
            if of_scores and is_causal:
                continue
            if name == "attention":
                yield query, key, value, scale, is_causal, *packing
            elif name == "attention_with_scores":
                yield query, key, value, scale, prefix, *packing
            elif name == "class_scores":
                yield query, key, scale, prefix, *packing
            elif name == "attention_backward":
                if is_causal:
                    grad_scores = class_row = None
                    out, statistics = reference.attention(query, key, value, scale, True, *packing)
                else:
                    out, scores, statistics, class_row = reference.attention_with_scores(
                        query, key, value, scale, prefix, *packing
                    )
                    grad_scores = normal(*scores.shape, to=scores.dtype)
                yield (
                    grad_out, grad_scores, query, key, value, out, statistics, class_row, scale, is_causal,
                    *packing, prefix,
                )  # fmt: skip
            else:
                scores, class_row = reference.class_scores(query, key, scale, prefix, *packing)
                yield (
                    normal(*scores.shape, to=scores.dtype), query, key, class_row, scale, prefix, *packing[1:],
                    grad_out, value,
                )  # fmt: skip
