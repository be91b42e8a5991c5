"""Triton kernels of attention's gradients; `triton.py` launches them and tells the story.

Each forms the probabilities again, by the same arithmetic as the forward: p = exp(logit - largest - log_sum). In
float32 that is two subtractions, since the statistics' sum would round away what exp needs at logits of hundreds; of
half types, whose logits carry more error than that, the two are one number per query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xray_kernels.attention.triton_kernels import (
    LOG2E,
    SIZES,
    head_of,
    product,
    rows_of,
    scaled,
    sequence_of,
    store_tile,
    tile_of,
)


@triton.jit
def statistics_of(statistics, half, rows, count, WIDE: tl.constexpr):
    """Largest logit and log-sum of some queries, or their sum, in powers of 2, and 0; rows past the last have p = 0."""
    largest = tl.load(statistics + rows, mask=rows < count, other=0.0)
    log_sum = tl.load(statistics + half + rows, mask=rows < count, other=float("inf"))
    if not WIDE:
        largest = (largest + log_sum) * LOG2E
        log_sum = tl.zeros_like(log_sum)
    return largest, log_sum


@triton.jit
def probabilities(logits, largest, log_sum, seen, scale, WIDE: tl.constexpr):
    """Of a tile of products, which are scaled already when WIDE; 0 where a query may not look."""
    exponent = (logits - largest - log_sum) * LOG2E if WIDE else logits * (scale * LOG2E) - largest
    return tl.where(seen, tl.exp2(exponent), 0.0)


@triton.jit
def scores_of(grad_scores, batch_stride, column_stride, row, first, prefix, cu_seqlens):
    """Where the gradient of one sequence's scores starts, counted from its first token."""
    offset = first * column_stride if cu_seqlens is not None else row * batch_stride - prefix * column_stride
    return grad_scores + offset


@triton.jit
def score_gradient(grad_scores, column_stride, columns, prefix, limit, heads):
    """Gradient of the class token's probabilities in each head."""
    here = (columns >= prefix) & (columns < limit)
    return tl.load(grad_scores + columns.to(tl.int64) * column_stride, mask=here, other=0.0).to(tl.float32) / heads


