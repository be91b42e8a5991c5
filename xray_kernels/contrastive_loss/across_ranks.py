"""The contrastive losses over a process group: one process's ops on each block of texts that an exchange brings.

A rank computes its n images against all N texts. Row statistics are then whole, column statistics merge by
reductions of N numbers, and gradients of the texts go home block by block.

Whoever compiles a model runs this part as it is (the decorators): transfers under way are nothing that a graph can
hold. The module is imported when there are ranks, as that loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray_kernels.contrastive_loss import distributed, local, pair_logits
from xray_kernels.contrastive_loss.exchange import EXCHANGE_TYPES, Block, Exchange, Homeward
from xray_kernels.contrastive_loss.inputs import Call, ScaleGradient, as_scalar, check
from xray_kernels.contrastive_loss.labels import Matching, match
from xray_kernels.contrastive_loss.tiling import plan, wide_dtype


def agree(call: Call, group: Any) -> None:
    """Check the call on this rank and that it fits those of the others; an error on one is an error on all."""
    with distributed.failing_together(group):
        check(call)
        distributed.check_backend(call.image, group)
    distributed.agree(distributed.terms_of(call), group)


@torch.compiler.disable
def clip(
    call: Call, group: Any, local_loss: bool = True, gather_with_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`clip_loss_with_ranks` over the ranks of `group`, in one of the four modes of open_clip's module.

    The default is the exact one; `modules` says what the others give.
    """
    agree(call, group)
    image, text = call.image, call.text
    scale, matching = as_scalar(call.logit_scale, image), match(call.labels, image, group)
    if gather_with_grad or not local_loss:
        if not gather_with_grad:
            size, _ = distributed.place(image, group)
            image, text = ScaleGradient.apply(image, 1 / size), ScaleGradient.apply(text, 1 / size)
        rows, columns, image_ranks, text_ranks = _clip_sides(call, image, text, scale, matching, group)
    else:  # rows differentiate the images and columns the texts; their effect on the other side is dropped
        rows, _, image_ranks, text_ranks = _clip_sides(call, image, text.detach(), scale, matching, group)
        _, columns, *_ = _clip_sides(call, image.detach(), text, scale, matching, group)
    loss = ((rows + columns) / 2).to(wide_dtype(image.dtype))
    if not local_loss:
        loss = distributed.mean_over_ranks(loss, group)
    return loss, image_ranks, text_ranks


