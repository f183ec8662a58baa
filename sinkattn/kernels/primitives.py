"""Helpers of the decode and chunk kernels. Scores are scaled by log2(e), so that exp2 replaces exp.

A kernel argument of None is a compile-time constant, so code that depends on it is not generated.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

MAX_TOKENS = tl.constexpr(1 << 61)
"""Token counts are clamped to this, so that the sum of two cannot overflow; kMaxTokens in csrc/ring.h."""

LOWEST_SCORE = tl.constexpr(-3.4028234663852886e38)
"""Initial running maximum: the lowest finite fp32, as infinity minus infinity is NaN."""

MIN_LARGEST, TOO_LARGE_FOR_CHOICE = tl.constexpr(2.0**-100), tl.constexpr(2.0**15)
SHORT_DIM, NUM_SCALES = tl.constexpr(32), tl.constexpr(16)
"""The same as in `sinkattn.reference`."""


@triton.jit
def token_counts(seen, lengths, row, tokens, rows=None, cache_rows=None):
    """Tokens appended before (int64) and new tokens (int32) of a row, both clamped to their range.

    A row that is in none of the ``cache_rows`` rows of the cache has no new tokens.
    """
    before = tl.minimum(tl.maximum(tl.load(seen + row), 0), MAX_TOKENS)
    count = tokens
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + row), 0), tokens).to(tl.int32)
    if rows is not None:
        cache_row = tl.load(rows + row)
        count = tl.where((cache_row >= 0) & (cache_row < cache_rows), count, 0)
    return before, count


@triton.jit
def cache_kv_row_of(kv_row, rows, row, head, kv_heads):
    """The KV row of the cache that a KV row of the call is in."""
    cache_kv_row = kv_row
    if rows is not None:
        cache_kv_row = tl.load(rows + row) * kv_heads + head
    return cache_kv_row


@triton.jit
def sinks_of(row_sinks, row, num_sinks):
    """Sinks of a row (int32), clamped to the slots that there are for them."""
    sinks = num_sinks
    if row_sinks is not None:
        sinks = tl.minimum(tl.maximum(tl.load(row_sinks + row), 0), num_sinks).to(tl.int32)
    return sinks


@triton.jit
def position_of(token, sinks, window, begin):
    """Cache-relative position (int64) of the queries of ``token``: the number of keys that they see, minus one."""
    position = tl.minimum(token, sinks + window - 1)
    if begin is not None:
        position = tl.minimum(position, token - begin + sinks)
    return position


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest even. With UPCAST by hand: the interpreter truncates fp32 to bfloat16."""
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """`sinkattn.reference.hadamard` of fp32 vectors ``[n, d]`` in blocks of ``BLOCK`` elements, bit for bit."""
    rows: tl.constexpr = x.shape[0]
    dim: tl.constexpr = x.shape[1]
    # Elements 2 i and 2 i + 1 become i and i + BLOCK / 2: the bits of the index are turned by one. So the next step has
    # those that are twice as far apart side by side, and after as many steps as there are bits all are in their places.
    for _ in tl.static_range(BLOCK.bit_length() - 1):
        a, b = tl.split(tl.reshape(x, [rows, dim // BLOCK, BLOCK // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [rows, dim])
    return x


@triton.jit
def _best_factor(scaled):
    """`sinkattn.reference._best_factor` of vectors ``[n, d]``, bit for bit: fp32 ``[n]``."""
    best = tl.full([scaled.shape[0]], 2**32 - 1, tl.uint32)
    for k in tl.static_range(NUM_SCALES):
        x = tl.div_rn(scaled, tl.full(scaled.shape, (128 + k) / 128, tl.float32))
        # Rounded to nearest even, as in `quantise`.
        error = ((x * 32 + 1.5 * 2**23) - 1.5 * 2**23) - ((x + 1.5 * 2**23) - 1.5 * 2**23) * 32
        squares = tl.sum((error * error).to(tl.uint32), 1)
        best = tl.minimum(best, squares * ((128 + k) * (128 + k) * NUM_SCALES) + k)
    return 1.0 + (best % NUM_SCALES).to(tl.float32) / 128


@triton.jit
def quantise(x, dtype: tl.constexpr):
    """`sinkattn.reference.quantise` of vectors ``[n, d]``, bit for bit: q of ``dtype``, and fp32 scales ``[n]``."""
    x = x.to(tl.float32)
    # NaN is not less than infinity.
    size = tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))
    largest = tl.max(size, 1)
    is_finite = largest < float("inf")
    limit = tl.full(largest.shape, 127.0 if dtype == tl.int8 else 448.0, tl.float32)
    scale = tl.div_rn(tl.maximum(largest, MIN_LARGEST), limit)
    scaled = tl.where(is_finite[:, None], tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), 0.0)
    if dtype == tl.int8 and x.shape[1] <= SHORT_DIM:
        scale *= tl.where(largest < TOO_LARGE_FOR_CHOICE, _best_factor(scaled), 1.0)
        scaled = tl.where(is_finite[:, None], tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), 0.0)
    # The sum with 1.5 * 2^23 units of the last place of q has no room for a fraction of such a unit, so it is rounded
    # to nearest even. Neither the interpreter's cast to float8 rounds so, nor any cast to integers.
    shift = tl.full(x.shape, 1.5 * 2**23, tl.float32)
    if dtype != tl.int8:
        power = (scaled.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 2.0**-6) * (1.5 * 2**20)
    return ((scaled + shift) - shift).to(dtype), tl.where(is_finite, scale, float("nan"))


