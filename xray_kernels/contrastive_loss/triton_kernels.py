"""Triton kernels of the contrastive losses; `triton.py` launches them and tells the story.

All work on a panel, some rows by some columns of the logits, cut into tiles of BLOCK_M images by BLOCK_N texts.
Pointers come at the panel's first row and column, so that indices fit 32 bits; what is multiplied by a stride has 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("rows", "columns", "count", "length")
"""Arguments whose divisibility helps nothing: without specialisation one binary serves all of them."""


@triton.jit
def place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The tile of this program, as its row and column among tiles, and its rows of the panel.

    Programs that run together share GROUP tiles of images and few tiles of texts, which stay in L2.
    """
    tall = tl.cdiv(rows, BLOCK_M)
    broad = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * broad) * GROUP
    height = tl.minimum(tall - first, GROUP)
    within = pid % (GROUP * broad)
    i = first + within % height
    return i, within // height, i * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def product(
    image, image_row, image_column, text, text_row, text_column, scale, r, start, rows, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of logits. Every kernel has them from here, so that a pair has the same bits in all of them."""
    k = tl.arange(0, BLOCK_K)
    c = start + tl.arange(0, BLOCK_N)
    # rows past the last repeat it: no mask in the loop, and nobody uses what comes out
    a = image + tl.minimum(r, rows - 1).to(tl.int64)[:, None] * image_row + k.to(tl.int64)[None, :] * image_column
    b = text + tl.minimum(c, columns - 1).to(tl.int64)[:, None] * text_row + k.to(tl.int64)[None, :] * text_column
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            left = tl.load(a)
            right = tl.load(b)
        else:
            inside = (k < D - done)[None, :]
            left = tl.load(a, mask=inside, other=0.0)
            right = tl.load(b, mask=inside, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        a += BLOCK_K * image_column
        b += BLOCK_K * text_column
    return acc * tl.load(scale).to(tl.float32)


@triton.jit
def halves(tile):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(tile):
    """A tile in four parts side by side. What follows a product is done to one after the other: what it needs for all
    at once would not fit into registers."""
    left, right = halves(tile)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def read(logits, logits_row, scale, r, c, rows, columns, SOURCE: tl.constexpr):
    """A tile of logits that lie in memory: as they are ("kept") or without their scale ("product")."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    tile = tl.load(logits + r.to(tl.int64)[:, None] * logits_row + c[None, :], mask=inside, other=0.0)
    if SOURCE == "product":
        tile *= tl.load(scale).to(tl.float32)
    return tile


@triton.jit
def positives_of(image_labels, text_labels, r, c, rows, columns, inside):
    """Which pairs of a tile belong together."""
    of_rows = tl.load(image_labels + r, mask=r < rows, other=0)
    of_columns = tl.load(text_labels + c, mask=c < columns, other=0)
    return (of_rows[:, None] == of_columns[None, :]) & inside