@triton.jit
def expected_gradient(grad_scores, column_stride, class_row, prefix, limit, heads, BLOCK: tl.constexpr):
    """t = sum_j p_j g_j of the class token, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p = tl.load(class_row + columns, mask=columns < limit, other=0.0)
        total += p * score_gradient(grad_scores, column_stride, columns, prefix, limit, heads)
    return tl.sum(total, 0)


@triton.jit
def row_products(a, a_rest, b, b_rest, REST: tl.constexpr):
    """The product of each row of A with that of B."""
    result = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if REST > 0:
        result += tl.sum(a_rest.to(tl.float32) * b_rest.to(tl.float32), 1)
    return result


@triton.jit
def long_product(
    a, a_rows, a_count, a_row, a_column, factor, b, b_rows, b_count, b_row, b_column, HEAD_DIM: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """(factor A) B^T of rows in memory, 64 columns at a time and in their order: what `product` needs no registers for
    when rows are short."""
    result = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    a += scaled(a_rows.to(tl.int64)[:, None] * a_row, EIGHT)
    b += scaled(b_rows.to(tl.int64)[:, None] * b_row, EIGHT)
    for start in range(0, HEAD_DIM, 64):
        columns = (start + tl.arange(0, 64))[None, :].to(tl.int64)
        inside = columns < HEAD_DIM
        x = tl.load(a + columns * a_column, mask=(a_rows < a_count)[:, None] & inside, other=0.0) * factor
        y = tl.load(b + columns * b_column, mask=(b_rows < b_count)[:, None] & inside, other=0.0)
        result = tl.dot(x, tl.trans(y), result, input_precision="ieee")
    return result


@triton.jit(do_not_specialize=[*SIZES, "scale", "prefix", "score_batch"])
def query_gradient_kernel(
    grad, grad_batch, grad_head, grad_row, grad_column, query, query_batch, query_head, query_row, query_column,
    key, key_batch, key_head, key_row, key_column, value, value_batch, value_head, value_row, value_column,
    out, out_batch, out_head, out_row, out_column, statistics, delta, grad_query, grad_scores, score_batch,
    score_column, class_row, key_lengths, cu_seqlens, scale, heads, queries, keys, tiles, half, prefix,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of the queries' gradient; and delta, sum_j p_ij dP_ij of each row, for `key_gradient_kernel`."""
    WIDE: tl.constexpr = query.dtype.element_ty == tl.float32
    LONG: tl.constexpr = WIDE and WIDTH > 64
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
    grad = head_of(grad, row, head, first, grad_batch, grad_head, grad_row, EIGHT)
    out = head_of(out, row, head, first, out_batch, out_head, out_row, EIGHT)
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    value = head_of(value, row, head, first, value_batch, value_head, value_row, EIGHT)
    do, do_rest = rows_of(grad, rows, length, grad_row, grad_column, HEAD_DIM, WIDTH, REST, EIGHT)
    o, o_rest = rows_of(out, rows, length, out_row, out_column, HEAD_DIM, WIDTH, REST, EIGHT)
    expected = row_products(do, do_rest, o, o_rest, REST)
    if grad_scores is not None:
        grad_scores = scores_of(grad_scores, score_batch, score_column, row, first, prefix, cu_seqlens)
        if tile == 0:
            class_row += (row * heads + head) * keys + first
            t = expected_gradient(grad_scores, score_column, class_row, prefix, limit, heads, 128)
            expected += tl.where(rows == 0, t, 0.0)
    tl.store(delta + (row * heads + head) * queries + first + rows, expected, mask=rows < length)
    statistics += (row * heads + head) * queries + first
    largest, log_sum = statistics_of(statistics, half, rows, length, WIDE)
    q, q_rest = rows_of(query, rows, length, query_row, query_column, HEAD_DIM, WIDTH, REST, EIGHT)
    if WIDE:
        q *= scale
        if REST > 0:
            q_rest *= scale
    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if REST > 0:
        dq_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    stop = limit
    if CAUSAL:
        stop = tl.minimum(limit, tile * BLOCK_M + BLOCK_M)
    for start in range(0, stop, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k, k_rest = rows_of(key, columns, limit, key_row, key_column, HEAD_DIM, WIDTH, REST, EIGHT)
        v, v_rest = rows_of(value, columns, limit, value_row, value_column, HEAD_DIM, WIDTH, REST, EIGHT)
        seen = (columns < limit)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        if LONG:
            logits = long_product(
                query,
                rows,
                length,
                query_row,
                query_column,
                scale,
                key,
                columns,
                limit,
                key_row,
                key_column,
                HEAD_DIM,
                EIGHT,
            )
            dp = long_product(
                grad,
                rows,
                length,
                grad_row,
                grad_column,
                1.0,
                value,
                columns,
                limit,
                value_row,
                value_column,
                HEAD_DIM,
                EIGHT,
            )
        else:
            logits = product(q, q_rest, k, k_rest, REST)
            dp = product(do, do_rest, v, v_rest, REST)
        p = probabilities(logits, largest[:, None], log_sum[:, None], seen, scale, WIDE)
        if grad_scores is not None:
            g = score_gradient(grad_scores, score_column, columns, prefix, limit, heads)
            dp += tl.where((rows == 0)[:, None], g[None, :], 0.0)
        ds = (p * (dp - expected[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        if REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision="ieee")
    grad_query += ((row * queries + first) * heads + head) * HEAD_DIM
    store_tile(grad_query, dq * scale, rows, length, heads * HEAD_DIM, HEAD_DIM, 0)
    if REST > 0:
        store_tile(grad_query, dq_rest * scale, rows, length, heads * HEAD_DIM, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=[*SIZES, "scale", "prefix", "score_batch"])
def key_gradient_kernel(
    grad, grad_batch, grad_head, grad_row, grad_column, query, query_batch, query_head, query_row, query_column,
    key, key_batch, key_head, key_row, key_column, value, value_batch, value_head, value_row, value_column,
    statistics, delta, grad_key, grad_value, grad_scores, score_batch, score_column, key_lengths, cu_seqlens,
    scale, heads, queries, keys, tiles, half, prefix,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of the keys' and values' gradients, from tiles of logits that have a row for each key."""
    WIDE: tl.constexpr = query.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    tile = pid % tiles
    head = pid // tiles % heads
    batch = pid // tiles // heads
    row, first, length, limit = sequence_of(batch, queries, keys, key_lengths, cu_seqlens)
    present = keys
    if cu_seqlens is not None:
        present = length
    if tile * BLOCK_N >= present:
        return
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = head_of(grad, row, head, first, grad_batch, grad_head, grad_row, EIGHT)
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    value = head_of(value, row, head, first, value_batch, value_head, value_row, EIGHT)
    statistics += (row * heads + head) * queries + first
    delta += (row * heads + head) * queries + first
    k, k_rest = rows_of(key, columns, limit, key_row, key_column, HEAD_DIM, WIDTH, REST, EIGHT)
    v, v_rest = rows_of(value, columns, limit, value_row, value_column, HEAD_DIM, WIDTH, REST, EIGHT)
    if grad_scores is not None:
        grad_scores = scores_of(grad_scores, score_batch, score_column, row, first, prefix, cu_seqlens)
        g = score_gradient(grad_scores, score_column, columns, prefix, limit, heads)
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    if REST > 0:
        dk_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        dv_rest = tl.zeros([BLOCK_N, REST], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tile * BLOCK_N // BLOCK_M * BLOCK_M
    stop = tl.where(tile * BLOCK_N < limit, length, 0)  # no query sees these keys: zeros
    for start in range(begin, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q, q_rest = rows_of(query, rows, length, query_row, query_column, HEAD_DIM, WIDTH, REST, EIGHT)
        do, do_rest = rows_of(grad, rows, length, grad_row, grad_column, HEAD_DIM, WIDTH, REST, EIGHT)
        if WIDE:
            q *= scale
            if REST > 0:
                q_rest *= scale
        largest, log_sum = statistics_of(statistics, half, rows, length, WIDE)
        expected = tl.load(delta + rows, mask=rows < length, other=0.0)
        seen = (columns < limit)[:, None]
        if CAUSAL:
            seen = seen & (columns[:, None] <= rows[None, :])
        if WIDE:  # noqa: SIM108 - as in the forward, whatever order a product sums in: exp makes much of the last bit of a logit
            logits = tl.trans(product(q, q_rest, k, k_rest, REST))
        else:
            logits = product(k, k_rest, q, q_rest, REST)
        p = probabilities(logits, largest[None, :], log_sum[None, :], seen, scale, WIDE)
        weights = p.to(do.dtype)
        dv = tl.dot(weights, do, dv, input_precision="ieee")
        if REST > 0:
            dv_rest = tl.dot(weights, do_rest, dv_rest, input_precision="ieee")
        dp = product(v, v_rest, do, do_rest, REST)
        if grad_scores is not None:
            dp += tl.where((rows == 0)[None, :], g[:, None], 0.0)
        ds = (p * (dp - expected[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision="ieee")
    factor = 1.0 if WIDE else scale
    offset = ((row * keys + first) * heads + head) * HEAD_DIM
    grad_key += offset
    grad_value += offset
    store_tile(grad_key, dk * factor, columns, present, heads * HEAD_DIM, HEAD_DIM, 0)
    store_tile(grad_value, dv, columns, present, heads * HEAD_DIM, HEAD_DIM, 0)
    if REST > 0:
        store_tile(grad_key, dk_rest * factor, columns, present, heads * HEAD_DIM, HEAD_DIM, WIDTH)
        store_tile(grad_value, dv_rest, columns, present, heads * HEAD_DIM, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=[*SIZES, "scale", "prefix", "score_batch"])
def class_gradient_kernel(
    grad_scores, score_batch, score_column, query, query_batch, query_head, query_row, query_column,
    key, key_batch, key_head, key_row, key_column, class_row,
    grad_query, to_query_batch, to_query_head, to_query_row, to_query_column,
    grad_key, to_key_batch, to_key_head, to_key_row, to_key_column, cu_seqlens, scale, heads, keys, prefix,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """Adds the scores' gradient of one sequence in one head to those of its keys and its class token."""
    head = tl.program_id(0) % heads
    batch = tl.program_id(0) // heads
    row, first, length, _ = sequence_of(batch, keys, keys, None, cu_seqlens)
    if length == 0:
        return
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    grad_query = head_of(grad_query, row, head, first, to_query_batch, to_query_head, to_query_row, EIGHT)
    grad_key = head_of(grad_key, row, head, first, to_key_batch, to_key_head, to_key_row, EIGHT)
    grad_scores = scores_of(grad_scores, score_batch, score_column, row, first, prefix, cu_seqlens)
    class_row += (row * heads + head) * keys + first
    t = expected_gradient(grad_scores, score_column, class_row, prefix, length, heads, BLOCK_N)
    channels = tl.arange(0, WIDTH)
    inside = channels < HEAD_DIM
    q = tl.load(query + channels.to(tl.int64) * query_column, mask=inside, other=0.0).to(tl.float32)
    dq = tl.zeros([WIDTH], tl.float32)
    for start in range(0, length, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        p = tl.load(class_row + columns, mask=columns < length, other=0.0)
        g = score_gradient(grad_scores, score_column, columns, prefix, length, heads)
        ds = p * (g - t) * scale
        k = tile_of(key, columns, length, key_row, key_column, HEAD_DIM, 0, WIDTH, EIGHT)
        dq += tl.sum(ds[:, None] * k.to(tl.float32), 0)
        before = tile_of(grad_key, columns, length, to_key_row, to_key_column, HEAD_DIM, 0, WIDTH, EIGHT)
        after = (before.to(tl.float32) + ds[:, None] * q[None, :]).to(before.dtype)
        at = scaled(columns.to(tl.int64)[:, None] * to_key_row, EIGHT) + channels[None, :].to(tl.int64) * to_key_column
        tl.store(grad_key + at, after, mask=(columns < length)[:, None] & inside[None, :])
    to = grad_query + channels.to(tl.int64) * to_query_column
    before = tl.load(to, mask=inside, other=0.0)
    tl.store(to, (before.to(tl.float32) + dq).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "scale", "prefix", "score_batch"])
def whole_gradient_kernel(
    grad, grad_batch, grad_head, grad_row, grad_column, query, query_batch, query_head, query_row, query_column,
    key, key_batch, key_head, key_row, key_column, value, value_batch, value_head, value_row, value_column,
    statistics, grad_query, grad_key, grad_value, grad_scores, score_batch, score_column, key_lengths, cu_seqlens,
    scale, heads, queries, keys, half, prefix,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """All three gradients of one sequence in one head, whose keys are one tile; half types."""
    head = tl.program_id(0) % heads
    batch = tl.program_id(0) // heads
    row, first, length, limit = sequence_of(batch, queries, keys, key_lengths, cu_seqlens)
    present = keys
    if cu_seqlens is not None:
        present = length
    columns = tl.arange(0, BLOCK_N)
    grad = head_of(grad, row, head, first, grad_batch, grad_head, grad_row, EIGHT)
    query = head_of(query, row, head, first, query_batch, query_head, query_row, EIGHT)
    key = head_of(key, row, head, first, key_batch, key_head, key_row, EIGHT)
    value = head_of(value, row, head, first, value_batch, value_head, value_row, EIGHT)
    statistics += (row * heads + head) * queries + first
    k, k_rest = rows_of(key, columns, limit, key_row, key_column, HEAD_DIM, WIDTH, REST, EIGHT)
    v, v_rest = rows_of(value, columns, limit, value_row, value_column, HEAD_DIM, WIDTH, REST, EIGHT)
    if grad_scores is not None:
        grad_scores = scores_of(grad_scores, score_batch, score_column, row, first, prefix, cu_seqlens)
        g = score_gradient(grad_scores, score_column, columns, prefix, limit, heads)
    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    if REST > 0:
        dk_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        dv_rest = tl.zeros([BLOCK_N, REST], tl.float32)
    grad_query += ((row * queries + first) * heads + head) * HEAD_DIM
    for start in range(0, length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q, q_rest = rows_of(query, rows, length, query_row, query_column, HEAD_DIM, WIDTH, REST, EIGHT)
        do, do_rest = rows_of(grad, rows, length, grad_row, grad_column, HEAD_DIM, WIDTH, REST, EIGHT)
        largest, log_sum = statistics_of(statistics, half, rows, length, False)
        seen = (columns < limit)[:, None]
        if CAUSAL:
            seen = seen & (columns[:, None] <= rows[None, :])
        logits = product(k, k_rest, q, q_rest, REST)
        p = probabilities(logits, largest[None, :], log_sum[None, :], seen, scale, False)
        dp = product(v, v_rest, do, do_rest, REST)
        if grad_scores is not None:
            dp += tl.where((rows == 0)[None, :], g[:, None], 0.0)
        weights = p.to(do.dtype)
        dv = tl.dot(weights, do, dv)
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        dq = tl.trans(tl.dot(tl.trans(k), ds))
        store_tile(grad_query, dq * scale, rows, length, heads * HEAD_DIM, HEAD_DIM, 0)
        if REST > 0:
            dv_rest = tl.dot(weights, do_rest, dv_rest)
            dk_rest = tl.dot(ds, q_rest, dk_rest)
            dq_rest = tl.trans(tl.dot(tl.trans(k_rest), ds))
            store_tile(grad_query, dq_rest * scale, rows, length, heads * HEAD_DIM, HEAD_DIM, WIDTH)
    offset = ((row * keys + first) * heads + head) * HEAD_DIM
    grad_key += offset
    grad_value += offset
    store_tile(grad_key, dk * scale, columns, present, heads * HEAD_DIM, HEAD_DIM, 0)
    store_tile(grad_value, dv, columns, present, heads * HEAD_DIM, HEAD_DIM, 0)
    if REST > 0:
        store_tile(grad_key, dk_rest * scale, columns, present, heads * HEAD_DIM, HEAD_DIM, WIDTH)
        store_tile(grad_value, dv_rest, columns, present, heads * HEAD_DIM, HEAD_DIM, WIDTH)
