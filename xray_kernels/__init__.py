"""Kernels for vision models that prune tokens: PyTorch ops with CPU and GPU implementations behind one dispatcher.

The ops work on any machine that runs PyTorch; `python -m xray_kernels` prints which implementation runs where.
"""

from xray_kernels import _library
from xray_kernels.attention import (
    attention,
    attention_varlen,
    attention_varlen_with_scores,
    attention_with_scores,
)
from xray_kernels.attention.samples import samples as _attention_samples
from xray_kernels.contrastive_loss import clip_loss, clip_loss_with_ranks, siglip_loss, siglip_loss_with_ranks
from xray_kernels.contrastive_loss.modules import ClipLoss, SigLipLoss
from xray_kernels.contrastive_loss.samples import samples as _contrastive_samples
from xray_kernels.tag_loss import tag_loss
from xray_kernels.token_reorganize import add_reorganize_norm, reorganize_tokens
from xray_kernels.token_reorganize.follow import TokenMap, gather_tokens, token_map

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

_library.load_compiled()
_library.check_tiles(_attention_samples, "attention_with_scores", "attention_backward")
_library.check_tiles(
    _contrastive_samples,
    "contrastive_pairs",
    "contrastive_statistics",
    "contrastive_statistics_backward",
    "sigmoid_contrastive",
)