@triton.jit
def count_ranks(logits, rivals, image_pairs, text_pairs, image_ranks, text_ranks, r, c, rows, columns):
    """Add a tile's part to the ranks. Sums of integers are the same in any order."""
    if image_pairs is not None:
        pair = tl.load(image_pairs + r, mask=r < rows, other=0.0)
        found = tl.sum(((logits >= pair[:, None]) & rivals).to(tl.int32), 1)
        tl.atomic_add(image_ranks + r, found, mask=r < rows, sem="relaxed")
    if text_pairs is not None:
        pair = tl.load(text_pairs + c, mask=c < columns, other=0.0)
        found = tl.sum(((logits >= pair[None, :]) & rivals).to(tl.int32), 0)
        tl.atomic_add(text_ranks + c, found, mask=c < columns, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    image, image_row, image_column, text, text_row, text_column, scale, out, rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The diagonal of the logits, from tiles like any other's."""
    start = tl.program_id(0) * BLOCK_M
    r = start + tl.arange(0, BLOCK_M)
    c = start + tl.arange(0, BLOCK_N)
    logits = product(
        image, image_row, image_column, text, text_row, text_column, scale, r, start, rows, rows,
        D, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(out + r, tl.sum(tl.where(r[:, None] == c[None, :], logits, 0.0), 1), mask=r < rows)


@triton.jit
def statistics_of(
    tile, logits, panel_row, image_labels, text_labels, image_pairs, text_pairs, image_ranks, text_ranks,
    column_partials, i, r, c, rows, columns, BLOCK_M: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """What `statistics_kernel` does with some logits. Of rows it returns the largest, the sum of exponentials beside
    it, and the sum of positives."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if STORE:
        tl.store(logits + r.to(tl.int64)[:, None] * panel_row + c[None, :], tile, mask=inside)
    positive = positives_of(image_labels, text_labels, r, c, rows, columns, inside)
    count_ranks(tile, inside & (positive == 0), image_pairs, text_pairs, image_ranks, text_ranks, r, c, rows, columns)
    found = tl.sum(tl.where(positive, tile, 0.0), 1)
    tile = tl.where(inside, tile, float("-inf"))
    top = tl.where(c < columns, tl.max(tile, 0), 0.0)
    total = tl.sum(tl.exp(tile - top[None, :]), 0)
    at = column_partials + i.to(tl.int64) * columns + c
    tl.store(at, top, mask=c < columns)
    tl.store(at + tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns, total, mask=c < columns)
    top = tl.max(tile, 1)
    # a row of nothing, past the last row or in a half past the last column, has sum 0
    total = tl.sum(tl.exp(tile - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
    return top, total, found


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    image, image_row, image_column, text, text_row, text_column, scale, logits, panel_row, image_labels, text_labels,
    image_pairs, text_pairs, image_ranks, text_ranks, row_partials, column_partials, rows, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SOURCE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Of one tile, the largest logit and the sum of exponentials beside it for each row and column, the sum of the
    positives for each row; its part of the ranks; and its logits, where they are kept."""
    i, j, r = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if SOURCE == "dot":
        tile = product(
            image, image_row, image_column, text, text_row, text_column, scale, r, j * BLOCK_N, rows, columns,
            D, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = quarters(tile)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        found = tl.zeros([BLOCK_M], tl.float32)
        for q in tl.static_range(4):
            c = j * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            part_top, part_total, part_found = statistics_of(
                parts[q], logits, panel_row, image_labels, text_labels, image_pairs, text_pairs, image_ranks,
                text_ranks, column_partials, i, r, c, rows, columns, BLOCK_M, STORE,
            )  # fmt: skip
            larger = tl.maximum(top, part_top)
            # rows past the last have no logits at all
            peak = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(top - peak) + part_total * tl.exp(part_top - peak)
            top = larger
            found += part_found
    else:
        c = j * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = read(logits, panel_row, scale, r, c, rows, columns, SOURCE)
        top, total, found = statistics_of(
            tile, logits, panel_row, image_labels, text_labels, image_pairs, text_pairs, image_ranks, text_ranks,
            column_partials, i, r, c, rows, columns, BLOCK_M, STORE,
        )  # fmt: skip
    at = row_partials + j.to(tl.int64) * rows + r
    part = tl.cdiv(columns, BLOCK_N).to(tl.int64) * rows
    tl.store(at, top, mask=r < rows)
    tl.store(at + part, total, mask=r < rows)
    tl.store(at + 2 * part, found, mask=r < rows)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partials, lse, positive, count, length, BLOCK: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Log-sum-exps from `count` partial ones each, in float64; and sums of positives from their parts, when wanted.

    FIRST: there is nothing from panels before this one.
    """
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    part = count.to(tl.int64) * length
    partials += step.to(tl.int64)[:, None] * length + x[None, :]
    at = partials
    top = tl.full([STEP, BLOCK], float("-inf"), tl.float32)
    for start in range(0, count, STEP):
        inside = (step < count - start)[:, None] & (x < length)[None, :]
        top = tl.maximum(top, tl.load(at, mask=inside, other=float("-inf")))
        at += STEP * length.to(tl.int64)
    peak = tl.where(x < length, tl.max(top, 0), 0.0)
    at = partials
    total = tl.zeros([STEP, BLOCK], tl.float64)
    found = tl.zeros([STEP, BLOCK], tl.float64)
    for start in range(0, count, STEP):
        inside = (step < count - start)[:, None] & (x < length)[None, :]
        shrink = tl.exp(tl.load(at, mask=inside, other=float("-inf")) - peak[None, :])
        total += (tl.load(at + part, mask=inside, other=0.0) * shrink).to(tl.float64)
        if positive is not None:
            found += tl.load(at + 2 * part, mask=inside, other=0.0).to(tl.float64)
        at += STEP * length.to(tl.int64)
    result = peak.to(tl.float64) + tl.log(tl.where(x < length, tl.sum(total, 0), 1.0))
    sums = tl.sum(found, 0)
    if not FIRST:
        before = tl.load(lse + x, mask=x < length, other=0.0)
        larger = tl.maximum(before, result)
        result = larger + tl.log(tl.exp(before - larger) + tl.exp(result - larger))
        if positive is not None:
            sums += tl.load(positive + x, mask=x < length, other=0.0)
    tl.store(lse + x, result, mask=x < length)
    if positive is not None:
        tl.store(positive + x, sums, mask=x < length)


@triton.jit
def softmax_part(tile, lse, weight):
    """weight * exp(tile - lse); the float64 lse is split in two numbers so that none of it is lost."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    return tl.exp(tile - high - low) * weight


@triton.jit
def gradient_of(
    tile, image_labels, text_labels, row_lse, column_lse, grad_row, grad_column, grad_positive, factor, panel,
    panel_row, first, r, c, rows, columns,
):  # fmt: skip
    """Write the gradient of some logits to the panel."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    unit = 1.0
    if factor is not None:
        unit = tl.load(factor)
    weight = tl.load(grad_row + r, mask=r < rows, other=0.0).to(tl.float32) * unit
    lse = tl.load(row_lse + r, mask=r < rows, other=0.0)
    grad = softmax_part(tile, lse[:, None], weight[:, None])
    weight = tl.load(grad_column + c, mask=c < columns, other=0.0).to(tl.float32) * unit
    lse = tl.load(column_lse + c, mask=c < columns, other=0.0)
    grad += softmax_part(tile, lse[None, :], weight[None, :])
    positive = positives_of(image_labels, text_labels, r, c, rows, columns, inside)
    weight = tl.load(grad_positive + r, mask=r < rows, other=0.0).to(tl.float32) * unit
    grad += tl.where(positive, weight[:, None], 0.0)
    at = panel + first.to(tl.int64) * panel_row  # and offsets of 32 bits from there, which take fewer registers
    tl.store(at + ((r - first)[:, None] * panel_row + c[None, :]), grad.to(panel.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    image, image_row, image_column, text, text_row, text_column, scale, logits, logits_row, image_labels, text_labels,
    row_lse, column_lse, grad_row, grad_column, grad_positive, factor, panel, panel_row, rows, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the logits, times `factor` where there is one, into the panel."""
    i, j, r = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if SOURCE == "dot":
        tile = product(
            image, image_row, image_column, text, text_row, text_column, scale, r, j * BLOCK_N, rows, columns,
            D, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = quarters(tile)
        for q in tl.static_range(4):
            c = j * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            gradient_of(
                parts[q], image_labels, text_labels, row_lse, column_lse, grad_row, grad_column, grad_positive, factor,
                panel, panel_row, i * BLOCK_M, r, c, rows, columns,
            )  # fmt: skip
    else:
        c = j * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = read(logits, logits_row, scale, r, c, rows, columns, SOURCE)
        gradient_of(
            tile, image_labels, text_labels, row_lse, column_lse, grad_row, grad_column, grad_positive, factor, panel,
            panel_row, i * BLOCK_M, r, c, rows, columns,
        )  # fmt: skip


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1, within 2e-7 of itself however small e is: e times the polynomial of degree 9 through
    log(1 + e) / e at Chebyshev's points. The logarithm of 1 + e would lose all logits below -17 or so."""
    y = e * -0.003176057013 + 0.01954252832
    y = tl.fma(e, y, -0.05637361482)
    y = tl.fma(e, y, 0.1054362357)
    y = tl.fma(e, y, -0.1526966691)
    y = tl.fma(e, y, 0.1966327429)
    y = tl.fma(e, y, -0.2495161593)
    y = tl.fma(e, y, 0.3332971036)
    y = tl.fma(e, y, -0.4999989271)
    y = tl.fma(e, y, 1)
    return e * y


@triton.jit
def sigmoid_of(
    tile, bias, image_labels, text_labels, image_pairs, text_pairs, image_ranks, text_ranks, panel, panel_row,
    r, c, rows, columns, FACTOR: tl.constexpr,
):  # fmt: skip
    """Sums over rows of the loss of some logits, and of its gradient, which goes to the panel, where there is one."""
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    positive = positives_of(image_labels, text_labels, r, c, rows, columns, inside)
    count_ranks(tile, inside & (positive == 0), image_pairs, text_pairs, image_ranks, text_ranks, r, c, rows, columns)
    # with x = -z (S + bias), the loss is log(1 + exp x) and its gradient -z / (1 + exp -x)
    x = tile + tl.load(bias).to(tl.float32)
    x = tl.where(positive, -x, x)
    e = tl.exp(-tl.abs(x))
    loss = tl.where(inside, tl.maximum(x, 0.0) + log1p(e), 0.0)
    loss = tl.sum(loss, 1).to(tl.float64)
    slope = tl.zeros_like(loss)
    if panel is not None:
        grad = tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
        grad = tl.where(positive, -grad, grad)
        slope = tl.sum(tl.where(inside, grad, 0.0), 1).to(tl.float64)
        at = panel + r.to(tl.int64)[:, None] * panel_row + c[None, :]
        tl.store(at, (grad * FACTOR).to(panel.dtype.element_ty), mask=inside)
    return loss, slope


@triton.jit(do_not_specialize=SIZES)
def sigmoid_kernel(
    image, image_row, image_column, text, text_row, text_column, scale, bias, logits, logits_row, image_labels,
    text_labels, image_pairs, text_pairs, image_ranks, text_ranks, sums, panel, panel_row, rows, columns,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SOURCE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Of one tile, the sums of the loss and of its gradient by the logits; its part of the ranks; and that gradient,
    times FACTOR, into the panel, where there is one."""
    _, j, r = place(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    if SOURCE == "dot":
        tile = product(
            image, image_row, image_column, text, text_row, text_column, scale, r, j * BLOCK_N, rows, columns,
            D, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = quarters(tile)
        loss = tl.zeros([BLOCK_M], tl.float64)
        slope = tl.zeros([BLOCK_M], tl.float64)
        for q in tl.static_range(4):
            c = j * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            part_loss, part_slope = sigmoid_of(
                parts[q], bias, image_labels, text_labels, image_pairs, text_pairs, image_ranks, text_ranks, panel,
                panel_row, r, c, rows, columns, FACTOR,
            )  # fmt: skip
            loss += part_loss
            slope += part_slope
    else:
        c = j * BLOCK_N + tl.arange(0, BLOCK_N)
        tile = read(logits, logits_row, scale, r, c, rows, columns, SOURCE)
        loss, slope = sigmoid_of(
            tile, bias, image_labels, text_labels, image_pairs, text_pairs, image_ranks, text_ranks, panel, panel_row,
            r, c, rows, columns, FACTOR,
        )  # fmt: skip
    tl.store(sums + tl.program_id(0), tl.sum(loss, 0))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(slope, 0))


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    sums, features, features_row, features_column, scale, factor, out, dots, rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Gradients of some rows of features from the sums of products with panels; and sum(sums * features) over these
    rows, a part of the scale's gradient, when wanted."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = 1.0 / FACTOR
    if factor is not None:
        unit = 1.0 / tl.load(factor)
    weight = tl.load(scale).to(tl.float32) * unit
    dot = tl.zeros([BLOCK_M], tl.float64)
    for start in range(0, D, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        inside = (r < rows)[:, None] & (c < D)[None, :]
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        values = tl.load(sums + at, mask=inside, other=0.0)
        if dots is not None:
            x = r.to(tl.int64)[:, None] * features_row + c.to(tl.int64)[None, :] * features_column
            x = tl.load(features + x, mask=inside, other=0.0).to(tl.float32)
            dot += tl.sum(values * x, 1).to(tl.float64)
        tl.store(out + at, (values * weight).to(out.dtype.element_ty), mask=inside)
    if dots is not None:
        tl.store(dots + tl.program_id(0), tl.sum(dot, 0) * unit)
