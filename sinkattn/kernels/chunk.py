"""The chunk kernel: many new tokens per stream, each with its own window over [sinks][old ring][new tokens].

New keys are rotated once, into a buffer; for a ring of 8 bits they and the new values are rounded as well. The ring is
read as it was before the call, without copying it; the caller appends the new tokens afterwards.
"""

import triton
import triton.language as tl

from sinkattn.kernels.primitives import (
    LOWEST_SCORE,
    attend,
    cache_kv_row_of,
    combine_partials,
    hadamard,
    load_block,
    load_rotated,
    load_scales,
    normalise,
    position_of,
    quantise,
    sinks_of,
    store_block,
    store_output,
    store_partial,
    token_counts,
)


@triton.jit(do_not_specialize=["tokens", "kv_heads"], do_not_specialize_on_alignment=["seen", "lengths"])
def rotate_kernel(
    key, lengths, seen, cos, sin, rotated, tokens, kv_heads, key_row, key_head, key_token,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row) rotates BLOCK_N new keys into ``rotated`` ``[num_kv_rows, tokens, HEAD_DIM]``."""
    # A one-dimensional grid, as the other dimensions are limited to 65535 programs.
    blocks = tl.cdiv(tokens, BLOCK_N)
    kv_row = tl.program_id(0) // blocks
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    _, count = token_counts(seen, lengths, row, tokens)
    tables = (row * tokens + token) * PAIRS
    keys = key + row * key_row + head * key_head + token.to(tl.int64) * key_token
    k = load_rotated(keys, cos + tables, sin + tables, token < count, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST)
    to = rotated + (kv_row.to(tl.int64) * tokens + token) * HEAD_DIM
    store_block(to, k, token < tokens, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "num_sinks", "cache_rows"],
    do_not_specialize_on_alignment=["seen", "lengths", "rows", "row_sinks", "new_key_scales", "new_value_scales"],
)
def quantise_kernel(
    key, value, seen, lengths, rows, row_sinks, cos, sin, sink_keys, sink_values, rotated, new_values, new_key_scales,
    new_value_scales, tokens, kv_heads, num_sinks, cache_rows,
    key_row, key_head, key_token, value_row, value_head, value_token,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, HADAMARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row) rotates BLOCK_N new keys and rounds them, and their values, to 8 bits.

    rotated, new_values: ``[num_kv_rows, tokens, HEAD_DIM or VALUE_DIM]`` of 8 bits; new_key_scales, new_value_scales:
    fp32 ``[num_kv_rows, tokens]``. New tokens that are sinks go into ``sink_keys`` and ``sink_values`` of the ring
    too, as they are: no sink is evicted for them. rows, row_sinks, cache_rows, HADAMARD: as for `decode_kernel`.
    """
    blocks = tl.cdiv(tokens, BLOCK_N)
    kv_row = tl.program_id(0) // blocks
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    before, count = token_counts(seen, lengths, row, tokens, rows, cache_rows)
    arrived = token < count
    tables = (row * tokens + token) * PAIRS
    key_rows = key + row * key_row + head * key_head + token.to(tl.int64) * key_token
    value_rows = value + row * value_row + head * value_head + token.to(tl.int64) * value_token
    k = load_rotated(key_rows, cos + tables, sin + tables, arrived, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST)
    v = load_block(value_rows, arrived, VALUE_DIM, BLOCK_V)

    is_sink = arrived & (before + token < sinks_of(row_sinks, row, num_sinks))
    sink = cache_kv_row_of(kv_row, rows, row, head, kv_heads).to(tl.int64) * num_sinks + before + token
    store_block(sink_keys + sink * HEAD_DIM, k, is_sink, HEAD_DIM, BLOCK_D)
    store_block(sink_values + sink * VALUE_DIM, v, is_sink, VALUE_DIM, BLOCK_V)

    to = kv_row.to(tl.int64) * tokens + token
    k, k_scales = quantise(hadamard(k.to(tl.float32), HADAMARD), rotated.dtype.element_ty)
    v, v_scales = quantise(v, new_values.dtype.element_ty)
    store_block(rotated + to * HEAD_DIM, k, arrived, HEAD_DIM, BLOCK_D)
    store_block(new_values + to * VALUE_DIM, v, arrived, VALUE_DIM, BLOCK_V)
    tl.store(new_key_scales + to, k_scales, mask=arrived)
    tl.store(new_value_scales + to, v_scales, mask=arrived)


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "slots", "window", "num_sinks", "cache_rows"],
    do_not_specialize_on_alignment=[
        "key_scales", "value_scales", "new_key_scales", "new_value_scales", "seen", "lengths", "rows", "row_sinks",
        "begins", "sink_logits", "alibi_slopes"
    ],
)  # fmt: skip
def chunk_kernel(
    keys, values, sink_keys, sink_values, key_scales, value_scales, query, rotated, value, new_key_scales,
    new_value_scales, seen, lengths, rows, row_sinks, begins, cos, sin, sink_logits, alibi_slopes, out, partials,
    tokens, kv_heads, slots, window, num_sinks, cache_rows, scale, cap,
    query_row, query_head, query_token, value_row, value_head, value_token,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_SINKS: tl.constexpr, HADAMARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row) does BLOCK_M consecutive queries of one KV head, ``kv_row = row * kv_heads + head``.

    With ``partials``, the scratch of `store_partial`, the programs of the second dimension of the grid share the blocks
    of keys, the last one does the sinks too, and `combine_kernel` makes the output; otherwise one does everything.
    Queries of a KV head are numbered ``token * GROUP + query head``, so that a block spans few tokens and the
    windows of its queries overlap. Key blocks that no query of the block sees are skipped; those that all see need no
    mask. rows, row_sinks, begins, cache_rows, slots, HADAMARD: as for `decode_kernel`. sink_keys and the like: of
    a ring of 8 bits, else None; ``rotated`` and ``value`` are then of 8 bits too, and ``sink_keys`` has new sinks.
    """
    query_blocks = tl.cdiv(tokens * GROUP, BLOCK_M)
    kv_row, split, num_splits = tl.program_id(0) // query_blocks, tl.program_id(1), tl.num_programs(1)
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    first = tl.program_id(0) % query_blocks * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    token, query_heads = m // GROUP, head * GROUP + m % GROUP
    live = token < tokens
    before, count = token_counts(seen, lengths, row, tokens, rows, cache_rows)
    sinks = sinks_of(row_sinks, row, num_sinks)
    heads = kv_heads * GROUP
    first_token = first // GROUP
    if first_token >= count:
        if partials is None:
            zeros = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            store_output(out, zeros, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
        return
    last_token = tl.minimum((first + BLOCK_M - 1) // GROUP, count - 1)

    query_rows = query + row * query_row + query_heads * query_head + token.to(tl.int64) * query_token
    batch = tl.num_programs(0) // query_blocks // kv_heads
    table_rows = (row * tokens + token) * PAIRS
    sink_table_rows = table_rows + batch.to(tl.int64) * tokens * PAIRS
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + query_heads, mask=live, other=0.0) * 1.4426950408889634
    row_max = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    ring = slots - num_sinks
    cache_kv_row = cache_kv_row_of(kv_row, rows, row, head, kv_heads).to(tl.int64)
    first_sink = cache_kv_row * slots
    first_slot = first_sink + num_sinks
    if key_scales is not None:
        first_sink, first_slot = cache_kv_row * num_sinks, cache_kv_row * ring
        new_key_scales += kv_row.to(tl.int64) * tokens
        new_value_scales += kv_row.to(tl.int64) * tokens
    new_keys = rotated + kv_row.to(tl.int64) * tokens * HEAD_DIM
    new_values = value + row * value_row + head * value_head

    # Sinks: in the cache already, or among the new tokens.
    q = load_rotated(
        query_rows, cos + sink_table_rows, sin + sink_table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
    )
    held_sinks = tl.minimum(before, sinks).to(tl.int32)
    all_sinks = tl.minimum(before + last_token + 1, sinks).to(tl.int32)
    if partials is not None:
        all_sinks = tl.where(split == num_splits - 1, all_sinks, 0)
    row_begin = None
    if begins is not None:
        row_begin = tl.minimum(tl.maximum(tl.load(begins + row), 0), before)
    position = position_of(before + token, sinks, window, row_begin)
    for start in range(0, all_sinks, BLOCK_SINKS):
        sink = start + tl.arange(0, BLOCK_SINKS)
        slot = first_sink + sink
        if key_scales is None:
            old, new = sink < held_sinks, (sink >= held_sinks) & (sink < all_sinks)
            arrived = (sink - held_sinks).to(tl.int64)
            k = load_block(keys + slot * HEAD_DIM, old, HEAD_DIM, BLOCK_D)
            k = tl.where(new[:, None], load_block(new_keys + arrived * HEAD_DIM, new, HEAD_DIM, BLOCK_D), k)
            v = load_block(values + slot * VALUE_DIM, old, VALUE_DIM, BLOCK_V)
            v = tl.where(new[:, None], load_block(new_values + arrived * value_token, new, VALUE_DIM, BLOCK_V), v)
        else:
            k = load_block(sink_keys + slot * HEAD_DIM, sink < all_sinks, HEAD_DIM, BLOCK_D)
            v = load_block(sink_values + slot * VALUE_DIM, sink < all_sinks, VALUE_DIM, BLOCK_V)
        distance = position[:, None] - sink[None, :]
        visible = (sink < all_sinks)[None, :] & (distance >= 0)
        row_max, row_sum, acc = attend(q, k, v, visible, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST)

    q = load_rotated(
        query_rows, cos + table_rows, sin + table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST, HADAMARD
    )

    # The old ring: tokens begin to before - 1, in blocks that end with the newest. Column c is token begin + c; a query
    # sees columns from first_column on, and all queries see those of the blocks full_ring to ring_blocks.
    begin = tl.maximum(before + first_token - window + 1, sinks)
    if row_begin is not None:
        begin = tl.maximum(begin, row_begin)
    held = tl.maximum(before - begin, 0).to(tl.int32)
    ring_blocks = tl.cdiv(held, BLOCK_N)
    missing = ring_blocks * BLOCK_N - held
    first_column = (before + token - window + 1 - begin).to(tl.int32)
    edge = tl.maximum(before + last_token - window + 1 - begin, 0).to(tl.int32)
    full_ring = tl.minimum(tl.cdiv(edge + missing, BLOCK_N), ring_blocks)
    first_index = (tl.maximum(begin - sinks, 0) % ring).to(tl.int32)

    # The new tokens without sinks: from begin_new to the last token of this query block. All queries see blocks
    # full_begin to full_end; blocks before and after need a mask.
    begin_new = tl.maximum(tl.maximum(sinks - before, 0).to(tl.int32), first_token - window + 1)
    new_end = tl.cdiv(tl.maximum(last_token + 1 - begin_new, 0), BLOCK_N)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(last_token - window + 1 - begin_new, 0), BLOCK_N), new_end)
    full_end = tl.maximum(tl.maximum(first_token + 1 - begin_new, 0) // BLOCK_N, full_begin)

    ring_begin, ring_end, new_begin = 0, ring_blocks, 0
    if partials is not None:
        # This split's part of all blocks, those of the ring and of the new tokens one after another.
        part = tl.cdiv(ring_blocks + new_end, num_splits)
        ring_begin = tl.minimum(split * part, ring_blocks)
        ring_end = tl.minimum((split + 1) * part, ring_blocks)
        full_ring = tl.minimum(tl.maximum(full_ring, ring_begin), ring_end)
        new_begin = tl.minimum(tl.maximum(split * part - ring_blocks, 0), new_end)
        new_end = tl.minimum(tl.maximum((split + 1) * part - ring_blocks, 0), new_end)
        full_begin = tl.minimum(tl.maximum(full_begin, new_begin), new_end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), new_end)

    for block in tl.range(ring_begin, full_ring):
        column = block * BLOCK_N - missing + n
        present = column >= 0
        index = first_index + column
        slot = first_slot + tl.where(index >= ring, index - ring, index)
        k = load_block(keys + slot * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
        v = load_block(values + slot * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
        k_scales = load_scales(key_scales, slot, present)
        v_scales = load_scales(value_scales, slot, present)
        visible = present[None, :] & (column[None, :] >= first_column[:, None])
        distance = held - column[None, :] + token[:, None]
        row_max, row_sum, acc = attend(
            q, k, v, visible, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST, k_scales, v_scales
        )
    for block in tl.range(full_ring, ring_end):
        column = block * BLOCK_N - missing + n
        index = first_index + column
        slot = first_slot + tl.where(index >= ring, index - ring, index)
        k = load_block(keys + slot * HEAD_DIM, None, HEAD_DIM, BLOCK_D)
        v = load_block(values + slot * VALUE_DIM, None, VALUE_DIM, BLOCK_V)
        k_scales = load_scales(key_scales, slot, None)
        v_scales = load_scales(value_scales, slot, None)
        distance = held - column[None, :] + token[:, None]
        row_max, row_sum, acc = attend(
            q, k, v, None, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST, k_scales, v_scales
        )
    for block in tl.range(full_begin, full_end):
        new = begin_new + block * BLOCK_N + n
        k = load_block(new_keys + new.to(tl.int64) * HEAD_DIM, None, HEAD_DIM, BLOCK_D)
        v = load_block(new_values + new.to(tl.int64) * value_token, None, VALUE_DIM, BLOCK_V)
        k_scales = load_scales(new_key_scales, new, None)
        v_scales = load_scales(new_value_scales, new, None)
        distance = token[:, None] - new[None, :]
        row_max, row_sum, acc = attend(
            q, k, v, None, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST, k_scales, v_scales
        )
    for masked in tl.range(new_begin, full_begin + new_end - full_end):
        block = tl.where(masked < full_begin, masked, masked - full_begin + full_end)
        new = begin_new + block * BLOCK_N + n
        present = new < count
        k = load_block(new_keys + new.to(tl.int64) * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
        v = load_block(new_values + new.to(tl.int64) * value_token, present, VALUE_DIM, BLOCK_V)
        k_scales = load_scales(new_key_scales, new, present)
        v_scales = load_scales(new_value_scales, new, present)
        distance = token[:, None] - new[None, :]
        visible = present[None, :] & (distance >= 0) & (distance < window)
        row_max, row_sum, acc = attend(
            q, k, v, visible, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST, k_scales, v_scales
        )

    if partials is None:
        acc = normalise(acc, row_max, row_sum, sink_logits, query_heads, live)
        store_output(out, acc, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
    else:
        num_kv_rows, num_queries = tl.num_programs(0) // query_blocks, tokens * GROUP
        store_partial(
            partials, kv_row, num_kv_rows, split, num_splits, num_queries, m, live, row_max, row_sum, acc, VALUE_DIM,
            BLOCK_V
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "splits", "cache_rows"],
    do_not_specialize_on_alignment=["partials", "seen", "lengths", "rows", "sink_logits"],
)
def combine_kernel(
    partials, seen, lengths, rows, sink_logits, out, tokens, kv_heads, splits, cache_rows,
    VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (block, kv_row) makes the output of BLOCK_M queries from the ``splits`` of `chunk_kernel`."""
    num_queries = tokens * GROUP
    blocks = tl.cdiv(num_queries, BLOCK_M)
    kv_row = tl.program_id(0) // blocks
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    token, query_heads = m // GROUP, head * GROUP + m % GROUP
    _, count = token_counts(seen, lengths, row, tokens, rows, cache_rows)
    live = token < count
    row_max, row_sum, acc = combine_partials(
        partials, kv_row, tl.num_programs(0) // blocks, splits, splits, num_queries, m, live, VALUE_DIM, BLOCK_M,
        BLOCK_V, BLOCK_SPLITS
    )  # fmt: skip
    acc = normalise(acc, row_max, row_sum, sink_logits, query_heads, live)
    store_output(out, acc, row, token, count, tokens, kv_heads * GROUP, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
