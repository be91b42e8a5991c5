"""The text encoder: a causal pre-LN transformer whose feature is read at the last token of each caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xray.models.config import TextConfig
from xray.models.layers import Block

_INTEGERS = (torch.int64, torch.int32)


class TokenEmbedding(nn.Embedding):
    """A vector for each token, normal with deviation 0.02 at first."""

    def reset_parameters(self) -> None:
        """Initialise the table in place."""
        nn.init.normal_(self.weight, std=0.02)


class TextTransformer(nn.Module):
    """Captions to vectors, as CLIP's text tower (Radford et al., arXiv 2103.00020)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if not isinstance(config, TextConfig):
            raise TypeError(f"config must be a TextConfig, got {type(config).__name__}")
        self.config = config
        self.token_embedding = TokenEmbedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(1, config.context_length, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the positions in place; the layers initialise themselves."""
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Encode captions.

        Args:
            token_ids: (B, L) int64 or int32, L from 1 to ``context_length``, ids below ``vocab_size``; what
                stands past a row's length is never read beyond its range check.
            lengths: (B,) int64 or int32, tokens of each row, from 1 to L.

        Returns:
            (B, width), the normalised state of each row's last token.

        Raises:
            ValueError: wrong shapes, or (on CPU, where looking costs nothing) ids or lengths out of range.
            TypeError: tensors that are not integers.
        """
        self._check(token_ids, lengths)
        tokens = self.token_embedding(token_ids) + self.position_embedding[:, : token_ids.shape[1]]
        *blocks, last_block = self.blocks
        for block in blocks:
            tokens, _ = block(tokens, is_causal=True, key_lengths=lengths)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        last_tokens = tokens[rows, lengths.long() - 1].unsqueeze(1)
        last_tokens, _ = last_block(tokens, queries=last_tokens, key_lengths=lengths)
        return self.norm(last_tokens.squeeze(1))

    def _check(self, token_ids: Tensor, lengths: Tensor) -> None:
        for name, tensor in (("token_ids", token_ids), ("lengths", lengths)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in _INTEGERS:
                raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
        shape, config = tuple(token_ids.shape), self.config
        if token_ids.ndim != 2:
            raise ValueError(f"token_ids must be (B, L), got shape {shape}")
        if not 1 <= shape[1] <= config.context_length:
            raise ValueError(f"token_ids must have 1 to {config.context_length} (context_length) columns, got {shape}")
        if tuple(lengths.shape) != shape[:1]:
            raise ValueError(f"lengths must be ({shape[0]},) to match token_ids, got shape {tuple(lengths.shape)}")
        # Reading values on an accelerator would wait for it; there the embedding lookup traps bad ids.
        if torch.compiler.is_compiling() or token_ids.device.type != "cpu" or not token_ids.numel():
            return
        low, high = (int(value) for value in token_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"token_ids must lie in 0 to {config.vocab_size - 1} (vocab_size), got {low if low < 0 else high}"
            )
        low, high = (int(value) for value in lengths.aminmax())
        if low < 1 or high > shape[1]:
            raise ValueError(f"lengths must lie in 1 to {shape[1]}, got {low if low < 1 else high}")
