"""What attention means, in plain PyTorch: it materialises the (B, H, Nq, Nk) probabilities.

Packed sequences are one row of the batch, (1, H, T, D), whose probabilities are block-diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _segment(position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The number of the packed sequence that each position lies in."""
    return torch.searchsorted(cu_seqlens.long(), position, right=True) - 1


def _logits(
    query: Tensor, key: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """scale * Q K^T in float32 or wider, -inf where a query may not look."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(wide) @ key.to(wide).transpose(-2, -1)).mul_(scale)
    column = torch.arange(key.shape[2], device=key.device)
    row = torch.arange(query.shape[2], device=key.device)[:, None]
    if is_causal:
        logits.masked_fill_(column > row, float("-inf"))
    if key_lengths is not None:
        logits.masked_fill_(column >= key_lengths[:, None, None, None], float("-inf"))
    if cu_seqlens is not None:
        logits.masked_fill_(_segment(column, cu_seqlens) != _segment(row, cu_seqlens), float("-inf"))
    return logits


def _softmax(logits: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, 0 in rows without a key, and the statistics (2, B, H, N) that say them again: the largest logit,
    and the logarithm of the sum of exp(logit - largest); 0 and infinity in rows without a key."""
    if logits.shape[-1] == 0:
        top, p = logits.new_zeros(logits.shape[:-1]), logits
    else:
        top, p = logits.amax(-1), logits.softmax(-1)
    log_sum = (logits - top[..., None]).exp().sum(-1).log()
    if key_lengths is not None:
        empty = (key_lengths <= 0)[:, None, None].expand_as(top)
        p = p.masked_fill(empty[..., None], 0.0)
        top, log_sum = top.masked_fill(empty, 0.0), log_sum.masked_fill(empty, float("inf"))
    return p, torch.stack((top, log_sum))


def _class_row(first: Tensor, prefix: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores, and each class token's probabilities (B, H, N), from (B, H, classes, N) probabilities of class tokens."""
    if cu_seqlens is None:
        row = first[:, :, 0].contiguous()
        return row[:, :, prefix:].mean(1), row
    position = torch.arange(first.shape[3], device=first.device)
    segment = _segment(position, cu_seqlens)
    row = first[:, :, segment, position]
    return row.mean(1).masked_fill(position - cu_seqlens[segment] < prefix, 0.0), row


def _classes(query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The class tokens' positions; of an empty packed sequence, any position."""
    if cu_seqlens is None:
        return torch.zeros(1, dtype=torch.int64, device=query.device)
    return cu_seqlens[:-1].long().clamp(max=max(query.shape[2] - 1, 0))


def _tokens_first(x: Tensor) -> Tensor:
    """(B, H, N, D), stored as (B, N, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale Q K^T) V, stored so that (B, Nq, H * D) is a free view; and the statistics of each row."""
    p, statistics = _softmax(_logits(query, key, scale, is_causal, key_lengths, cu_seqlens), key_lengths)
    out = (p @ value.to(p.dtype)).to(value.dtype)
    return _tokens_first(out), statistics


def class_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    num_prefix_tokens: int,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    """Query 0's probabilities averaged over heads: EViT's attentiveness (B, N - P), float32; and those of each head.

    Packed: (1, T), 0 for prefix tokens, of the first query of each sequence.
    """
    classes = _classes(query, cu_seqlens)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query[:, :, classes].to(wide) @ key.to(wide).transpose(-2, -1)).mul_(scale)
    column = torch.arange(key.shape[2], device=key.device)
    if key_lengths is not None:
        logits.masked_fill_(column >= key_lengths[:, None, None, None], float("-inf"))
    if cu_seqlens is not None:
        own = _segment(column, cu_seqlens) == torch.arange(len(classes), device=column.device)[:, None]
        logits.masked_fill_(~own, float("-inf"))
    return _class_row(_softmax(logits, key_lengths)[0], num_prefix_tokens, cu_seqlens)


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    num_prefix_tokens: int,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention` and `class_scores` at once: out, scores, statistics, class row."""
    p, statistics = _softmax(_logits(query, key, scale, False, key_lengths, cu_seqlens), key_lengths)
    out = (p @ value.to(p.dtype)).to(value.dtype)
    scores, class_row = _class_row(p[:, :, _classes(query, cu_seqlens)], num_prefix_tokens, cu_seqlens)
    return _tokens_first(out), scores, statistics, class_row


def _score_gradient(grad_scores: Tensor, class_row: Tensor, prefix: int, cu_seqlens: Tensor | None) -> Tensor:
    """Gradient of the class row, (B, 1, N): the scores' over the heads, 0 at prefix tokens."""
    grad = torch.zeros_like(class_row[:, :1])
    if cu_seqlens is None:
        grad[:, 0, prefix:] = grad_scores
    else:
        position = torch.arange(class_row.shape[2], device=class_row.device)
        start = cu_seqlens[_segment(position, cu_seqlens)]
        grad[:, 0] = grad_scores.masked_fill(position - start < prefix, 0.0)
    return grad / class_row.shape[1]


def attention_backward(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    class_row: Tensor | None,
    scale: float,
    is_causal: bool,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value. The scores add theirs to the probabilities' gradient in class tokens' rows."""
    logits = _logits(query, key, scale, is_causal, key_lengths, cu_seqlens)
    p = (logits - statistics[0][..., None] - statistics[1][..., None]).exp()
    wide = p.dtype
    grad_out = grad_out.to(wide)
    grad_p = grad_out @ value.to(wide).transpose(-2, -1)
    if grad_scores is not None and class_row is not None and query.shape[2] > 0:
        more = _score_gradient(grad_scores.to(wide), class_row, num_prefix_tokens, cu_seqlens)
        if cu_seqlens is None:
            grad_p[:, :, 0] += more
        else:
            position = torch.arange(query.shape[2], device=query.device)
            grad_p[:, :, cu_seqlens[_segment(position, cu_seqlens)].long(), position] += more
    grad_logits = torch._softmax_backward_data(grad_p, p, -1, wide)
    grad_query = scale * grad_logits @ key.to(wide)
    grad_key = scale * grad_logits.transpose(-2, -1) @ query.to(wide)
    grad_value = p.transpose(-2, -1) @ grad_out
    grads = (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype))
    return _tokens_first(grads[0]), _tokens_first(grads[1]), _tokens_first(grads[2])


def class_scores_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    class_row: Tensor,
    scale: float,
    num_prefix_tokens: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    grad_query: Tensor,
    grad_key: Tensor,
) -> None:
    """Adds the scores' gradients to those of query (class tokens only) and key, in place.

    With g = dScores / H and t = sum_j p_j g_j: ds_j = p_j (g_j - t); dq_0 += scale sum_j ds_j k_j;
    dk_j += scale ds_j q_0.
    """
    grad = _score_gradient(grad_scores.to(class_row.dtype), class_row, num_prefix_tokens, cu_seqlens)
    weighted = class_row * grad
    if cu_seqlens is None:
        total = weighted.sum(-1, keepdim=True)
        segment = torch.zeros(class_row.shape[2], dtype=torch.int64, device=class_row.device)
    else:
        segment = _segment(torch.arange(class_row.shape[2], device=class_row.device), cu_seqlens)
        sums = weighted.new_zeros(*weighted.shape[:2], len(cu_seqlens) - 1).index_add_(2, segment, weighted)
        total = sums[:, :, segment]
    ds = (scale * (weighted - class_row * total))[..., None]  # (B, H, N, 1)
    classes = _classes(query, cu_seqlens)
    wide = class_row.dtype
    of_keys = ds * key.to(wide)
    sums = of_keys.new_zeros(*of_keys.shape[:2], len(classes), of_keys.shape[3]).index_add_(2, segment, of_keys)
    grad_query.index_add_(2, classes, sums.to(grad_query.dtype))
    grad_key += (ds * query.to(wide)[:, :, classes[segment]]).to(grad_key.dtype)
