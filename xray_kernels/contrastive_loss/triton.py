"""The contrastive losses on GPUs by Triton, with the library's matrix products.

A panel is some rows by some columns of the n x N logits, as large and as square as the workspace allows.
Forward. A program multiplies one tile of a panel and leaves, for each of its rows and columns, the largest logit and
the sum of exponentials beside it, and for rows the sum of positives; `merge_kernel` reduces these in float64 in a fixed
order. Logits leave the chip only where they are kept. Ranks are counted by sums of integers, exact in any order.
Backward. A program computes its tile again (or reads what was kept) and writes dS, rounded to the features' dtype, to
the panel; the library then adds panel @ T and panel^T @ I to sums in float32, which become the gradients at the end.
The scale's gradient is sum(dI * I), as in the reference. SigLIP writes dS in its only pass.
float32: the library makes the logits as well, into the panel (or to where they are kept), as Triton's product without
matrix units is several times slower; but with ranks the tiles are multiplied here, for a pair must have their bits.

With n = N = 65,536, D = 768, half types, U = 2 n N D = 6.6e12 and 256 MiB (six by six panels of at most 11,008^2):
    FLOPs  CLIP U forward, 3U backward (2U by the library); SigLIP 3U (2U by the library)
    bytes  forward, on Hopper: features from L2 2 n N D (1 / 128 + 1 / 256) = 77 GB; partial sums
           n N (12 / 256 + 8 / 128) = 0.47 GB, written and read. Backward: the panel written once and read twice,
           6 n N = 26 GB; sums of gradients 8 D (n 6 + N 6) = 4.8 GB. A product with a panel has 768 operations for each
           byte of it, an H100 295 for each byte of memory: it is bound by its operations.
    memory the panel, and partial sums, within the workspace; else outputs, and for half types float32 sums of gradients
Lost, by count and not by measurement: a backward without panels. It would spare their 26 GB, but a program holds
either its part of dI or of dT, not both: 2 recomputations instead of 1 (CLIP 5U), or atomics, which are not
deterministic; and 128 rows of 768 channels in float32 are 1.5 times all registers of a multiprocessor. Panels small
enough for L2 (4,096^2) would spare reads of panels, but add up gradients 2.7 times as often, by products of 96 tiles of
128 x 256 for 132 multiprocessors. One exponential a logit instead of two, beside the largest of the whole tile, would
lose digits of the log-sum-exp that the scale multiplies.

Precision. bfloat16 has float32's range, and dS its 8 bits, as every backward by matrix units has them. In float16 dS is
multiplied by a power of two: SigLIP's, at most 1, by 2^15; CLIP's, sums of three terms, by the one that brings the
largest incoming gradient to [2^13, 2^14). What is lost is below 2^-39 of the largest (2^-40 for SigLIP): over 65,536
texts 2^-23 of it at most.

No floating-point atomics, no host synchronisation, nothing that depends on values: two runs have the same bits, and a
CUDA graph replays. Strides may be anything. Tiles are chosen by what compiles without spills on sm_80, sm_90 and
sm_100; nothing here is measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xray_kernels._triton import on
from xray_kernels.contrastive_loss import reference
from xray_kernels.contrastive_loss import triton_kernels as kernels
from xray_kernels.contrastive_loss.samples import samples
from xray_kernels.contrastive_loss.tiling import spans, wide_dtype

__all__ = [
    "contrastive_pairs",
    "contrastive_statistics",
    "contrastive_statistics_backward",
    "samples",
    "sigmoid_contrastive",
]
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}
"""A logit is rounded before anything is subtracted from it: the largest term of a sum of exponentials is exactly 1, the
loss of one pair exactly 0, and a pair's logit the same number wherever it is computed."""
GROUP = 16
"""Tiles of images that programs which run together share."""
BROADEST = 2**23
"""Columns of a panel, so that offsets within a row of tiles fit 32 bits."""
SIGMOID_FACTOR = {torch.float16: 2.0**15}
"""By which SigLIP's dS, at most 1, is multiplied, so that float16 does not lose improbable pairs."""
MERGED, STEP = 32, 32
"""Rows or columns of a program that merges partial log-sum-exps, and partials it reads at a time."""


class Tile(NamedTuple):
    """How a kernel over tiles of logits is launched; `depth` is the channels of a step."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, "num_warps": self.warps,
            "num_stages": self.stages, **UNFUSED,
        }  # fmt: skip

    def over(self, rows: int, columns: int) -> int:
        """Tiles that cover a panel."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


READ = Tile(64, 128, 16, 4, 1)
"""For logits that lie in memory."""


def architecture(image: Tensor) -> int:
    """Such as 90 for Hopper; 0 without a GPU."""
    if not image.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(image.device)
    return 10 * major + minor


