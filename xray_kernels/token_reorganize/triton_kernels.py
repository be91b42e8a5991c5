"""Triton kernels of token reorganisation; `triton.py` beside this launches them and tells the whole story.

Strides come in elements; offsets are 64-bit wherever a tensor may pass 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("candidates", "keep", "prefix", "score_batch")
"""Arguments whose divisibility helps nothing: without specialisation one binary serves all of them."""


@triton.jit
def _words(scores, stride, index, count):
    """Words whose signed order is descending score, then ascending index; NaN highest, -0 as 0, the absent lowest."""
    here = (index >= 0) & (index < count)
    score = tl.load(scores + index.to(tl.int64) * stride, mask=here, other=0.0)
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, key)
    key = tl.where(here, key, -2147483648)
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _count_above(words, scores, stride, first, last, count, WIDTH: tl.constexpr):
    """For each of `words`, how many words of the scores [first, last) are above it."""
    above = tl.zeros([words.shape[0]], tl.int32)
    for start in range(first, last, WIDTH):
        others = _words(scores, stride, start + tl.arange(0, WIDTH), count)
        above += tl.sum((others[None, :] > words[:, None]).to(tl.int32), 1)
    return above


@triton.jit(do_not_specialize=[*SIZES, "tile"])
def rank_kernel(
    scores, score_batch, score_stride, order, indices, words, candidates, keep, tile,
    TILED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Places of ROWS candidates within their tile; TILED writes sorted tiles, otherwise the one tile is the result."""
    blocks = tl.cdiv(candidates, tile) * tile // ROWS
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    index = pid % blocks * ROWS + tl.arange(0, ROWS)
    first = pid % blocks * ROWS // tile * tile
    scores += batch * score_batch
    own = _words(scores, score_stride, index, candidates)
    place = _count_above(own, scores, score_stride, first, first + tile, candidates, WIDTH)
    if TILED:
        tl.store(words + batch * blocks * ROWS + first + place, own)
    else:
        here = index < candidates
        tl.store(order + batch * candidates + place, index, mask=here)
        tl.store(indices + batch * keep + place, index.to(tl.int64), mask=here & (place < keep))


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def merge_kernel(
    scores, score_batch, score_stride, order, indices, words, candidates, keep, tiles,
    ROWS: tl.constexpr, SEARCHED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Places of ROWS candidates among all: a binary search in every sorted tile, SEARCHED tiles side by side."""
    blocks = tl.cdiv(candidates, ROWS)
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    index = pid % blocks * ROWS + tl.arange(0, ROWS)
    own = _words(scores + batch * score_batch, score_stride, index, candidates)[:, None]
    place = tl.zeros([ROWS], tl.int32)
    for start in range(0, tiles, SEARCHED):
        tile = start + tl.arange(0, SEARCHED)
        here = (tile < tiles)[None, :] & (index < candidates)[:, None]
        base = words + (batch * tiles + tile) * WIDTH
        above = tl.zeros([ROWS, SEARCHED], tl.int32)
        for level in tl.static_range(8):
            step = WIDTH // 2 >> level
            probe = tl.load(base[None, :] + above + (step - 1), mask=here, other=0)
            above += tl.where(probe > own, step, 0)
        probe = tl.load(base[None, :] + above, mask=here, other=0)
        above += (probe > own).to(tl.int32)
        place += tl.sum(tl.where(here, above, 0), 1)
    tl.store(order + batch * candidates + place, index, mask=index < candidates)
    tl.store(indices + batch * keep + place, index.to(tl.int64), mask=(index < candidates) & (place < keep))


@triton.jit
def _load_rows(
    tokens, token_row, token_channel, update, update_row, update_channel, rows, channel, mask, ADD: tl.constexpr
):
    """Rows of tokens, or of tokens + update rounded to their dtype."""
    at = channel[None, :].to(tl.int64)
    values = tl.load(tokens + rows[:, None] * token_row + at * token_channel, mask=mask, other=0.0)
    if ADD:
        more = tl.load(update + rows[:, None] * update_row + at * update_channel, mask=mask, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
    return values


@triton.jit
def _unit(rows, inside, eps, CHANNELS: tl.constexpr):
    """Rows less their mean over their standard deviation, and its inverse; `inside` marks the real channels."""
    mean = tl.sum(rows, 1) / CHANNELS
    centred = tl.where(inside[None, :], rows - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _store_norm(normed, at, rows, weight, bias, channel, mask, eps, CHANNELS: tl.constexpr):
    """LayerNorm of `rows` as they were stored."""
    inside = channel < CHANNELS
    unit, _ = _unit(rows.to(tl.float32), inside, eps, CHANNELS)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (unit * scale[None, :] + shift[None, :]).to(rows.dtype), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "fused_programs", "copy_parts", "out_rows", "eps"])
def move_kernel(
    tokens, token_batch, token_row, token_channel, update, update_batch, update_row, update_channel,
    scores, score_batch, score_stride, out, normed, indices, order, weight, bias, eps,
    candidates, keep, prefix, out_rows, fused_programs, copy_parts,
    CHANNELS: tl.constexpr, NORM: tl.constexpr, RANKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    FUSED_ROWS: tl.constexpr, FUSED_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Kept and prefix rows to their places; in the first `fused_programs`, FUSED_C channels of a fused token each.

    RANKED: `order` lists all candidates by rank. Otherwise ranks are counted here, and `order` is scratch.
    NORM: tokens + update, and LayerNorm after it, of the fused token only when FUSED_C holds all channels.
    """
    pid = tl.program_id(0)
    if pid < fused_programs:
        parts: tl.constexpr = (CHANNELS + FUSED_C - 1) // FUSED_C
        batch = (pid // parts).to(tl.int64)
        scores += batch * score_batch
        order += batch * candidates
        tokens += batch * token_batch
        if NORM:
            update += batch * update_batch
        if not RANKED:
            for start in range(0, candidates, 16):
                index = start + tl.arange(0, 16)
                own = _words(scores, score_stride, index, candidates)
                place = _count_above(own, scores, score_stride, 0, candidates, candidates, WIDTH)
                tl.store(order + place, index, mask=index < candidates)
            tl.debug_barrier()
        channel = pid % parts * FUSED_C + tl.arange(0, FUSED_C)
        inside = channel < CHANNELS
        total = tl.zeros([FUSED_ROWS, FUSED_C], tl.float32)
        for start in range(keep, candidates, FUSED_ROWS):
            place = start + tl.arange(0, FUSED_ROWS)
            here = place < candidates
            index = tl.load(order + place, mask=here, other=0).to(tl.int64)
            share = tl.load(scores + index * score_stride, mask=here, other=0.0).to(tl.float32)
            rows = _load_rows(
                tokens, token_row, token_channel, update, update_row, update_channel,
                index + prefix, channel, here[:, None] & inside[None, :], NORM,
            )  # fmt: skip
            total += share[:, None] * rows.to(tl.float32)
        fused = tl.sum(total, 0)[None, :].to(out.dtype.element_ty)
        at = (batch * out_rows + out_rows - 1) * CHANNELS + channel[None, :]
        tl.store(out + at, fused, mask=inside[None, :])
        if NORM and FUSED_C >= CHANNELS:
            _store_norm(normed, at, fused, weight, bias, channel, inside[None, :], eps, CHANNELS)
    else:
        pid -= fused_programs
        batch = (pid // copy_parts).to(tl.int64)
        row = pid % copy_parts * ROWS + tl.arange(0, ROWS)
        scores += batch * score_batch
        tokens += batch * token_batch
        if NORM:
            update += batch * update_batch
        if RANKED:
            target = row
            here = row < prefix + keep
            listed = here & (row >= prefix)
            source = tl.load(order + batch * candidates + row - prefix, mask=listed, other=0) + prefix
            source = tl.where(row < prefix, row, source)
        else:
            source = row
            index = row - prefix
            own = _words(scores, score_stride, index, candidates)
            place = _count_above(own, scores, score_stride, 0, candidates, candidates, WIDTH)
            kept = (index >= 0) & (index < candidates) & (place < keep)
            here = (index < 0) | kept
            target = tl.where(index < 0, row, prefix + place)
            tl.store(indices + batch * keep + place, index.to(tl.int64), mask=kept)
        source, target = source.to(tl.int64), target.to(tl.int64)
        for start in range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            mask = here[:, None] & (channel < CHANNELS)[None, :]
            rows = _load_rows(
                tokens, token_row, token_channel, update, update_row, update_channel, source, channel, mask, NORM
            )
            at = (batch * out_rows + target)[:, None] * CHANNELS + channel[None, :]
            tl.store(out + at, rows, mask=mask)
            if NORM:
                _store_norm(normed, at, rows, weight, bias, channel, mask, eps, CHANNELS)


@triton.jit(do_not_specialize=["out_rows", "eps"])
def norm_kernel(out, normed, weight, bias, out_rows, eps, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of the last row, the fused token, of one sample."""
    channel = tl.arange(0, BLOCK_C)
    inside = (channel < CHANNELS)[None, :]
    at = ((tl.program_id(0) + 1).to(tl.int64) * out_rows - 1) * CHANNELS + channel[None, :]
    rows = tl.load(out + at, mask=inside, other=0.0)
    _store_norm(normed, at, rows, weight, bias, channel, inside, eps, CHANNELS)


@triton.jit(do_not_specialize=["candidates", "keep"])
def place_kernel(indices, place, candidates, keep, WIDTH: tl.constexpr):
    """Inverse of the indices of one sample: each candidate's place among the kept, or -1."""
    batch = tl.program_id(0).to(tl.int64)
    for start in range(0, candidates, WIDTH):
        index = start + tl.arange(0, WIDTH)
        tl.store(place + batch * candidates + index, tl.full([WIDTH], -1, tl.int32), mask=index < candidates)
    tl.debug_barrier()
    for start in range(0, keep, WIDTH):
        at = start + tl.arange(0, WIDTH)
        index = tl.load(indices + batch * keep + at, mask=at < keep, other=-1)
        tl.store(place + batch * candidates + index, at, mask=(index >= 0) & (index < candidates))


@triton.jit
def _find(indices, place, index, candidates, keep, batch, PLACED: tl.constexpr, WIDTH: tl.constexpr):
    """The place of each candidate among the kept, or -1: from the inverse, or by looking through the indices."""
    if PLACED:
        here = (index >= 0) & (index < candidates)
        found = tl.load(place + batch * candidates + index, mask=here, other=-1)
    else:
        at = tl.arange(0, WIDTH)
        kept = tl.load(indices + batch * keep + at, mask=at < keep, other=0x7FFFFFFF).to(tl.int32)
        found = tl.max(tl.where(kept[None, :] == index[:, None], at[None, :], -1), 1)
    return found


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def backward_kernel(
    grad, grad_batch, grad_row, grad_channel, tokens, token_batch, token_row, token_channel,
    scores, score_batch, score_stride, indices, place, grad_tokens, grad_scores, candidates, keep, prefix, parts,
    CHANNELS: tl.constexpr, FUSE: tl.constexpr, PLACED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the tokens' gradient, and their scores'."""
    pid = tl.program_id(0)
    batch = (pid // parts).to(tl.int64)
    row = pid % parts * ROWS + tl.arange(0, ROWS)
    index = row - prefix
    found = _find(indices, place, index, candidates, keep, batch, PLACED, WIDTH)
    copied = (index < 0) | (found >= 0)
    dropped = (index < candidates) & (found < 0) & (index >= 0)
    source = tl.where(index < 0, row, prefix + found).to(tl.int64)
    share = tl.load(scores + batch * score_batch + index.to(tl.int64) * score_stride, mask=dropped, other=0.0)
    share = share.to(tl.float32)[:, None]
    dot = tl.zeros([ROWS], tl.float32)
    grad += batch * grad_batch
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = channel < CHANNELS
        at = channel.to(tl.int64)
        values = tl.load(
            grad + source[:, None] * grad_row + at[None, :] * grad_channel,
            mask=copied[:, None] & inside[None, :],
            other=0.0,
        )
        if FUSE:
            last = (prefix + keep).to(tl.int64)
            fused = tl.load(grad + last * grad_row + at * grad_channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            rows = tl.load(
                tokens + batch * token_batch + row.to(tl.int64)[:, None] * token_row + at[None, :] * token_channel,
                mask=dropped[:, None] & inside[None, :],
                other=0.0,
            )
            dot += tl.sum(rows.to(tl.float32) * fused, 1)
            values = tl.where(dropped[:, None], (share * fused).to(values.dtype), values)
        to = (batch * (prefix + candidates) + row)[:, None] * CHANNELS + channel[None, :]
        tl.store(grad_tokens + to, values, mask=(index < candidates)[:, None] & inside[None, :])
    dot = tl.where(dropped, dot, 0.0).to(grad_scores.dtype.element_ty)
    tl.store(grad_scores + batch * candidates + index, dot, mask=(index >= 0) & (index < candidates))


@triton.jit
def _norm_gradient(
    grad_stream, stream_row, stream_channel, grad_normed, normed_row, normed_channel, stream, rows, here,
    channel, weight, eps, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of rows before LayerNorm, rounded to their dtype; and those rows' terms of weight's and bias's."""
    inside = channel < CHANNELS
    mask = here[:, None] & inside[None, :]
    at = channel[None, :].to(tl.int64)
    values = tl.load(stream + rows[:, None] * CHANNELS + at, mask=mask, other=0.0)
    direct = tl.load(grad_stream + rows[:, None] * stream_row + at * stream_channel, mask=mask, other=0.0)
    through = tl.load(grad_normed + rows[:, None] * normed_row + at * normed_channel, mask=mask, other=0.0)
    through = through.to(tl.float32)
    unit, inverse = _unit(values.to(tl.float32), inside, eps, CHANNELS)
    scaled = through * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(scaled, 1)[:, None] / CHANNELS
    along = tl.sum(scaled * unit, 1)[:, None] / CHANNELS
    grad = direct.to(tl.float32) + inverse[:, None] * (scaled - mean - unit * along)
    return grad.to(values.dtype), tl.sum(tl.where(mask, through * unit, 0.0), 0), tl.sum(through, 0)


@triton.jit(do_not_specialize=[*SIZES, "samples", "split_rows", "eps"])
def norm_backward_kernel(
    grad_stream, stream_batch, stream_row, stream_channel, grad_normed, normed_batch, normed_row, normed_channel,
    residual, residual_batch, residual_row, residual_channel, update, update_batch, update_row, update_channel,
    scores, score_batch, score_stride, indices, place, stream, weight, grad_tokens, grad_scores, partial, eps,
    candidates, keep, prefix, samples, split_rows,
    CHANNELS: tl.constexpr, FUSE: tl.constexpr, PLACED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """`split_rows` token rows of every n-th sample: their gradients, their scores', and sums for weight and bias."""
    split = tl.program_id(0)
    length = prefix + candidates
    out_rows = prefix + keep + FUSE
    channel = tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    weight_sum = tl.zeros([BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_C], tl.float32)
    for sample in range(tl.program_id(1), samples, tl.num_programs(1)):
        batch = tl.cast(sample, tl.int64)
        grads = grad_stream + batch * stream_batch
        grads_normed = grad_normed + batch * normed_batch
        rows_out = stream + batch * out_rows * CHANNELS
        if FUSE:
            last = tl.full([1], 0, tl.int64) + (out_rows - 1)
            fused, for_weight, for_bias = _norm_gradient(
                grads, stream_row, stream_channel, grads_normed, normed_row, normed_channel,
                rows_out, last, last >= 0, channel, weight, eps, CHANNELS,
            )  # fmt: skip
            fused = fused.to(tl.float32)
            weight_sum += tl.where(split == 0, for_weight, 0.0)
            bias_sum += tl.where(split == 0, for_bias, 0.0)
        for start in range(split * split_rows, min(split * split_rows + split_rows, length), ROWS):
            row = start + tl.arange(0, ROWS)
            index = row - prefix
            found = _find(indices, place, index, candidates, keep, batch, PLACED, WIDTH)
            copied = (index < 0) | (found >= 0)
            dropped = (index >= 0) & (index < candidates) & (found < 0)
            source = tl.where(index < 0, row, prefix + found).to(tl.int64)
            values, for_weight, for_bias = _norm_gradient(
                grads, stream_row, stream_channel, grads_normed, normed_row, normed_channel,
                rows_out, source, copied, channel, weight, eps, CHANNELS,
            )  # fmt: skip
            weight_sum += for_weight
            bias_sum += for_bias
            dot = tl.zeros([ROWS], tl.float32)
            if FUSE:
                share = tl.load(
                    scores + batch * score_batch + index.to(tl.int64) * score_stride, mask=dropped, other=0.0
                ).to(tl.float32)
                tokens = _load_rows(
                    residual + batch * residual_batch, residual_row, residual_channel,
                    update + batch * update_batch, update_row, update_channel,
                    row.to(tl.int64), channel, dropped[:, None] & inside[None, :], True,
                )  # fmt: skip
                dot += tl.sum(tokens.to(tl.float32) * fused, 1)
                values = tl.where(copied[:, None], values, (share[:, None] * fused).to(values.dtype))
            else:
                values = tl.where(copied[:, None], values, 0.0)
            at = (batch * length + row)[:, None] * CHANNELS + channel[None, :]
            tl.store(grad_tokens + at, values, mask=(row < length)[:, None] & inside[None, :])
            dot = tl.where(dropped, dot, 0.0).to(grad_scores.dtype.element_ty)
            tl.store(grad_scores + batch * candidates + index, dot, mask=(index >= 0) & (index < candidates))
    program = tl.program_id(1) * tl.num_programs(0) + split
    sums = partial + program.to(tl.int64) * 2 * CHANNELS + channel
    tl.store(sums, weight_sum, mask=inside)
    tl.store(sums + CHANNELS, bias_sum, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(
    partial, grad_weight, grad_bias, programs, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums of the programs' partial sums in a fixed order: weight's channels, then bias's."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < 2 * CHANNELS)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * (2 * CHANNELS) + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, 0).to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + column, result, mask=column < CHANNELS)
    tl.store(grad_bias + column - CHANNELS, result, mask=(column >= CHANNELS) & (column < 2 * CHANNELS))
