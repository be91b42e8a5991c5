"""The ring exchange: blocks of n texts travel round the ranks, so that none ever holds all N of them.

At step k rank r holds the texts of rank r + k, while those of rank r + k + 1 are on their way. In the
backward pass the texts' gradient follows its texts one step behind, gathers each rank's part, and after W
steps is home.
Source: the exchange of SigLIP (Zhai et al., ICCV 2023, section 3.3); here for CLIP's two-way softmax as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from xray_kernels.contrastive_loss import local
from xray_kernels.contrastive_loss.labels import Matching
from xray_kernels.contrastive_loss.tiling import wide_dtype


class _Shift:
    """A transfer under way: this rank's tensor to the rank before it, that of the rank after it to here."""

    def __init__(self, value: Tensor, group: Any) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        before, after = (dist.get_global_rank(group, (rank + step) % size) for step in (-1, 1))
        self.sent, self.received = (
            value.contiguous(),
            torch.empty_like(value, memory_format=torch.contiguous_format),
        )
        self.requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, before, group),
                dist.P2POp(dist.irecv, self.received, after, group),
            ]
        )

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


def _blocks(text: Tensor, group: Any) -> Iterator[tuple[int, Tensor]]:
    """(owner, its texts) for each rank from this one on; meanwhile the next block travels."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(size):
        coming = _Shift(text, group) if step + 1 < size else None
        yield (rank + step) % size, text
        if coming is not None:
            text = coming.wait()


def _return_gradients(
    text: Tensor, group: Any, contribution: Callable[[int, Tensor], Tensor], wanted: bool
) -> Tensor | None:
    """The sum over ranks of `contribution(owner, texts)`, a gradient of the texts, for this rank's own."""
    travelling: _Shift | None = None
    for owner, block in _blocks(text, group):
        grad = contribution(owner, block)
        if wanted:
            grad = grad.to(wide_dtype(text.dtype))
            if travelling is not None:
                grad = grad + travelling.wait()
            travelling = _Shift(grad, group)
    return None if travelling is None else travelling.wait().to(text.dtype)


class _RingStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        matching: Matching,
        image_pairs: Tensor,
        text_pairs: Tensor,
        group: Any,
        max_workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        n = image.shape[0]
        row_lse = image.new_full((n,), float("-inf"), dtype=torch.float64)
        column_lse = row_lse.new_empty(dist.get_world_size(group) * n)
        positive = torch.zeros_like(row_lse)
        image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
        for owner, block in _blocks(text, group):
            columns = slice(owner * n, (owner + 1) * n)
            rows, column_lse[columns], found, ahead, text_ranks[columns], _ = local.contrastive_statistics(
                image,
                block,
                logit_scale,
                matching.image_labels,
                matching.text_labels[columns],
                image_pairs,
                text_pairs[columns],
                0,
                max_workspace_bytes,
            )
            row_lse = torch.logaddexp(row_lse, rows)
            positive += found
            image_ranks += ahead
        ctx.group, ctx.max_workspace_bytes = group, max_workspace_bytes
        ctx.mark_non_differentiable(image_ranks, text_ranks)
        ctx.save_for_backward(
            image, text, logit_scale, row_lse, column_lse, matching.image_labels, matching.text_labels
        )
        return row_lse, column_lse, positive, image_ranks, text_ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor, *_: Any) -> tuple[Any, ...]:
        image, text, logit_scale, row_lse, column_lse, image_labels, text_labels = ctx.saved_tensors
        image_needs, text_needs, scale_needs = ctx.needs_input_grad[:3]
        n = image.shape[0]
        grad_image = torch.zeros_like(image, dtype=wide_dtype(image.dtype))
        grad_scale = torch.zeros_like(logit_scale, dtype=torch.float64)

        def contribution(owner: int, block: Tensor) -> Tensor:
            columns = slice(owner * n, (owner + 1) * n)
            by_image, by_text, by_scale = local.contrastive_statistics_backward(
                image,
                block,
                logit_scale,
                image_labels,
                text_labels[columns],
                row_lse,
                column_lse[columns],
                image.new_empty((0, n), dtype=grad_image.dtype),
                grad_row,
                grad_column[columns],
                grad_positive,
                ctx.max_workspace_bytes,
                image_needs or scale_needs,
                text_needs,
            )
            if image_needs:
                grad_image.add_(by_image)
            grad_scale.add_(by_scale)
            return by_text

        grad_text = _return_gradients(text, ctx.group, contribution, text_needs)
        return (
            grad_image.to(image.dtype) if image_needs else None,
            grad_text,
            grad_scale.to(logit_scale.dtype) if scale_needs else None,
            *(None,) * 5,
        )


