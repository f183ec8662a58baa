"""The backward kernels: gradients of a call over the tokens in sight before it, which are constants, and its own.

Queries come rotated twice, for window keys and for sink keys, keys in order of time: the past, ``past`` rows for every
KV head, then the new ones. Scores are computed again (FlashAttention, arXiv 2205.14135): one kernel goes over the keys
of each block of queries, twice, and leaves the logarithms of the softmax sums; the other goes over the queries of each
block of new keys. Nothing is added up by atomics, so results are deterministic.
"""

import triton
import triton.language as tl

from sinkattn.kernels.primitives import LOWEST_SCORE, load_block, matmul, rounded, tanh, token_counts


@triton.jit
def key_segment(SEGMENT: tl.constexpr, before, first_token, last_token, past, window, num_sinks):
    """Keys that queries ``first_token`` to ``last_token`` may see: rows begin to end - 1; row i is number i + offset.

    0: sinks of the past, 1: new sinks, 2: window of the past, 3: window of the new tokens. Numbers of sinks count from
    the start of the stream, others from the first new token.
    """
    held_sinks = tl.minimum(before, num_sinks).to(tl.int32)
    if SEGMENT == 0:
        begin, end, offset = 0, tl.where(past > 0, held_sinks, 0), 0
    elif SEGMENT == 1:
        begin, offset = past, held_sinks - past
        end = past + tl.minimum(last_token + 1, num_sinks - held_sinks)
    elif SEGMENT == 2:
        # Window keys of the past that are held, newest last.
        held = tl.minimum(tl.maximum(before - num_sinks, 0), window).to(tl.int32)
        begin = num_sinks + tl.maximum(held + first_token - window + 1, 0)
        end, offset = tl.where(past > 0, num_sinks + held, 0), -num_sinks - held
    else:
        begin = past + tl.maximum(num_sinks - held_sinks, first_token - window + 1)
        end, offset = past + last_token + 1, -past
    return begin, end, offset


@triton.jit
def segment_scores(
    SEGMENT: tl.constexpr, query, keys, token, position, index, end, offset, window, alibi_slopes, scale, cap,
    UPCAST: tl.constexpr
):  # fmt: skip
    """`scores_and_slopes` of queries ``[m]`` and keys ``[n]`` of a segment, rows ``index`` of it."""
    distance = (position if SEGMENT < 2 else token)[:, None] - (index + offset)[None, :]
    visible = (index < end)[None, :] & (distance >= 0)
    if SEGMENT >= 2:
        visible = visible & (distance < window)
    products = matmul(query, tl.trans(keys), tl.zeros([query.shape[0], keys.shape[0]], tl.float32), UPCAST)
    return scores_and_slopes(products, visible, distance, alibi_slopes, scale, cap)