def configuration(dtype: torch.dtype, kernel: str = "", device: int = 0) -> Tile:
    """For logits that are multiplied in the kernel, on an architecture `device`.

    Wide tiles read less from L2, but only "gradient" and, on Hopper, "statistics" hold them in registers. All other
    kernels have one tile for each dtype, whatever the sizes: a pair's logit must have the bits it has in its tile.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 16, 8, 1)
    if kernel == "gradient":
        return Tile(128, 256, 64, 8, 3)
    return Tile(128, 256, 64, 16, 3) if kernel == "statistics" and device == 90 else Tile(128, 128, 64, 8, 3)


def panel_shape(rows: int, columns: int, elements: int, tile: Tile) -> tuple[int, int]:
    """The largest panel of at most so many elements (or one), as square as can be, in equal parts of whole tiles."""

    def part(length: int, most: int, unit: int) -> int:
        if length <= most:
            return length
        unit = next(unit for unit in (unit, 16, 1) if unit <= max(most, 1))
        most = max(most // unit, 1) * unit
        return triton.cdiv(triton.cdiv(length, triton.cdiv(length, most)), unit) * unit

    padded = triton.cdiv(columns, 16) * 16  # for aligned rows
    side = math.isqrt(max(elements, 1))
    broad = part(padded, min(max(side, elements // rows), BROADEST), tile.columns)
    return part(rows, max(elements // broad, 1), tile.rows), broad


def _panels(rows: int, columns: int, shape: tuple[int, int], kept: int = 0) -> Iterator[tuple[slice, slice]]:
    tall, broad = shape
    for r in (*spans(kept, tall), *spans(rows, tall, kept)):
        for c in spans(columns, broad):
            yield r, c


def _takes(image: Tensor, text: Tensor) -> bool:
    return image.dtype != torch.float64 and min(*image.shape, *text.shape) > 0


def _size(part: slice) -> int:
    return part.stop - part.start


def _matrices(image: Tensor, text: Tensor) -> tuple[Any, ...]:
    return image, *image.stride(), text, *text.stride()


def _some(vector: Tensor, part: slice) -> Tensor | None:
    """A part of a vector, None for an empty vector, which stands for one that is not wanted."""
    return vector[part] if vector.numel() else None


def _add_product(sums: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """sums += left @ right, or = when it is the first. float32 sums of half types are made on CUDA only."""
    if left.dtype != sums.dtype and not sums.is_cuda:
        left, right = left.to(sums.dtype), right.to(sums.dtype)
    wider: dict[str, Any] = {} if left.dtype == sums.dtype else {"out_dtype": sums.dtype}
    if is_first:
        torch.mm(left, right, out=sums, **wider)
    else:
        torch.addmm(sums, left, right, out=sums, **wider)


def contrastive_pairs(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As the reference, with the bits that the tiles have; float64 goes there."""
    if not _takes(image, text):
        return reference.contrastive_pairs(image, text, logit_scale)
    tile, rows = configuration(image.dtype), image.shape[0]
    out = image.new_empty(rows, dtype=torch.float32)
    with on(image):
        kernels.pairs_kernel[(triton.cdiv(rows, tile.rows),)](
            *_matrices(image, text), logit_scale, out, rows, D=image.shape[1], **tile.arguments()
        )
    return out