class _RingSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        matching: Matching,
        image_pairs: Tensor,
        text_pairs: Tensor,
        group: Any,
        max_workspace_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = image.shape[0]
        total = image.new_zeros((), dtype=torch.float64)
        image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
        for owner, block in _blocks(text, group):
            columns = slice(owner * n, (owner + 1) * n)
            part, *_, ahead, text_ranks[columns] = local.sigmoid_contrastive(
                image,
                block,
                logit_scale,
                logit_bias,
                matching.image_labels,
                matching.text_labels[columns],
                image_pairs,
                text_pairs[columns],
                max_workspace_bytes,
                False,
                False,
            )
            total += part
            image_ranks += ahead
        ctx.group, ctx.max_workspace_bytes = group, max_workspace_bytes
        ctx.mark_non_differentiable(image_ranks, text_ranks)
        ctx.save_for_backward(image, text, logit_scale, logit_bias, matching.image_labels, matching.text_labels)
        return total, image_ranks, text_ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        image, text, logit_scale, logit_bias, image_labels, text_labels = ctx.saved_tensors
        image_needs, text_needs, scale_needs, bias_needs = ctx.needs_input_grad[:4]
        rows_need = image_needs or scale_needs or bias_needs
        n = image.shape[0]
        factor = grad.to(wide_dtype(image.dtype))
        grad_image = torch.zeros_like(image, dtype=factor.dtype)
        grad_scale = torch.zeros_like(logit_scale, dtype=torch.float64)
        grad_bias = torch.zeros_like(grad_scale)

        def contribution(owner: int, block: Tensor) -> Tensor:
            empty = image.new_empty(0, dtype=factor.dtype)
            _, by_image, by_text, by_scale, by_bias, *_ = local.sigmoid_contrastive(
                image,
                block,
                logit_scale,
                logit_bias,
                image_labels,
                text_labels[owner * n : (owner + 1) * n],
                empty,
                empty,
                ctx.max_workspace_bytes,
                rows_need,
                text_needs,
            )
            if image_needs:
                grad_image.add_(by_image)
            grad_scale.add_(by_scale)
            grad_bias.add_(by_bias)
            return by_text * factor

        grad_text = _return_gradients(text, ctx.group, contribution, text_needs)
        return (
            grad_image.mul_(factor).to(image.dtype) if image_needs else None,
            grad_text,
            (grad_scale * grad).to(logit_scale.dtype) if scale_needs else None,
            (grad_bias * grad).to(logit_bias.dtype) if bias_needs else None,
            *(None,) * 5,
        )


def ring_statistics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    matching: Matching,
    image_pairs: Tensor,
    text_pairs: Tensor,
    group: Any,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`local.contrastive_statistics` of this rank's rows against all texts, two blocks of which it holds."""
    return _RingStatistics.apply(
        image, text, logit_scale, matching, image_pairs, text_pairs, group, max_workspace_bytes
    )


def ring_sigmoid(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    matching: Matching,
    image_pairs: Tensor,
    text_pairs: Tensor,
    group: Any,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and ranks of `local.sigmoid_contrastive` for this rank's rows against all texts.

    Gradients are computed in the backward pass, on a second trip of the texts, because what arrives there may
    differ between ranks: 4 n N D products instead of 3.
    """
    return _RingSigmoid.apply(
        image, text, logit_scale, logit_bias, matching, image_pairs, text_pairs, group, max_workspace_bytes
    )
