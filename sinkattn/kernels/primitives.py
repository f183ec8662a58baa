"""What both attention kernels are made of. Scores are in base 2: scaled by log2(e), so that exp2 is enough.

``None`` as an argument of a kernel is a compile-time constant, and what depends on it is left out.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

MAX_TOKENS = tl.constexpr(1 << 61)
"""Counts stay below this, so that no sum of two of them overflows; the same number as in csrc/ring.h."""

NO_SCORE = tl.constexpr(-3.4028234663852886e38)
"""Largest score of a row that has seen no key yet: the lowest finite one, for infinity minus itself is no number."""


@triton.jit
def token_counts(seen, lengths, row, tokens):
    """Tokens appended before (int64) and tokens that come now (int32); what is out of range is made harmless."""
    before = tl.minimum(tl.maximum(tl.load(seen + row), 0), MAX_TOKENS)
    count = tokens
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + row), 0), tokens).to(tl.int32)
    return before, count


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """``x`` in ``dtype``, to nearest even. The interpreter cuts fp32 off to bfloat16, so it needs help."""
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def load_block(rows, present, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors ``[rows, BLOCK]`` at pointers ``[rows]``; zeros for those not present, None standing for all."""
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
def load_rotated(
    rows, cos_rows, sin_rows, present, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Vectors ``[rows, BLOCK_D]`` rotated in fp32 and rounded once, to the dtype they come in (arXiv 2104.09864).

    rows: pointers ``[rows]`` to the first element of each; cos_rows, sin_rows: to the first pair of its tables.
    present: bool ``[rows]``; the others are zeros.
    """
    d = tl.arange(0, BLOCK_D)
    here = present[:, None] & (d < HEAD_DIM)[None, :]
    x = tl.load(rows[:, None] + d[None, :], mask=here, other=0.0)
    if PAIRS > 0:
        if INTERLEAVED:
            pair = d // 2
            partner = d ^ 1
            first = d % 2 == 0
        else:
            first = d < PAIRS
            pair = tl.where(first, d, d - PAIRS)
            partner = tl.where(first, d + PAIRS, d - PAIRS)
        turned = present[:, None] & (d < 2 * PAIRS)[None, :]
        y = tl.load(rows[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        cos = tl.load(cos_rows[:, None] + pair[None, :], mask=turned, other=1.0)
        sin = tl.load(sin_rows[:, None] + pair[None, :], mask=turned, other=0.0)
        sin = tl.where(first[None, :], -sin, sin)
        x = rounded(x.to(tl.float32) * cos + y * sin, x.dtype, UPCAST)
    return x


@triton.jit
def tanh(x):
    """In fp32."""
    # Near zero (1 - e) / (1 + e) would lose digits: x + x^3 p(x^2), relative error 4e-9 up to 0.625.
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
    """``a @ b + acc``, summed in fp32."""
    # The interpreter multiplies the bit patterns of bfloat16.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def attend(
    query, keys, values, visible, distance, slopes, scale, cap, largest, total, acc, UPCAST: tl.constexpr
):  # fmt: skip
    """One block of keys into a running softmax (arXiv 1805.02867): largest, total ``[m]`` and acc ``[m, v]``, fp32.

    query ``[m, d]``; keys ``[n, d]``; values ``[n, v]``, finite wherever nobody sees them. visible: bool, None for
    all; distance: of the key from the query, in tokens; both broadcast to ``[m, n]``. scale: factor on the products,
    divided by the cap if there is one; cap: softcap or None; slopes ``[m]`` or None: ALiBi. All three in base 2.
    """
    scores = tl.zeros([query.shape[0], keys.shape[0]], tl.float32)
    scores = matmul(query, tl.trans(keys), scores, UPCAST) * scale
    if cap is not None:
        scores = cap * tanh(scores)
    if slopes is not None:
        scores -= slopes[:, None] * distance.to(tl.float32)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(weights, 1)
    weights = rounded(weights, values.dtype, UPCAST)
    shrink = tl.broadcast_to(shrink[:, None], acc.shape)
    if values.dtype == tl.float32:
        # A block is summed by itself: the error of one sum over all grows with the root of the window. By fma, as the
        # compiler takes an addition for the start of the product's sum.
        acc = tl.fma(acc, shrink, matmul(weights, values, tl.zeros_like(acc), UPCAST))
    else:
        acc = matmul(weights, values, acc * shrink, UPCAST)
    return larger, total, acc


@triton.jit
def store_output(
    out, result, row, token, count, tokens, heads, query_heads, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr
):  # fmt: skip
    """Write ``result`` ``[m, v]`` to out ``[batch, tokens, heads, VALUE_DIM]``, zeros for tokens that do not count."""
    e = tl.arange(0, BLOCK_V)
    to = out + ((row * tokens + token) * heads + query_heads)[:, None] * VALUE_DIM + e[None, :]
    result = rounded(tl.where((token < count)[:, None], result, 0.0), out.dtype.element_ty, UPCAST)
    tl.store(to, result, mask=(token < tokens)[:, None] & (e < VALUE_DIM)[None, :])


@triton.jit
def normalise(acc, largest, total, sink_logits, heads, live):
    """Weighted mean of the values; a learned logit of each head takes weight and brings no value (gpt-oss)."""
    if sink_logits is not None:
        logits = tl.load(sink_logits + heads, mask=live, other=0.0) * 1.4426950408889634
        larger = tl.maximum(largest, logits)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.exp2(logits - larger)
        acc = acc * shrink[:, None]
    return tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape))