@triton.jit
def scores_and_slopes(products, visible, distance, alibi_slopes, scale, cap):
    """Scores with log2(e) of dot products, -inf where not ``visible``; their derivative by the scaled products."""
    scores = products * scale
    slopes = tl.full([1, 1], 1.0, tl.float32)
    if cap is not None:
        capped = tanh(scores)
        scores = cap * capped
        slopes = 1.0 - capped * capped
    if alibi_slopes is not None:
        scores -= alibi_slopes * distance.to(tl.float32)
    return tl.where(visible, scores, float("-inf")), slopes


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "past", "window", "num_sinks"],
    do_not_specialize_on_alignment=["seen", "lengths", "sink_logits", "alibi_slopes"],
)
def query_gradients_kernel(
    window_query, sink_query, keys, values, gradient, delta, seen, lengths, sink_logits, alibi_slopes,
    window_dquery, sink_dquery, log_sums,
    tokens, kv_heads, past, window, num_sinks, scale, cap, factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row): gradients of BLOCK_M queries of a KV head, numbered ``token * GROUP + query head``.

    window_query, sink_query, their gradients: ``[num_kv_rows, tokens * GROUP, HEAD_DIM]``, gradients in fp32 and times
    ``factor``. keys ``[num_kv_rows, past + tokens, HEAD_DIM]``, values alike. gradient: of the output,
    ``[num_kv_rows, tokens * GROUP, VALUE_DIM]``; delta ``[num_kv_rows, tokens * GROUP]``: its product with the output.
    log_sums, alike: base-2 logarithms of the softmax sums.
    """
    rows = tokens * GROUP
    blocks = tl.cdiv(rows, BLOCK_M)
    kv_row = tl.program_id(0) // blocks
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_M
    m, n = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    token, query_heads = m // GROUP, head * GROUP + m % GROUP
    before, count = token_counts(seen, lengths, row, tokens)
    live = token < count
    at = kv_row.to(tl.int64) * rows + m
    d = tl.arange(0, BLOCK_D)
    to_window = window_dquery + at[:, None] * HEAD_DIM + d[None, :]
    to_sink = sink_dquery + at[:, None] * HEAD_DIM + d[None, :]
    in_rows = (m < rows)[:, None] & (d < HEAD_DIM)[None, :]
    dwindow = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dsink = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_token = first // GROUP
    if first_token >= count:
        tl.store(to_window, dwindow, mask=in_rows)
        tl.store(to_sink, dsink, mask=in_rows)
        return
    last_token = tl.minimum((first + BLOCK_M - 1) // GROUP, count - 1)
    position = tl.minimum(before + token, num_sinks + window - 1).to(tl.int32)
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + query_heads, mask=live, other=0.0)[:, None] * 1.4426950408889634
    first_key = kv_row.to(tl.int64) * (past + tokens)

    row_max = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sink_logits is not None:
        row_max = tl.load(sink_logits + query_heads, mask=live, other=0.0) * 1.4426950408889634
        row_max = tl.maximum(row_max, LOWEST_SCORE)
        row_sum += 1.0
    for SEGMENT in tl.static_range(4):
        begin, end, offset = key_segment(SEGMENT, before, first_token, last_token, past, window, num_sinks)
        q = load_block((sink_query if SEGMENT < 2 else window_query) + at * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        for start in tl.range(begin, end, BLOCK_N):
            index = start + n
            k = load_block(keys + (first_key + index) * HEAD_DIM, index < end, HEAD_DIM, BLOCK_D)
            scores, _ = segment_scores(
                SEGMENT, q, k, token, position, index, end, offset, window, slopes, scale, cap, UPCAST
            )
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
            row_max = new_max
    log_sum = row_max + tl.log2(row_sum)
    tl.store(log_sums + at, log_sum, mask=live)

    g = load_block(gradient + at * VALUE_DIM, live, VALUE_DIM, BLOCK_V)
    row_delta = tl.load(delta + at, mask=live, other=0.0)
    for SEGMENT in tl.static_range(4):
        begin, end, offset = key_segment(SEGMENT, before, first_token, last_token, past, window, num_sinks)
        q = load_block((sink_query if SEGMENT < 2 else window_query) + at * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(begin, end, BLOCK_N):
            index = start + n
            k = load_block(keys + (first_key + index) * HEAD_DIM, index < end, HEAD_DIM, BLOCK_D)
            v = load_block(values + (first_key + index) * VALUE_DIM, index < end, VALUE_DIM, BLOCK_V)
            scores, derivative = segment_scores(
                SEGMENT, q, k, token, position, index, end, offset, window, slopes, scale, cap, UPCAST
            )
            weights = tl.exp2(scores - log_sum[:, None])
            dweights = matmul(g, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
            dscores = weights * (dweights - row_delta[:, None]) * derivative
            acc = matmul(rounded(dscores, k.dtype, UPCAST), k, acc, UPCAST)
        if SEGMENT < 2:
            dsink += acc
        else:
            dwindow += acc
    tl.store(to_window, tl.where(live[:, None], dwindow * factor, 0.0), mask=in_rows)
    tl.store(to_sink, tl.where(live[:, None], dsink * factor, 0.0), mask=in_rows)


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "past", "window", "num_sinks"],
    do_not_specialize_on_alignment=["seen", "lengths", "alibi_slopes"],
)
def key_gradients_kernel(
    window_query, sink_query, keys, values, gradient, delta, seen, lengths, alibi_slopes, log_sums, dkey, dvalue,
    tokens, kv_heads, past, window, num_sinks, scale, cap, factor,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row): gradients of BLOCK_N new keys and values, fp32 ``[num_kv_rows, tokens, ...]``.

    Everything else as in `query_gradients_kernel`, which writes ``log_sums``.
    """
    rows = tokens * GROUP
    blocks = tl.cdiv(tokens, BLOCK_N)
    kv_row = tl.program_id(0) // blocks
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_N
    new, d, e = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    before, count = token_counts(seen, lengths, row, tokens)
    present = new < count
    held_sinks = tl.minimum(before, num_sinks).to(tl.int32)
    is_sink = new < num_sinks - held_sinks
    key_rows = kv_row.to(tl.int64) * (past + tokens) + past + new
    k = load_block(keys + key_rows * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
    v = load_block(values + key_rows * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    # First as window keys, then as sinks.
    for SINKS in tl.static_range(2):
        end = tl.minimum(count, first + BLOCK_N - 1 + window) * GROUP
        if SINKS:
            end = tl.where(first < num_sinks - held_sinks, count * GROUP, 0)
        for start in tl.range(first * GROUP, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            token, query_heads = m // GROUP, head * GROUP + m % GROUP
            live = token < count
            at = kv_row.to(tl.int64) * rows + m
            q = load_block((sink_query if SINKS else window_query) + at * HEAD_DIM, live, HEAD_DIM, BLOCK_D)
            g = load_block(gradient + at * VALUE_DIM, live, VALUE_DIM, BLOCK_V)
            log_sum = tl.load(log_sums + at, mask=live, other=0.0)
            row_delta = tl.load(delta + at, mask=live, other=0.0)
            slopes = None
            if alibi_slopes is not None:
                slopes = tl.load(alibi_slopes + query_heads, mask=live, other=0.0)[None, :] * 1.4426950408889634
            visible = present[:, None] & live[None, :]
            if SINKS:
                position = tl.minimum(before + token, num_sinks + window - 1).to(tl.int32)
                distance = position[None, :] - (held_sinks + new)[:, None]
                visible = visible & is_sink[:, None] & (distance >= 0)
            else:
                distance = token[None, :] - new[:, None]
                visible = visible & (new >= num_sinks - held_sinks)[:, None] & (distance >= 0) & (distance < window)
            products = matmul(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            scores, derivative = scores_and_slopes(products, visible, distance, slopes, scale, cap)
            weights = tl.exp2(scores - log_sum[None, :])
            dv = matmul(rounded(weights, g.dtype, UPCAST), g, dv, UPCAST)
            dweights = matmul(v, tl.trans(g), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            dscores = weights * (dweights - row_delta[None, :]) * derivative
            dk = matmul(rounded(dscores, q.dtype, UPCAST), q, dk, UPCAST)
    to_rows = kv_row.to(tl.int64) * tokens + new
    in_tokens = new < tokens
    dk = tl.where(present[:, None], dk * factor, 0.0)
    dv = tl.where(present[:, None], dv, 0.0)
    to_keys = dkey + to_rows[:, None] * HEAD_DIM + d[None, :]
    to_values = dvalue + to_rows[:, None] * VALUE_DIM + e[None, :]
    tl.store(to_keys, dk, mask=in_tokens[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(to_values, dv, mask=in_tokens[:, None] & (e < VALUE_DIM)[None, :])
