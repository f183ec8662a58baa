"""The decode kernel: few new tokens per stream against a whole window, in one launch, split over programs.

A query sees [old ring][sinks][new tokens]. Ring slots are read in storage order, as softmax does not depend on the
order of keys. Everything that changes between tokens is read from ``seen`` on the device, so a captured launch stays
correct for the whole stream.
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


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "slots", "window", "num_sinks", "cache_rows"],
    do_not_specialize_on_alignment=[
        "key_scales", "value_scales", "seen", "lengths", "rows", "row_sinks", "begins", "sink_logits", "alibi_slopes",
        "arrivals"
    ],
)  # fmt: skip
def decode_kernel(
    keys, values, sink_keys, sink_values, key_scales, value_scales, query, key, value, seen, lengths, rows, row_sinks,
    begins, cos, sin, sink_logits, alibi_slopes, out, partials, arrivals, tokens, kv_heads, slots, window, num_sinks,
    cache_rows, scale, cap,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, APPEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_NEW: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, HADAMARD: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (kv_row, split) does one KV split of one KV head of one stream, ``kv_row = row * kv_heads + head``.

    The ``tokens * GROUP`` queries of that KV head are the rows of one tile. With several splits, all but one share the
    ring. The other one, ``last_split``, does sinks and new tokens. With APPEND, which needs ``tokens == 1``, it also
    writes the new token to its slot; no program reads that slot, since its old token is out of the window. The
    program that finishes last combines all splits.

    rows, row_sinks, begins: for each row, which of the ``cache_rows`` rows of the cache it is in, its sinks, and the
    first token that its window may hold. sink_keys, sink_values, key_scales, value_scales: of a ring of 8 bits, else
    None. slots: of sinks and ring together, wherever they are. HADAMARD: the block of `hadamard`, 1 in full precision.
    partials: scratch of `store_partial`. arrivals: int32 ``[num_kv_rows]`` completion counters, zero before and after.
    """
    kv_row, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (kv_row // kv_heads).to(tl.int64), (kv_row % kv_heads).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    token, query_heads = m // GROUP, head * GROUP + m % GROUP
    num_queries = tokens * GROUP
    live = m < num_queries
    before, count = token_counts(seen, lengths, row, tokens, rows, cache_rows)
    cache_kv_row = cache_kv_row_of(kv_row, rows, row, head, kv_heads)
    sinks = sinks_of(row_sinks, row, num_sinks)
    begin = None
    if begins is not None:
        begin = tl.minimum(tl.maximum(tl.load(begins + row), 0), before)
    heads = kv_heads * GROUP
    # Loaded before `seen` has arrived, so that the two loads overlap, although a padded row does not need them.
    query_rows = query + row * query_row + query_heads * query_head + token.to(tl.int64) * query_token
    batch = tl.num_programs(0) // kv_heads
    table_rows = (row * tokens + token) * PAIRS
    q = load_rotated(
        query_rows, cos + table_rows, sin + table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST, HADAMARD
    )
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + query_heads, mask=live, other=0.0) * 1.4426950408889634
    if count == 0:
        if split == 0:
            zeros = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            store_output(out, zeros, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
        return

    ring = slots - num_sinks
    held = tl.minimum(tl.maximum(before - sinks, 0), ring).to(tl.int32)
    tiles = tl.cdiv(held, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(tiles, tl.maximum(num_splits - 1, 1)), 1)
    last_split = tl.where(num_splits > 1, tl.cdiv(tiles, tiles_per_split), 0)
    if split > last_split:
        return

    row_max = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # The age of a slot is the distance of its token from the newest token in the ring.
    newest = (tl.maximum(before - 1 - sinks, 0) % ring).to(tl.int32)
    oldest_age = tl.minimum(held, window - 1)
    if begin is not None:
        oldest_age = tl.minimum(oldest_age, before - begin).to(tl.int32)
    first_sink = cache_kv_row.to(tl.int64) * slots
    first_slot = first_sink + num_sinks
    if key_scales is not None:
        first_sink, first_slot = cache_kv_row.to(tl.int64) * num_sinks, cache_kv_row.to(tl.int64) * ring
    else:
        sink_keys, sink_values = keys, values
    n = tl.arange(0, BLOCK_N)
    for tile in tl.range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        start = tile * BLOCK_N
        age = newest - (start + n)
        age = tl.where(age < 0, age + ring, age)
        present = (start + n < ring) & (age < oldest_age)
        k = load_block(keys + (first_slot + start) * HEAD_DIM + n * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
        v = load_block(values + (first_slot + start) * VALUE_DIM + n * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
        k_scales = load_scales(key_scales, first_slot + start + n, present)
        v_scales = load_scales(value_scales, first_slot + start + n, present)
        visible = present[None, :]
        if not APPEND:
            visible = visible & (age[None, :] + token[:, None] < window - 1)
        distance = age[None, :] + token[:, None] + 1
        row_max, row_sum, acc = attend(
            q, k, v, visible, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST, k_scales, v_scales
        )

    if split == last_split:
        new = tl.arange(0, BLOCK_NEW)
        arrived = new < count
        key_rows = key + row * key_row + head * key_head + new.to(tl.int64) * key_token
        value_rows = value + row * value_row + head * value_head + new.to(tl.int64) * value_token
        new_tables = (row * tokens + new) * PAIRS
        k_new = load_rotated(
            key_rows, cos + new_tables, sin + new_tables, arrived, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
        )
        v_new = load_block(value_rows, arrived, VALUE_DIM, BLOCK_V)
        # A decode call has at most `window` tokens, so every new token sees all new tokens before it.
        between = token[:, None] - new[None, :]
        visible = arrived[None, :] & (between >= 0)
        # With APPEND there is one new token, and these are its slots.
        sink_slot, ring_slot = first_sink + before + new, first_slot + tl.maximum(before - sinks, 0) % ring + new
        if key_scales is None:
            if APPEND:
                slot = tl.where(before < sinks, sink_slot, ring_slot)
                store_block(keys + slot * HEAD_DIM, k_new, arrived, HEAD_DIM, BLOCK_D)
                store_block(values + slot * VALUE_DIM, v_new, arrived, VALUE_DIM, BLOCK_V)
            row_max, row_sum, acc = attend(
                q, k_new, v_new, visible, between, slopes, scale, cap, row_max, row_sum, acc, UPCAST
            )
        else:
            is_sink = before + new < sinks
            k_quantised, k_scales = quantise(hadamard(k_new.to(tl.float32), HADAMARD), keys.dtype.element_ty)
            v_quantised, v_scales = quantise(v_new, values.dtype.element_ty)
            if APPEND:
                to_sinks, to_ring = arrived & is_sink, arrived & (is_sink == 0)
                store_block(sink_keys + sink_slot * HEAD_DIM, k_new, to_sinks, HEAD_DIM, BLOCK_D)
                store_block(sink_values + sink_slot * VALUE_DIM, v_new, to_sinks, VALUE_DIM, BLOCK_V)
                store_block(keys + ring_slot * HEAD_DIM, k_quantised, to_ring, HEAD_DIM, BLOCK_D)
                store_block(values + ring_slot * VALUE_DIM, v_quantised, to_ring, VALUE_DIM, BLOCK_V)
                tl.store(key_scales + ring_slot, k_scales, mask=to_ring)
                tl.store(value_scales + ring_slot, v_scales, mask=to_ring)
            row_max, row_sum, acc = attend(
                q, k_quantised, v_quantised, visible & (is_sink == 0)[None, :], between, slopes, scale, cap, row_max,
                row_sum, acc, UPCAST, k_scales, tl.where(is_sink, 0.0, v_scales)
            )  # fmt: skip

        table_rows += batch.to(tl.int64) * tokens * PAIRS
        q = load_rotated(
            query_rows, cos + table_rows, sin + table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
        )
        if key_scales is not None:  # noqa: SIM102 (known when this is compiled)
            if before < sinks:
                # New sinks, which are not of 8 bits; a query that sees them is as far from them in either rotation.
                row_max, row_sum, acc = attend(
                    q, k_new, v_new, visible & is_sink[None, :], between, slopes, scale, cap, row_max, row_sum, acc,
                    UPCAST
                )  # fmt: skip
        position = position_of(before + token, sinks, window, begin).to(tl.int32)
        held_sinks = tl.minimum(before, sinks).to(tl.int32)
        for start in range(0, held_sinks, BLOCK_NEW):
            sink = start + new
            present = sink < held_sinks
            k = load_block(sink_keys + (first_sink + sink) * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
            v = load_block(sink_values + (first_sink + sink) * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
            distance = position[:, None] - sink[None, :]
            row_max, row_sum, acc = attend(
                q, k, v, present[None, :], distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST
            )

    if last_split == 0:
        acc = normalise(acc, row_max, row_sum, sink_logits, query_heads, live)
        store_output(out, acc, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
        return

    num_kv_rows = tl.num_programs(0)
    store_partial(
        partials, kv_row, num_kv_rows, split, num_splits, num_queries, m, live, row_max, row_sum, acc, VALUE_DIM,
        BLOCK_V
    )  # fmt: skip
    tl.debug_barrier()  # every thread's stores come before the program's atomic add
    if tl.atomic_add(arrivals + kv_row, 1, sem="acq_rel", scope="gpu") != last_split:
        return
    tl.store(arrivals + kv_row, 0)

    r = tl.arange(0, BLOCK_ROWS)
    real = r < num_queries
    all_max, all_sum, all_acc = combine_partials(
        partials, kv_row, num_kv_rows, last_split + 1, num_splits, num_queries, r, real, VALUE_DIM, BLOCK_ROWS, BLOCK_V,
        BLOCK_SPLITS
    )  # fmt: skip
    query_heads = head * GROUP + r % GROUP
    all_acc = normalise(all_acc, all_max, all_sum, sink_logits, query_heads, real)
    store_output(out, all_acc, row, r // GROUP, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