def contrastive_statistics(
    image: Tensor, text: Tensor, logit_scale: Tensor, image_labels: Tensor, text_labels: Tensor, image_pairs: Tensor,
    text_pairs: Tensor, kept_rows: int, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 goes there."""
    if not _takes(image, text):
        return reference.contrastive_statistics(
            image, text, logit_scale, image_labels, text_labels, image_pairs, text_pairs, kept_rows, workspace_bytes
        )
    (n, width), num_texts = image.shape, text.shape[0]
    row_lse = image.new_empty(n, dtype=torch.float64)
    column_lse = image.new_empty(num_texts, dtype=torch.float64)
    positive = image.new_empty(n, dtype=torch.float64)
    image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
    kept = image.new_empty((kept_rows, num_texts), dtype=torch.float32)
    image_labels, text_labels, image_pairs, text_pairs = (
        vector.contiguous() for vector in (image_labels, text_labels, image_pairs, text_pairs)
    )
    is_ranked = bool(image_pairs.numel() or text_pairs.numel())
    source, tile = _source(image, "" if kept_rows else "statistics", is_ranked)
    partial = 12 / tile.columns + 8 / tile.rows
    shape = panel_shape(n, num_texts, int(workspace_bytes / (partial + (4 if source == "product" else 0))), tile)
    tall, broad = (-(-side // block) for side, block in zip(shape, tile, strict=False))
    partials = image.new_empty(3 * shape[0] * broad + 2 * shape[1] * tall, dtype=torch.float32)
    panel = image.new_empty(shape if source == "product" and kept_rows < n else (0, 0), dtype=torch.float32)
    with on(image):
        for r, c in _panels(n, num_texts, shape, kept_rows):
            is_kept = r.start < kept_rows
            logits = kept[r, c] if is_kept else panel[: _size(r), : _size(c)]
            if source == "product":
                torch.mm(image[r], text[c].T, out=logits)
            rows, columns = _size(r), _size(c)
            tall, broad = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
            row_partials, column_partials = partials, partials[3 * rows * broad :]
            kernels.statistics_kernel[(tall * broad,)](
                *_matrices(image[r], text[c]), logit_scale, logits if is_kept or source == "product" else None,
                logits.stride(0), image_labels[r], text_labels[c], _some(image_pairs, r), _some(text_pairs, c),
                _some(image_ranks, r), _some(text_ranks, c), row_partials, column_partials, rows, columns, D=width,
                GROUP=GROUP, SOURCE=source, STORE=is_kept, **tile.arguments(),
            )  # fmt: skip
            for of_rows, lse, sums, count, length, is_first in (
                (row_partials, row_lse[r], positive[r], broad, rows, c.start == 0),
                (column_partials, column_lse[c], None, tall, columns, r.start == 0),
            ):
                kernels.merge_kernel[(triton.cdiv(length, MERGED),)](
                    of_rows, lse, sums, count, length, BLOCK=MERGED, STEP=STEP, FIRST=is_first, num_warps=4, **UNFUSED
                )
    return row_lse, column_lse, positive, image_ranks, text_ranks, kept


def _source(image: Tensor, kernel: str, is_ranked: bool) -> tuple[str, Tile]:
    """Where the logits of a panel come from: half types multiply in the kernel. float32 leaves it to the library, which
    is several times faster at that, unless a pair's logit must have the bits it has in its tile."""
    if is_ranked:
        return "dot", configuration(image.dtype)
    if image.dtype == torch.float32:
        return "product", READ
    return "dot", configuration(image.dtype, kernel, architecture(image))


class _Gradients:
    """The sums of products of panels with features, which become the gradients of image and text."""

    def __init__(self, image: Tensor, text: Tensor, image_grad: bool, text_grad: bool) -> None:
        wide = wide_dtype(image.dtype)
        self.image, self.text = image, text
        self.of_image = image.new_empty(image.shape if image_grad else (0,), dtype=wide)
        self.of_text = text.new_empty(text.shape if text_grad else (0,), dtype=wide)

    def add(self, panel: Tensor, r: slice, c: slice) -> None:
        if self.of_image.numel():
            _add_product(self.of_image[r], panel, self.text[c], c.start == 0)
        if self.of_text.numel():
            _add_product(self.of_text[c], panel.T, self.image[r], r.start == 0)

    def finish(
        self, scale: Tensor, dtype: torch.dtype, factor: Tensor | None, constant: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of image and text in `dtype`, in place where that is the sums', and of the scale, float64."""
        block = 16
        dots = self.image.new_zeros(triton.cdiv(self.of_image.shape[0], block), dtype=torch.float64)
        finished = []
        for sums, features, of_scale in ((self.of_image, self.image, dots), (self.of_text, self.text, None)):
            out = sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)
            finished.append(out)
            if sums.numel():
                rows, width = sums.shape
                kernels.finish_kernel[(triton.cdiv(rows, block),)](
                    sums, features, *features.stride(), scale, factor, out, of_scale, rows, D=width, BLOCK_M=block,
                    BLOCK_N=128, FACTOR=constant, num_warps=4, **UNFUSED,
                )  # fmt: skip
        return finished[0], finished[1], dots.sum()


def contrastive_statistics_backward(
    image: Tensor, text: Tensor, logit_scale: Tensor, image_labels: Tensor, text_labels: Tensor, row_lse: Tensor,
    column_lse: Tensor, kept: Tensor, grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor,
    workspace_bytes: int, image_grad: bool, text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 goes there."""
    if not _takes(image, text):
        return reference.contrastive_statistics_backward(
            image, text, logit_scale, image_labels, text_labels, row_lse, column_lse, kept, grad_row, grad_column,
            grad_positive, workspace_bytes, image_grad, text_grad,
        )  # fmt: skip
    (n, width), num_texts = image.shape, text.shape[0]
    of_rows = [vector.contiguous() for vector in (image_labels, row_lse, grad_row, grad_positive)]
    of_columns = [vector.contiguous() for vector in (text_labels, column_lse, grad_column)]
    factor = _factor(grad_row, grad_column, grad_positive) if image.dtype == torch.float16 else None
    gradients = _Gradients(image, text, image_grad, text_grad)
    source, tile = _source(image, "gradient", False)
    shape = panel_shape(n, num_texts, workspace_bytes // image.dtype.itemsize, tile)
    panels = image.new_empty(shape)
    with on(image):
        for r, c in _panels(n, num_texts, shape, kept.shape[0]) if image_grad or text_grad else ():
            rows, columns = _size(r), _size(c)
            panel = panels[:rows, :columns]
            is_kept = r.start < kept.shape[0]
            if is_kept:
                logits = kept[r, c]
            else:
                logits = panel
                if source == "product":
                    torch.mm(image[r], text[c].T, out=panel)
            here = READ if is_kept else tile
            labels, lse, weight, extra = (vector[r] for vector in of_rows)
            other_labels, other_lse, other_weight = (vector[c] for vector in of_columns)
            kernels.gradient_kernel[(here.over(rows, columns),)](
                *_matrices(image[r], text[c]), logit_scale, logits, logits.stride(0), labels, other_labels,
                lse, other_lse, weight, other_weight, extra, factor, panel, panel.stride(0), rows, columns,
                D=width, GROUP=GROUP, SOURCE="kept" if is_kept else source, **here.arguments(),
            )  # fmt: skip
            gradients.add(panel, r, c)
        grad_image, grad_text, grad_scale = gradients.finish(logit_scale, image.dtype, factor)
    return grad_image, grad_text, grad_scale.to(logit_scale.dtype)


def _factor(*grads: Tensor) -> Tensor:
    """The power of two that brings the largest of some gradients to between 2^13 and 2^14, float32: sums of three are
    below 65,504, and 2^-38 of the largest is not yet lost."""
    largest = torch.stack([grad.abs().amax() for grad in grads]).amax().float()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), 14 - exponent)


def sigmoid_contrastive(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, image_labels: Tensor, text_labels: Tensor,
    image_pairs: Tensor, text_pairs: Tensor, workspace_bytes: int, image_grad: bool, text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 goes there."""
    if not _takes(image, text):
        return reference.sigmoid_contrastive(
            image, text, logit_scale, logit_bias, image_labels, text_labels, image_pairs, text_pairs, workspace_bytes,
            image_grad, text_grad,
        )  # fmt: skip
    (n, width), num_texts = image.shape, text.shape[0]
    image_ranks, text_ranks = (torch.zeros_like(pairs, dtype=torch.int32) for pairs in (image_pairs, text_pairs))
    image_labels, text_labels, image_pairs, text_pairs = (
        vector.contiguous() for vector in (image_labels, text_labels, image_pairs, text_pairs)
    )
    with_grads = image_grad or text_grad
    gradients = _Gradients(image, text, image_grad, text_grad)
    source, tile = _source(image, "", bool(image_pairs.numel() or text_pairs.numel()))
    holds = with_grads or source == "product"
    bytes_each = (image.dtype.itemsize if holds else 0) + 16 / (tile.rows * tile.columns)
    shape = panel_shape(n, num_texts, int(workspace_bytes / bytes_each), tile)
    panels = image.new_empty(shape if holds else (0, 0))
    sums = image.new_zeros(2, dtype=torch.float64)  # of the loss, and of its gradient by the logits
    parts = image.new_zeros(2, tile.over(*shape), dtype=torch.float64)
    constant = SIGMOID_FACTOR.get(image.dtype, 1.0)
    with on(image):
        for r, c in _panels(n, num_texts, shape):
            rows, columns = _size(r), _size(c)
            panel = panels[:rows, :columns]
            if source == "product":
                torch.mm(image[r], text[c].T, out=panel)
            programs = tile.over(rows, columns)
            part = parts.view(-1)[: 2 * programs].view(2, programs)
            kernels.sigmoid_kernel[(programs,)](
                *_matrices(image[r], text[c]), logit_scale, logit_bias, panel, panel.stride(0), image_labels[r],
                text_labels[c], _some(image_pairs, r), _some(text_pairs, c), _some(image_ranks, r),
                _some(text_ranks, c), part, panel if with_grads else None, panel.stride(0), rows, columns, D=width,
                GROUP=GROUP, SOURCE=source, FACTOR=constant, **tile.arguments(),
            )  # fmt: skip
            sums += part.sum(1)
            if with_grads:
                gradients.add(panel, r, c)
        grad_image, grad_text, grad_scale = gradients.finish(logit_scale, torch.float32, None, constant)
    grad_bias = sums[1] if image_grad else torch.zeros_like(sums[1])
    return sums[0].clone(), grad_image, grad_text, grad_scale, grad_bias.clone(), image_ranks, text_ranks
