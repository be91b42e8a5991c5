"""The pre-LN transformer block and the position embeddings that every model here is built from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray import ops


class Linear(nn.Linear):
    """A linear layer that starts with Xavier-uniform weights, a scale that fits any width, and a zero bias."""

    def reset_parameters(self) -> None:
        """Initialise weight and bias in place."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, width = tokens.shape
        # (B, N, 3, H, D) -> 3 x (B, H, N, D): views only, the ops take any strides. Taken apart along the 3 as it lies,
        # so that their gradients, which the ops leave as (B, N, H, D), come back together in one copy and not in two.
        query, key, value = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads).unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _merge(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))  # (B, H, N, D) -> (B, N, C)

    def forward(self, tokens: Tensor, *, is_causal: bool = False, key_lengths: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); ``key_lengths`` (B,) hides the keys past each row's length."""
        query, key, value = self._split(tokens)
        return self._merge(ops.attention(query, key, value, is_causal=is_causal, key_lengths=key_lengths))

    def forward_with_scores(self, tokens: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> the same, and the class token's mean attention to each non-prefix token (B, N - P)."""
        query, key, value = self._split(tokens)
        heads, scores = ops.attention_with_scores(query, key, value, num_prefix_tokens=num_prefix_tokens)
        return self._merge(heads), scores

    def forward_queries(self, queries: Tensor, tokens: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """(B, Q, C), which attend to (B, N, C) -> (B, Q, C); ``key_lengths`` as in ``forward``."""
        batch, count, width = tokens.shape
        head_dim = width // self.heads
        (query_weight, weight), (query_bias, bias) = (x.split([width, 2 * width]) for x in self.qkv.parameters())
        query = F.linear(queries, query_weight, query_bias).unflatten(2, (self.heads, head_dim)).transpose(1, 2)
        key, value = F.linear(tokens, weight, bias).view(batch, count, 2, self.heads, head_dim).unbind(2)
        return self._merge(ops.attention(query, key.transpose(1, 2), value.transpose(1, 2), key_lengths=key_lengths))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """A pre-LN transformer block that can also reorganise its tokens as EViT does."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(
        self,
        tokens: Tensor,
        *,
        num_keep: int | None = None,
        num_prefix_tokens: int = 1,
        is_causal: bool = False,
        key_lengths: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            tokens: (B, N, C).
            num_keep: non-prefix tokens to keep, or None to leave the tokens as they are. The rest become one
                fused token, between the attention residual and the MLP (EViT, Liang et al., ICLR 2022).
            num_prefix_tokens: leading tokens that are never dropped.
            is_causal: let a token attend only to itself and those before it; not with ``num_keep``.
            key_lengths: (B,) valid tokens of each row; not with ``num_keep``.
            queries: (B, Q, C), those of the tokens whose output alone is wanted, which see all of them; not with
                ``num_keep`` or ``is_causal``. Where only Q of N are read, the rest of a last block is work for nothing.

        Returns:
            The tokens, (B, N, C), (B, P + num_keep + 1, C) or (B, Q, C), and the kept indices (B, num_keep) int64 into
            the non-prefix tokens, or None.
        """
        if queries is not None:
            queries = queries + self.attn.forward_queries(self.norm1(queries), self.norm1(tokens), key_lengths)
            return queries + self.mlp(self.norm2(queries)), None
        if num_keep is None:
            tokens = tokens + self.attn(self.norm1(tokens), is_causal=is_causal, key_lengths=key_lengths)
            return tokens + self.mlp(self.norm2(tokens)), None
        update, scores = self.attn.forward_with_scores(self.norm1(tokens), num_prefix_tokens)
        dtype = tokens.dtype  # under autocast and FSDP's mixed precision the residual stream is the widest
        tokens, normed, indices = ops.add_reorganize_norm(
            tokens,
            update.to(dtype),
            scores,
            num_keep,
            self.norm2.weight.to(dtype),
            self.norm2.bias.to(dtype),
            self.norm2.eps,
            num_prefix_tokens=num_prefix_tokens,
        )
        return tokens + self.mlp(normed), indices


def sin_cos_positions(grid_size: int, width: int) -> Tensor:
    """The fixed 2-D sine-cosine embedding of a square grid, (1, grid_size**2, width) float32.

    A quarter of the channels each for sine and cosine of the row and of the column; channels left over when
    ``width`` is not a multiple of 4 are zero. MAE (He et al., CVPR 2022) fixes it; here it only starts the
    learned embeddings.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (G, C/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (G, C/2)
    rows = waves[:, None, :].expand(-1, grid_size, -1)
    columns = waves[None, :, :].expand(grid_size, -1, -1)
    positions = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return F.pad(positions, (0, width - 4 * quarter)).float()[None]


def resize_positions(positions: Tensor, grid_size: int) -> Tensor:
    """Interpolate spatial embeddings (1, G*G, C) to (1, grid_size**2, C), differentiably.

    Bicubic with antialiasing and unaligned corners, as timm's ``resample_abs_pos_embed``; in at least float32.
    """
    old = math.isqrt(positions.shape[1])
    if old == grid_size:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    # What interpolation gives is linear and the same along rows and columns. Its weights are applied as plain sums,
    # because the backward pass of F.interpolate adds with atomics on CUDA, and two runs would differ.
    impulses = torch.eye(old, dtype=wide.dtype, device=wide.device)[None, None]
    weights = F.interpolate(impulses, size=(grid_size, old), mode="bicubic", antialias=True, align_corners=False)
    weights = weights[0, 0, ..., None, None]  # (new, G, 1, 1)
    picture = wide.unflatten(1, (1, old, old))  # (1, 1, G, G, C)
    rows = (weights * picture).sum(2)  # (1, new, G, C)
    return (weights[:, :, 0] * rows[:, :, None]).sum(3).flatten(1, 2).to(positions.dtype)


def resize_frame_positions(positions: Tensor, num_frames: int) -> Tensor:
    """Interpolate temporal embeddings (1, T, C) linearly to (1, num_frames, C); one frame is repeated."""
    if positions.shape[1] == num_frames:
        return positions
    line = positions.float().transpose(1, 2)  # (1, C, T)
    line = F.interpolate(line, size=num_frames, mode="linear", align_corners=False)
    return line.transpose(1, 2).to(positions.dtype)
