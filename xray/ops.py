"""The public face of the kernels: drop these functions and modules into any PyTorch code.

Everything here is defined in `xray_kernels` and re-exported; this file computes nothing.
"""

from xray_kernels import (
    ClipLoss,
    SigLipLoss,
    TokenMap,
    add_reorganize_norm,
    attention,
    attention_varlen,
    attention_varlen_with_scores,
    attention_with_scores,
    clip_loss,
    clip_loss_with_ranks,
    gather_tokens,
    reorganize_tokens,
    siglip_loss,
    siglip_loss_with_ranks,
    tag_loss,
    token_map,
)

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "TokenMap",
    "add_reorganize_norm",
    "attention",
    "attention_varlen",
    "attention_varlen_with_scores",
    "attention_with_scores",
    "clip_loss",
    "clip_loss_with_ranks",
    "gather_tokens",
    "reorganize_tokens",
    "siglip_loss",
    "siglip_loss_with_ranks",
    "tag_loss",
    "token_map",
]
