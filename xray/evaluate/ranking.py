"""Ranks of the right answers, by tiles, so that the full similarity matrix never exists."""

import torch
from torch import Tensor

from xray.evaluate.errors import EvaluationError

TIE_TOLERANCE = 1e-6


def positive_ranks(
    queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor, *, tile: int = 2048
) -> Tensor:
    """How many wrong candidates come before the best right one, for each query.

    A candidate is right for a query when both carry the same group number. The score is the dot product. A
    wrong candidate that ties with the best right one (within 1e-6) counts as before it, and so does one whose
    score is not a number, so features that have collapsed to a point, or to NaN, score zero and never by
    luck.

    Args:
        queries: (Q, D) floating features.
        candidates: (N, D) floating features.
        query_groups: (Q,) int64.
        candidate_groups: (N,) int64.
        tile: side of the largest block of similarities held in memory.

    Returns:
        (Q,) int64; a query is answered within the top k when its rank is below k.

    Raises:
        EvaluationError: shapes that do not fit, or a query without any right candidate.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise EvaluationError(
            "queries and candidates must be (Q, D) and (N, D) with the same D, "
            f"got {tuple(queries.shape)} and {tuple(candidates.shape)}"
        )
    if query_groups.shape != queries.shape[:1] or candidate_groups.shape != candidates.shape[:1]:
        raise EvaluationError(
            "query_groups and candidate_groups must hold one number per row, got "
            f"{tuple(query_groups.shape)} and {tuple(candidate_groups.shape)} for {len(queries)} and "
            f"{len(candidates)} rows"
        )
    lonely = ~torch.isin(query_groups, candidate_groups)
    if lonely.any():
        raise EvaluationError(
            "query_groups must all occur in candidate_groups, "
            f"but query {int(lonely.nonzero()[0])} has no right candidate"
        )
    ranks = torch.zeros(len(queries), dtype=torch.int64)
    for q in range(0, len(queries), tile):
        rows, groups = queries[q : q + tile].float(), query_groups[q : q + tile, None]
        best = torch.full((len(rows),), -torch.inf)
        for c in range(0, len(candidates), tile):
            scores = rows @ candidates[c : c + tile].float().T
            right = groups == candidate_groups[None, c : c + tile]
            best = torch.maximum(best, scores.masked_fill(~right, -torch.inf).amax(dim=1))
        threshold = (best - TIE_TOLERANCE)[:, None]
        for c in range(0, len(candidates), tile):
            scores = rows @ candidates[c : c + tile].float().T
            wrong = groups != candidate_groups[None, c : c + tile]
            ranks[q : q + tile] += (wrong & ~(scores < threshold)).sum(dim=1)
    return ranks


def recall(ranks: Tensor, k: int) -> float:
    """Share of queries whose rank, (Q,) int64, is below k."""
    return float((ranks < k).double().mean()) if len(ranks) else 0.0