@triton.jit
def load_scales(scales, index, present):
    """Scales ``[n]`` of vectors of 8 bits, zeros where not ``present`` (None: all are); None of any other vectors."""
    loaded = None
    if scales is not None:
        if present is None:
            loaded = tl.load(scales + index)
        else:
            loaded = tl.load(scales + index, mask=present, other=0.0)
    return loaded


@triton.jit
def load_block(rows, present, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors ``[rows, BLOCK]`` at pointers ``[rows]``; zeros where not ``present``. None: all are present."""
    d = tl.arange(0, BLOCK)
    addresses = rows[:, None] + d[None, :]
    if present is not None:
        block = tl.load(addresses, mask=present[:, None] & (d < DIM)[None, :], other=0.0)
    elif DIM == BLOCK:
        block = tl.load(addresses)
    else:
        block = tl.load(addresses, mask=(d < DIM)[None, :], other=0.0)
    return block


@triton.jit
def store_block(rows, block, present, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store vectors ``[rows, BLOCK]`` at pointers ``[rows]``, where ``present``."""
    d = tl.arange(0, BLOCK)
    tl.store(rows[:, None] + d[None, :], block, mask=present[:, None] & (d < DIM)[None, :])


@triton.jit
def load_rotated(
    rows, cos_rows, sin_rows, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, UPCAST: tl.constexpr, HADAMARD: tl.constexpr = 1
):  # fmt: skip
    """Vectors ``[rows, BLOCK_D]``, rotated in fp32 and rounded once to their own dtype (arXiv 2104.09864).

    rows: pointers ``[rows]`` to the first element of each vector; cos_rows, sin_rows: to the first pair of its tables.
    present: bool ``[rows]``; the other vectors are zeros. HADAMARD: block of the `hadamard` that follows the rotation,
    before the rounding, divided by the block: of queries for keys of 8 bits.
    """
    d = tl.arange(0, BLOCK_D)
    in_head = present[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(rows[:, None] + d[None, :], mask=in_head, other=0.0)
    if PAIRS > 0:
        if INTERLEAVED:
            pair = d // 2
            partner = d ^ 1
            first = d % 2 == 0
        else:
            first = d < PAIRS
            pair = tl.where(first, d, d - PAIRS)
            partner = tl.where(first, d + PAIRS, d - PAIRS)
        is_rotated = present[:, None] & (d < 2 * PAIRS)[None, :]
        y = tl.load(rows[:, None] + partner[None, :], mask=is_rotated, other=0.0).to(tl.float32)
        cos = tl.load(cos_rows[:, None] + pair[None, :], mask=is_rotated, other=1.0)
        sin = tl.load(sin_rows[:, None] + pair[None, :], mask=is_rotated, other=0.0)
        sin = tl.where(first[None, :], -sin, sin)
        # Each product is rounded, as in other operators: compilers would fuse x * cos + p, but not a sum of two fma.
        zeros = tl.zeros_like(cos)
        x = tl.fma(x.to(tl.float32), cos, zeros) + tl.fma(y, sin, zeros)
    if HADAMARD > 1:
        x = hadamard(x.to(tl.float32), HADAMARD) * (1.0 / HADAMARD)
    if x.dtype != rows.dtype.element_ty:
        x = rounded(x, rows.dtype.element_ty, UPCAST)
    return x


@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32."""
    # (1 - e) / (1 + e) cancels near zero; up to 0.625 use x + x^3 p(x^2), relative error 4e-9.
    z = x * x
    p = -5.70498699e-3 * z + 2.06390872e-2
    p = p * z - 5.37397151e-2
    p = p * z + 1.33314422e-1
    p = p * z - 3.33332819e-1
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def matmul(a, b, acc, UPCAST: tl.constexpr):
    """``a @ b + acc``, accumulated in fp32; ``b`` may be of 8 bits, which are exact in the dtype of ``a``."""
    # The interpreter would multiply the bit patterns of bfloat16.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")


@triton.jit
def attend(
    query, keys, values, visible, distance, slopes, scale, cap, row_max, row_sum, acc, UPCAST: tl.constexpr,
    key_scales=None, value_scales=None
):  # fmt: skip
    """Add one block of keys to an online softmax (arXiv 1805.02867): row_max, row_sum ``[m]``, acc ``[m, v]``, fp32.

    query ``[m, d]``; keys ``[n, d]``; values ``[n, v]``, finite even where masked. visible: bool mask, None for all;
    distance: from query to key in tokens; both broadcast to ``[m, n]``. scale: factor on the dot products, divided by
    the softcap if there is one; cap: softcap or None; slopes: ALiBi slopes ``[m]`` or None. All three include log2(e).
    key_scales, value_scales: ``[n]`` what keys and values of 8 bits are multiplied by, or both None.
    """
    if key_scales is not None:
        scale = (key_scales * scale)[None, :]
    scores = tl.zeros([query.shape[0], keys.shape[0]], tl.float32)
    scores = matmul(query, tl.trans(keys), scores, UPCAST) * scale
    if cap is not None:
        scores = cap * tanh(scores)
    if slopes is not None:
        scores -= slopes[:, None] * distance.to(tl.float32)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    largest = None
    if value_scales is not None:
        if query.dtype == tl.float16:
            # A weight times a small scale may be too small for fp16, so the largest scale is left out until afterwards.
            largest = tl.maximum(tl.max(value_scales, 0), MIN_LARGEST / 512)
            value_scales = value_scales / largest
        weights *= value_scales[None, :]
    weights = rounded(weights, query.dtype, UPCAST)
    rescale = tl.broadcast_to(rescale[:, None], acc.shape)
    if largest is not None:
        acc = acc * rescale + matmul(weights, values, tl.zeros_like(acc), UPCAST) * largest
    elif query.dtype == tl.float32:
        # Sum each block separately: the error of one long sum grows with the square root of the window. An fma, as the
        # compiler would fold a plain addition into the dot's accumulator.
        acc = tl.fma(acc, rescale, matmul(weights, values, tl.zeros_like(acc), UPCAST))
    else:
        acc = matmul(weights, values, acc * rescale, UPCAST)
    return new_max, row_sum, acc


@triton.jit
def store_output(
    out, result, row, token, count, tokens, heads, query_heads, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr
):  # fmt: skip
    """Store ``result`` ``[m, v]`` in out ``[batch, tokens, heads, VALUE_DIM]``; zeros for padding."""
    e = tl.arange(0, BLOCK_V)
    to = out + ((row * tokens + token) * heads + query_heads)[:, None] * VALUE_DIM + e[None, :]
    result = rounded(tl.where((token < count)[:, None], result, 0.0), out.dtype.element_ty, UPCAST)
    tl.store(to, result, mask=(token < tokens)[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit
def normalise(acc, row_max, row_sum, sink_logits, heads, live):
    """Divide by the softmax sum; a sink logit of each head adds to the sum without a value (gpt-oss)."""
    if sink_logits is not None:
        logits = tl.load(sink_logits + heads, mask=live, other=0.0) * 1.4426950408889634
        new_max = tl.maximum(row_max, logits)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.exp2(logits - new_max)
        acc = acc * rescale[:, None]
    return tl.div_rn(acc, tl.broadcast_to(row_sum[:, None], acc.shape))


@triton.jit
def store_partial(
    partials, kv_row, num_kv_rows, split, num_splits, rows, m, live, row_max, row_sum, acc, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr
):  # fmt: skip
    """Store what one split of the keys gives rows ``m`` of ``kv_row``, for `combine_partials`.

    partials: fp32 ``[rows, VALUE_DIM]`` for every (kv_row, split), then ``[rows, 2]`` (maximum, sum) for every one.
    """
    e = tl.arange(0, BLOCK_V)
    statistics = partials + num_kv_rows.to(tl.int64) * num_splits * rows * VALUE_DIM
    offset = kv_row.to(tl.int64) * num_splits * rows + split * rows + m
    tl.store(partials + offset[:, None] * VALUE_DIM + e[None, :], acc, mask=live[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(statistics + offset * 2, row_max, mask=live)
    tl.store(statistics + offset * 2 + 1, row_sum, mask=live)


@triton.jit
def combine_partials(
    partials, kv_row, num_kv_rows, used_splits, num_splits, rows, m, live, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):  # fmt: skip
    """Running maximum, sum ``[m]`` and weighted values ``[m, v]`` of the first ``used_splits`` of ``num_splits``.

    In order of the splits, whichever was stored last, so that results are deterministic.
    """
    e = tl.arange(0, BLOCK_V)
    first = kv_row.to(tl.int64) * num_splits * rows
    statistics = partials + num_kv_rows.to(tl.int64) * num_splits * rows * VALUE_DIM
    row_max = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, used_splits, BLOCK_SPLITS):
        other = start + tl.arange(0, BLOCK_SPLITS)
        offsets = first + other[:, None] * rows + m[None, :]
        mask = (other < used_splits)[:, None] & live[None, :]
        split_acc = tl.load(
            partials + offsets[:, :, None] * VALUE_DIM + e[None, None, :],
            mask=mask[:, :, None] & (e < VALUE_DIM)[None, None, :], other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        split_max = tl.load(statistics + offsets * 2, mask=mask, other=LOWEST_SCORE, cache_modifier=".cg")
        split_sum = tl.load(statistics + offsets * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(split_max, 0))
        rescale, weights = tl.exp2(row_max - new_max), tl.exp2(split_max - new_max[None, :])
        row_sum = row_sum * rescale + tl.sum(split_sum * weights, 0)
        acc = acc * rescale[:, None] + tl.sum(split_acc * weights[:, :, None], 0)
        row_max = new_max
    return row_max, row_sum, acc
