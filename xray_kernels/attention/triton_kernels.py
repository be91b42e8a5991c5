"""Triton kernels of attention, forward, and what the backward shares; `triton.py` launches them and tells the story.

Strides come in elements, or in units of 8 elements (see `scaled`); offsets are 64-bit wherever a tensor may pass 2^31
elements. A head of D channels is two blocks side by side, WIDTH and, when REST > 0, REST columns: 80 is 64 + 16, where
padding to 128 would waste 3/8.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = ("heads", "queries", "keys", "tiles", "half")
"""Arguments whose divisibility helps nothing: without specialisation one binary serves all of them."""


@triton.jit
def sequence_of(batch, queries, keys, key_lengths, cu_seqlens):
    """Of a row of the batch or a packed sequence: the row to index the batch by, first token, queries, keys seen."""
    row = batch.to(tl.int64)
    first = row * 0
    length = queries
    limit = keys
    if cu_seqlens is not None:
        row = first
        bounds = cu_seqlens + batch
        first = tl.minimum(tl.maximum(tl.load(bounds).to(tl.int64), 0), queries)
        last = tl.minimum(tl.maximum(tl.load(bounds + 1).to(tl.int64), first), queries)
        length = (last - first).to(tl.int32)
        limit = length
    if key_lengths is not None:
        limit = tl.minimum(tl.maximum(tl.load(key_lengths + batch).to(tl.int64), 0), keys).to(tl.int32)
    return row, first, length, limit


@triton.jit
def scaled(offset, EIGHT: tl.constexpr):
    """An offset in elements from one by strides; EIGHT: which count 8 elements, so that loads can be vectors."""
    return offset * 8 if EIGHT else offset


@triton.jit
def head_of(tensor, row, head, first, batch_stride, head_stride, row_stride, EIGHT: tl.constexpr):
    """Where one sequence of one head starts."""
    return tensor + scaled(row * batch_stride + head.to(tl.int64) * head_stride + first * row_stride, EIGHT)


@triton.jit
def tile_of(
    tensor, rows, count, row_stride, column_stride,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """WIDTH columns, from FIRST, of some rows of one head; 0 past the last row or column."""
    columns = FIRST + tl.arange(0, WIDTH)
    offset = scaled(rows.to(tl.int64) * row_stride, EIGHT)
    mask = (rows < count)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(tensor + offset[:, None] + columns[None, :].to(tl.int64) * column_stride, mask=mask, other=0.0)


@triton.jit
def rows_of(
    tensor, rows, count, row_stride, column_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Both blocks of some rows of one head; the second is the first again, and not used, when REST is 0."""
    main = tile_of(tensor, rows, count, row_stride, column_stride, HEAD_DIM, 0, WIDTH, EIGHT)
    rest = main
    if REST > 0:
        rest = tile_of(tensor, rows, count, row_stride, column_stride, HEAD_DIM, WIDTH, REST, EIGHT)
    return main, rest