def _clip_sides(
    call: Call, image: Tensor, text: Tensor, scale: Tensor, matching: Matching, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropies of this rank's rows and columns, and its ranks."""
    image_pairs = pair_logits(call, scale)
    text_pairs = distributed.all_gather(image_pairs, group) if call.with_ranks else image_pairs
    needed = torch.is_grad_enabled() and any(value.requires_grad for value in (image, text, scale))
    exchange = EXCHANGE_TYPES[call.exchange](group)
    row_lse, column_lse, positive, image_ranks, text_ranks = _Statistics.apply(
        image, text, scale, matching, image_pairs, text_pairs, exchange, call.max_workspace_bytes, needed
    )
    if matching.positives is not None:
        positive = positive / matching.positives
    column_lse = distributed.merge_columns(column_lse, group)
    text_ranks = distributed.sum_columns(text_ranks, group)
    return (row_lse - positive).mean(), (column_lse - positive).mean(), image_ranks, text_ranks


@torch.compiler.disable
def siglip(call: Call, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`siglip_loss_with_ranks` over the ranks of `group`."""
    agree(call, group)
    image, text = call.image, call.text
    scale = as_scalar(call.logit_scale, image)
    bias = as_scalar(0.0 if call.logit_bias is None else call.logit_bias, image)
    matching = match(call.labels, image, group)
    image_pairs = pair_logits(call, scale)
    text_pairs = distributed.all_gather(image_pairs, group) if call.with_ranks else image_pairs
    exchange = EXCHANGE_TYPES[call.exchange](group)
    at_once = torch.is_grad_enabled() and exchange.holds_all
    total, image_ranks, text_ranks = _Sigmoid.apply(
        image, text, scale, bias, matching, image_pairs, text_pairs, exchange, call.max_workspace_bytes, at_once
    )
    text_ranks = distributed.sum_columns(text_ranks, group)
    return (total / image.shape[0]).to(wide_dtype(image.dtype)), image_ranks, text_ranks


class _Statistics(torch.autograd.Function):
    """`local.contrastive_statistics` of this rank's images against the texts of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        matching: Matching,
        image_pairs: Tensor,
        text_pairs: Tensor,
        exchange: Exchange,
        max_workspace_bytes: int,
        needed: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        (n, width), num_texts = image.shape, matching.text_labels.shape[0]
        # the same rows are kept of every block: together as much as of all logits at once
        kept_rows, workspace_bytes = plan(n, num_texts, width, image.dtype, max_workspace_bytes, needed)
        row_lse = image.new_full((n,), float("-inf"), dtype=torch.float64)
        column_lse = row_lse.new_empty(num_texts)
        positive = torch.zeros_like(row_lse)
        image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
        texts, logits = [] if exchange.holds_all else [text], []
        for block in exchange.blocks(text):
            rows, columns, found, ahead, behind, kept = local.contrastive_statistics(
                image,
                block.values,
                logit_scale,
                matching.image_labels,
                exchange.part(matching.text_labels, block),
                image_pairs,
                exchange.part(text_pairs, block),
                kept_rows,
                workspace_bytes,
            )
            row_lse = torch.logaddexp(row_lse, rows)
            positive += found
            image_ranks += ahead
            exchange.put(column_lse, block, columns)
            exchange.put(text_ranks, block, behind)
            logits.append(kept)
            if exchange.holds_all:
                texts.append(block.values)
        ctx.exchange, ctx.workspace_bytes, ctx.num_kept = exchange, workspace_bytes, len(texts)
        ctx.mark_non_differentiable(image_ranks, text_ranks)
        ctx.save_for_backward(
            image,
            text,
            logit_scale,
            row_lse,
            column_lse,
            matching.image_labels,
            matching.text_labels,
            *texts,
            *logits,
        )
        return row_lse, column_lse, positive, image_ranks, text_ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor, *_: Any) -> tuple[Any, ...]:
        image, text, logit_scale, row_lse, column_lse, image_labels, text_labels, *kept = ctx.saved_tensors
        texts, logits = kept[: ctx.num_kept], kept[ctx.num_kept :]
        image_needs, text_needs, scale_needs = ctx.needs_input_grad[:3]
        exchange = ctx.exchange
        homeward = Homeward(exchange, text) if text_needs else None
        grad_image = image.new_zeros(image.shape, dtype=wide_dtype(image.dtype)) if image_needs else None
        grad_scale = torch.zeros_like(logit_scale, dtype=torch.float64)
        for block, kept_logits in zip(exchange.again(texts), logits, strict=True):
            by_image, by_text, by_scale = local.contrastive_statistics_backward(
                image,
                block.values,
                logit_scale,
                image_labels,
                exchange.part(text_labels, block),
                row_lse,
                exchange.part(column_lse, block),
                kept_logits,
                grad_row,
                exchange.part(grad_column, block),
                grad_positive,
                ctx.workspace_bytes,
                image_needs or scale_needs,
                text_needs,
            )
            if homeward is not None:
                homeward.send(block, by_text)
            if grad_image is not None:
                grad_image += by_image
            grad_scale += by_scale
        return (
            None if grad_image is None else grad_image.to(image.dtype),
            None if homeward is None else homeward.finish(),
            grad_scale.to(logit_scale.dtype) if scale_needs else None,
            *(None,) * 6,
        )


class _Sigmoid(torch.autograd.Function):
    """The loss and the ranks of `local.sigmoid_contrastive` for this rank's images against the texts of all ranks.

    `at_once`: gradients are computed along with the loss, 3 n N D products, and kept, N x D of them; otherwise in the
    backward pass, on a second trip of the texts: 4. Either way they go home after they were multiplied by what
    arrives there, as that may differ between ranks.
    """

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
        exchange: Exchange,
        max_workspace_bytes: int,
        at_once: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        image_needs, text_needs, scale_needs, bias_needs = ctx.needs_input_grad[:4]
        labels = matching.image_labels, matching.text_labels
        grad_texts: list[Tensor] = []
        sums, image_ranks, text_ranks = _sigmoid_blocks(
            exchange,
            exchange.blocks(text),
            (image, logit_scale, logit_bias, *labels, image_pairs, text_pairs),
            max_workspace_bytes,
            at_once and (image_needs or scale_needs or bias_needs),
            at_once and text_needs,
            lambda _, by_text: grad_texts.append(by_text),
        )
        ctx.exchange, ctx.max_workspace_bytes, ctx.at_once = exchange, max_workspace_bytes, at_once
        ctx.mark_non_differentiable(image_ranks, text_ranks)
        found = (*sums[1:], *grad_texts) if at_once else ()
        ctx.save_for_backward(image, text, logit_scale, logit_bias, *labels, *found)
        return sums[0], image_ranks, text_ranks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        image, text, logit_scale, logit_bias, image_labels, text_labels, *found = ctx.saved_tensors
        image_needs, text_needs, scale_needs, bias_needs = ctx.needs_input_grad[:4]
        factor = grad.to(wide_dtype(image.dtype))
        homeward = Homeward(ctx.exchange, text) if text_needs else None

        def send(block: Block, by_text: Tensor) -> None:
            if homeward is not None:
                rounded = torch.empty_like(by_text, dtype=text.dtype)
                homeward.send(block, torch.mul(by_text, factor, out=rounded))

        if ctx.at_once:
            by_image, by_scale, by_bias, *grad_texts = found
            if text_needs:
                for block in ctx.exchange.again(grad_texts):
                    send(block, block.values)
        else:
            empty = image.new_empty(0, dtype=factor.dtype)
            sums = _sigmoid_blocks(
                ctx.exchange,
                ctx.exchange.again([text]),
                (image, logit_scale, logit_bias, image_labels, text_labels, empty, empty),
                ctx.max_workspace_bytes,
                image_needs or scale_needs or bias_needs,
                text_needs,
                send,
            )[0]
            by_image, by_scale, by_bias = sums[1:]
        return (
            (by_image * factor).to(image.dtype) if image_needs else None,
            None if homeward is None else homeward.finish(),
            (by_scale * grad).to(logit_scale.dtype) if scale_needs else None,
            (by_bias * grad).to(logit_bias.dtype) if bias_needs else None,
            *(None,) * 6,
        )


def _sigmoid_blocks(
    exchange: Exchange,
    blocks: Iterator[Block],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    max_workspace_bytes: int,
    image_grad: bool,
    text_grad: bool,
    take: Callable[[Block, Tensor], None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`local.sigmoid_contrastive` of each block, whose text gradient `take` gets.

    Returns the sums of the loss and of its gradients by image, scale and bias, and the ranks (n,) and (N,).
    """
    image, logit_scale, logit_bias, image_labels, text_labels, image_pairs, text_pairs = inputs
    image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
    sums: list[Tensor] = []
    for block in blocks:
        total, by_image, by_text, by_scale, by_bias, ahead, behind = local.sigmoid_contrastive(
            image,
            block.values,
            logit_scale,
            logit_bias,
            image_labels,
            exchange.part(text_labels, block),
            image_pairs,
            exchange.part(text_pairs, block),
            max_workspace_bytes,
            image_grad,
            text_grad,
        )
        take(block, by_text)
        found = [total, by_image, by_scale, by_bias]
        sums = [one.add_(other) for one, other in zip(sums, found, strict=True)] if sums else found
        image_ranks += ahead
        exchange.put(text_ranks, block, behind)
    return sums, image_ranks, text_ranks
