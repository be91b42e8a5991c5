"""The public face of the kernels: drop these functions and modules into any PyTorch code.

Everything here is defined in `xray_kernels` and re-exported; this file computes nothing.
"""

from xray_kernels import (
    ClipLoss,
    SigLipLoss,
    add_reorganize_norm,
    attention,
    attention_with_scores,
    clip_loss,
    reorganize_tokens,
    siglip_loss,
    tag_loss,
)

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "add_reorganize_norm",
    "attention",
    "attention_with_scores",
    "clip_loss",
    "reorganize_tokens",
    "siglip_loss",
    "tag_loss",
]