@triton.jit
def store_tile(tensor, values, rows, count, row_stride, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr):
    """The counterpart of `tile_of` for a result, whose columns lie side by side."""
    columns = FIRST + tl.arange(0, values.shape[1])
    mask = (rows < count)[:, None]
    if FIRST + values.shape[1] > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    at = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(tensor + at, values.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def product(a, a_rest, b, b_rest, REST: tl.constexpr):
    """A B^T over both blocks of columns."""
    result = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        result = tl.dot(a_rest, tl.trans(b_rest), result, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=[*SIZES, "scale"])
def forward_kernel(
    query, query_batch, query_head, query_row, query_column, key, key_batch, key_head, key_row, key_column,
    value, value_batch, value_head, value_row, value_column, out, statistics, class_row, key_lengths, cu_seqlens,
    scale, heads, queries, keys, tiles, half,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the output of one head, and their statistics; tile 0 leaves the class token's logits in
    `class_row`, when there is one, for `scores_kernel`."""
    WIDE: tl.constexpr = query.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    batch = pid // tiles // heads
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    row, first, length, limit = sequence_of(batch, queries, keys, key_lengths, cu_seqlens)
    if tile * BLOCK_M >= length:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    value = head_of(value, row, head, first, value_batch, value_head, value_row, EIGHT)
    q, q_rest = rows_of(query, rows, length, query_row, query_column, HEAD_DIM, WIDTH, REST, EIGHT)
    if WIDE:
        q *= scale
        if REST > 0:
            q_rest *= scale
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if REST > 0:
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    if class_row is not None:
        class_row += (row * heads + head) * keys + first
    stop = limit
    if CAUSAL:
        stop = tl.minimum(limit, tile * BLOCK_M + BLOCK_M)
    for start in range(0, stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k, k_rest = rows_of(key, columns, limit, key_row, key_column, HEAD_DIM, WIDTH, REST, EIGHT)
        logits = product(q, q_rest, k, k_rest, REST)
        if not WIDE:
            logits *= scale * LOG2E
        if class_row is not None:  # noqa: SIM102
            if tile == 0:
                # a sum, as a masked store of the tile would take shared memory for all of it
                class_logits = tl.sum(tl.where((rows == 0)[:, None], logits, 0.0), 0)
                tl.store(class_row + columns, class_logits if WIDE else class_logits * LN2, mask=columns < limit)
        seen = (columns < limit)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        # key 0 is seen by every row that sees any, so `larger` is finite from the first tile on
        larger = tl.maximum(top, tl.max(logits, 1))
        unit: tl.constexpr = LOG2E if WIDE else 1.0
        p = tl.exp2((logits - larger[:, None]) * unit)
        shrink = tl.exp2((top - larger) * unit)
        total = total * shrink + tl.sum(p, 1)
        top = larger
        v, v_rest = rows_of(value, columns, limit, value_row, value_column, HEAD_DIM, WIDTH, REST, EIGHT)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")
        if REST > 0:
            acc_rest = tl.dot(p, v_rest, acc_rest * shrink[:, None], input_precision="ieee")
    total = tl.where(limit > 0, total, 1.0)
    largest = tl.where(limit > 0, top if WIDE else top * LN2, 0.0)
    log_sum = tl.where(limit > 0, tl.log(total), float("inf"))
    at = statistics + (row * heads + head) * queries + first + rows
    tl.store(at, largest, mask=rows < length)
    tl.store(at + half, log_sum, mask=rows < length)
    out += ((row * queries + first) * heads + head) * HEAD_DIM
    store_tile(out, acc / total[:, None], rows, length, heads * HEAD_DIM, HEAD_DIM, 0)
    if REST > 0:
        store_tile(out, acc_rest / total[:, None], rows, length, heads * HEAD_DIM, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=[*SIZES, "scale"])
def class_logits_kernel(
    query, query_batch, query_head, query_row, query_column, key, key_batch, key_head, key_row, key_column,
    class_row, statistics, key_lengths, cu_seqlens, scale, heads, keys, half,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Logits of the class token of one sequence in one head, and its statistics, by one pass over the keys."""
    head = tl.program_id(0) % heads
    batch = tl.program_id(0) // heads
    row, first, length, limit = sequence_of(batch, keys, keys, key_lengths, cu_seqlens)
    if length == 0:
        return
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    channels = tl.arange(0, WIDTH)
    q = tl.load(query + channels.to(tl.int64) * query_column, mask=channels < HEAD_DIM, other=0.0)
    q = q.to(tl.float32) * scale
    class_row += (row * heads + head) * keys + first
    top = float("-inf")
    total = 0.0
    for start in range(0, limit, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = tile_of(key, columns, limit, key_row, key_column, HEAD_DIM, 0, WIDTH, EIGHT)
        logits = tl.sum(k.to(tl.float32) * q[None, :], 1)
        tl.store(class_row + columns, logits, mask=columns < limit)
        logits = tl.where(columns < limit, logits, float("-inf"))
        larger = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(logits - larger), 0)
        top = larger
    at = statistics + batch.to(tl.int64) * heads + head
    tl.store(at, tl.where(limit > 0, top, 0.0))
    tl.store(at + half, tl.where(limit > 0, tl.log(total), float("inf")))


@triton.jit(do_not_specialize=[*SIZES, "statistic_batch", "statistic_head", "prefix"])
def scores_kernel(
    class_row, statistics, statistic_batch, statistic_head, statistic_row, scores, key_lengths, cu_seqlens,
    heads, keys, tiles, half, prefix,
    HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N tokens of one sequence: logits in `class_row` become probabilities, their mean over heads the scores."""
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(0) // tiles
    row, first, length, limit = sequence_of(batch, keys, keys, key_lengths, cu_seqlens)
    if tile * BLOCK_N >= length:
        return
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    statistics += batch.to(tl.int64) * statistic_batch + first * statistic_row
    class_row += row * heads * keys + first
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        at = statistics + head.to(tl.int64) * statistic_head
        largest = tl.load(at, mask=head < heads, other=0.0)
        log_sum = tl.load(at + half, mask=head < heads, other=0.0)
        to = class_row + head.to(tl.int64)[:, None] * keys + columns[None, :]
        inside = (head < heads)[:, None]
        logits = tl.load(to, mask=inside & (columns < limit)[None, :], other=float("-inf"))
        p = tl.exp(logits - largest[:, None] - log_sum[:, None])
        tl.store(to, p, mask=inside & (columns < length)[None, :])
        total += tl.sum(p, 0)
    mean = total / heads
    if cu_seqlens is not None:
        tl.store(scores + first + columns, tl.where(columns < prefix, 0.0, mean), mask=columns < length)
    else:
        here = (columns >= prefix) & (columns < length)
        tl.store(scores + row * (keys - prefix) + columns - prefix, mean, mask=here)
