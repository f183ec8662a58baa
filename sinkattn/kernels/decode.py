"""Few new tokens per stream against a whole window, which is split over programs: one launch.

A query sees [old ring][sinks][new tokens]. Slots of the ring are read in the order in which they lie, for softmax does
not care. All that changes from token to token is read from ``seen`` on the device, so that one captured launch stays
right for ever.
"""

import triton
import triton.language as tl

from sinkattn.kernels.primitives import (
    NO_SCORE,
    attend,
    load_block,
    load_rotated,
    normalise,
    store_output,
    token_counts,
)


@triton.jit(
    do_not_specialize=["tokens", "kv_heads", "slots", "window", "num_sinks"],
    do_not_specialize_on_alignment=["seen", "lengths", "sink_logits", "alibi_slopes", "arrivals"],
)
def decode_kernel(
    keys, values, query, key, value, seen, lengths, cos, sin, sink_logits, alibi_slopes, out, partials, arrivals,
    tokens, kv_heads, slots, window, num_sinks, scale, cap,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, APPEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_NEW: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Program (line, part) does a part of the work for one key head of one stream, ``line = row * kv_heads + head``.

    The queries of that key head, ``tokens * GROUP`` of them, are the rows of one tile. The ring is split over all parts
    but one, if there are several. That one, the next after the last that has slots to read, does sinks and new tokens
    and, with APPEND, which needs ``tokens == 1``, writes the new token to its slot: no program reads that slot, because
    what it held is just out of sight. The program that is done last combines all parts.

    partials: fp32, for every line and part ``[tokens * GROUP, VALUE_DIM + 2]`` in any order. arrivals: int32
    ``[lines]``, zero before and after.
    """
    line, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (line // kv_heads).to(tl.int64), (line % kv_heads).to(tl.int64)
    m, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    token, query_heads = m // GROUP, head * GROUP + m % GROUP
    rows = tokens * GROUP
    live = m < rows
    before, count = token_counts(seen, lengths, row, tokens)
    heads = kv_heads * GROUP
    # Loaded here, and not when it is certain that they are needed, so as not to wait for `seen` first.
    query_rows = query + row * query_row + query_heads * query_head + token.to(tl.int64) * query_token
    batch = tl.num_programs(0) // kv_heads
    table_rows = (row * tokens + token) * PAIRS
    q = load_rotated(
        query_rows, cos + table_rows, sin + table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
    )
    slopes = None
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + query_heads, mask=live, other=0.0) * 1.4426950408889634
    if count == 0:
        if part == 0:
            nothing = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            store_output(out, nothing, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
        return

    ring = slots - num_sinks
    held = tl.minimum(tl.maximum(before - num_sinks, 0), ring).to(tl.int32)
    tiles = tl.cdiv(held, BLOCK_N)
    tiles_each = tl.maximum(tl.cdiv(tiles, tl.maximum(parts - 1, 1)), 1)
    last_part = tl.where(parts > 1, tl.cdiv(tiles, tiles_each), 0)
    if part > last_part:
        return

    largest = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    # Of what the ring held before, a slot's age is the distance of its token from the newest.
    newest = (tl.maximum(before - 1 - num_sinks, 0) % ring).to(tl.int32)
    oldest_age = tl.minimum(held, window - 1)
    first_slot = line.to(tl.int64) * slots + num_sinks
    n = tl.arange(0, BLOCK_N)
    for tile in tl.range(part * tiles_each, tl.minimum((part + 1) * tiles_each, tiles)):
        start = tile * BLOCK_N
        age = newest - (start + n)
        age = tl.where(age < 0, age + ring, age)
        present = (start + n < ring) & (age < oldest_age)
        k = load_block(keys + (first_slot + start) * HEAD_DIM + n * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
        v = load_block(values + (first_slot + start) * VALUE_DIM + n * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
        visible = present[None, :]
        if not APPEND:
            visible = visible & (age[None, :] + token[:, None] < window - 1)
        distance = age[None, :] + token[:, None] + 1
        largest, total, acc = attend(q, k, v, visible, distance, slopes, scale, cap, largest, total, acc, UPCAST)

    if part == last_part:
        new = tl.arange(0, BLOCK_NEW)
        arrived = new < count
        key_rows = key + row * key_row + head * key_head + new.to(tl.int64) * key_token
        value_rows = value + row * value_row + head * value_head + new.to(tl.int64) * value_token
        new_tables = (row * tokens + new) * PAIRS
        k_new = load_rotated(
            key_rows, cos + new_tables, sin + new_tables, arrived, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
        )
        v_new = load_block(value_rows, arrived, VALUE_DIM, BLOCK_V)
        if APPEND:
            slot = tl.where(before < num_sinks, before, num_sinks + tl.maximum(before - num_sinks, 0) % ring)
            slot = line.to(tl.int64) * slots + slot + new
            to_keys = keys + slot[:, None] * HEAD_DIM + d[None, :]
            to_values = values + slot[:, None] * VALUE_DIM + e[None, :]
            tl.store(to_keys, k_new, mask=arrived[:, None] & (d < HEAD_DIM)[None, :])
            tl.store(to_values, v_new, mask=arrived[:, None] & (e < VALUE_DIM)[None, :])
        # Not more tokens than the window come here, so each sees all those before it.
        between = token[:, None] - new[None, :]
        visible = arrived[None, :] & (between >= 0)
        largest, total, acc = attend(q, k_new, v_new, visible, between, slopes, scale, cap, largest, total, acc, UPCAST)

        table_rows += batch.to(tl.int64) * tokens * PAIRS
        q = load_rotated(
            query_rows, cos + table_rows, sin + table_rows, live, HEAD_DIM, BLOCK_D, PAIRS, INTERLEAVED, UPCAST
        )
        position = tl.minimum(before + token, num_sinks + window - 1).to(tl.int32)
        held_sinks = tl.minimum(before, num_sinks).to(tl.int32)
        for start in range(0, held_sinks, BLOCK_NEW):
            sink = start + new
            present = sink < held_sinks
            sink_slots = line.to(tl.int64) * slots + sink
            k = load_block(keys + sink_slots * HEAD_DIM, present, HEAD_DIM, BLOCK_D)
            v = load_block(values + sink_slots * VALUE_DIM, present, VALUE_DIM, BLOCK_V)
            distance = position[:, None] - sink[None, :]
            largest, total, acc = attend(
                q, k, v, present[None, :], distance, slopes, scale, cap, largest, total, acc, UPCAST
            )

    if last_part == 0:
        acc = normalise(acc, largest, total, sink_logits, query_heads, live)
        store_output(out, acc, row, token, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
        return

    first = line.to(tl.int64) * parts * rows
    statistics = partials + tl.num_programs(0).to(tl.int64) * parts * rows * VALUE_DIM
    mine = first + part * rows + m
    tl.store(partials + mine[:, None] * VALUE_DIM + e[None, :], acc, mask=live[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(statistics + mine * 2, largest, mask=live)
    tl.store(statistics + mine * 2 + 1, total, mask=live)
    tl.debug_barrier()  # all threads of this program have stored before one of them says so
    if tl.atomic_add(arrivals + line, 1, sem="acq_rel", scope="gpu") != last_part:
        return
    tl.store(arrivals + line, 0)

    # In the order of the parts, whichever came last, so that the result is the same every time.
    r = tl.arange(0, BLOCK_ROWS)
    real = r < rows
    all_largest = tl.full([BLOCK_ROWS], NO_SCORE, tl.float32)
    all_total = tl.zeros([BLOCK_ROWS], tl.float32)
    all_acc = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    for start in range(0, last_part + 1, BLOCK_PARTS):
        other = start + tl.arange(0, BLOCK_PARTS)
        there = first + other[:, None] * rows + r[None, :]
        whole = (other <= last_part)[:, None] & real[None, :]
        part_acc = tl.load(
            partials + there[:, :, None] * VALUE_DIM + e[None, None, :],
            mask=whole[:, :, None] & (e < VALUE_DIM)[None, None, :], other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        part_largest = tl.load(statistics + there * 2, mask=whole, other=NO_SCORE, cache_modifier=".cg")
        part_total = tl.load(statistics + there * 2 + 1, mask=whole, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(all_largest, tl.max(part_largest, 0))
        shrink, weights = tl.exp2(all_largest - larger), tl.exp2(part_largest - larger[None, :])
        all_total = all_total * shrink + tl.sum(part_total * weights, 0)
        all_acc = all_acc * shrink[:, None] + tl.sum(part_acc * weights[:, :, None], 0)
        all_largest = larger
    query_heads = head * GROUP + r % GROUP
    all_acc = normalise(all_acc, all_largest, all_total, sink_logits, query_heads, real)
    store_output(out, all_acc, row, r // GROUP, count, tokens, heads, query_heads, VALUE_DIM, BLOCK_V, UPCAST)
