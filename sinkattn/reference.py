"""The specification of streaming-exact attention: two implementations in plain PyTorch, for any dtype, simple and slow.

The query of token t sees ``visible(t)``: the first ``num_sinks`` tokens and the ``window`` most recent ones, itself
included. The position of a key is its rank among them; the query has the last position. The output for token t depends
on nothing else, and not on how the stream is cut into calls. A row may have fewer sinks than there is room for
(``row_sinks``), and tokens before ``begins`` are no longer seen, but for sinks. A ring of 8 bits holds tokens that are
not sinks as `quantise` rounds them, keys after `hadamard`, and a query sees them so, those of its own call too.

`streaming_attention` implements this literally, without a cache: it gathers and rotates every key for every query.
`sink_attention` runs over a ring: each key is rotated once, at its stream position, and each query twice. Both agree
because rotary scores depend only on differences of positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sinkattn.rope import Rope, rotate, table_dtype


class Layout(Protocol):
    """The fields of `sinkattn.RingLayout` that are used here."""

    num_sinks: int
    window: int


class Ring(Protocol):
    """The fields of `sinkattn.RingKVCache` that are used here."""

    keys: Tensor
    values: Tensor
    seen: Tensor
    layout: Layout
    eight_bit: dict[str, Tensor]


LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Dtypes of 8 bits, and the number that the largest element of a vector becomes."""

MIN_LARGEST = 2.0**-100
"""Vectors are scaled as if their largest element were no smaller: so scales are normal numbers."""

SHORT_DIM = 32
"""int8 vectors of up to so many elements, a power of two, get the best of several scales."""

NUM_SCALES = 16
"""Of these; the k-th is (128 + k) / 128 times the first."""

TOO_LARGE_FOR_CHOICE = 2.0**15
"""Vectors with such an element, or a larger one, get the first scale: with another one it may become more than it was,
and too large for float16."""


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round vectors, the last dimension of ``x``, to 8 bits: ``dtype`` int8 or float8_e4m3fn.

    Returns q of that dtype, and fp32 scales ``[..., 1]``, one for each vector: ``q * scale`` stands for x. All steps
    are in fp32, each rounded to nearest even, so all devices give the same bits. A vector with an infinite element or
    NaN gets a scale of NaN.

    The scale makes the largest element the largest number of the dtype. int8 vectors of up to `SHORT_DIM` elements have
    the one with the least squared error of `NUM_SCALES`, this and larger ones up to an eighth more: errors of few
    elements differ much from scale to scale.
    """
    x = x.float()
    limit = LIMITS[dtype]
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_LARGEST)
    # By a tensor: PyTorch divides CUDA tensors by a number as a product with its reciprocal, which rounds twice.
    scale = largest / torch.full_like(largest, limit)
    is_finite = x.isfinite().all(dim=-1, keepdim=True)
    if dtype == torch.int8 and x.shape[-1] <= SHORT_DIM:
        factor = _best_factor(torch.where(is_finite, x / scale, 0))
        scale = scale * torch.where(largest < TOO_LARGE_FOR_CHOICE, factor, 1)
    scaled = torch.where(is_finite, x / scale, 0)
    q = scaled.round() if dtype == torch.int8 else scaled.clamp(-limit, limit)
    return q.to(dtype), torch.where(is_finite, scale, torch.nan)


def _best_factor(scaled: Tensor) -> Tensor:
    """Factor ``[..., 1]`` of the scale that gives int8 vectors the least squared error, of those allowed.

    scaled: the vectors, divided by the first scale.
    """
    steps = torch.arange(128, 128 + NUM_SCALES, device=scaled.device)[:, None]
    x = scaled[..., None, :] / (steps.float() / 128)
    # In 32nds of a scale, as integers: so sums have no order.
    errors = (x * 32).round().long() - 32 * x.round().long()
    ranks = errors.square().sum(dim=-1, keepdim=True) * steps.square() * NUM_SCALES + steps % 128
    return (128 + ranks.amin(dim=-2) % NUM_SCALES).float() / 128


def hadamard(x: Tensor) -> Tensor:
    """Product of vectors, the last dimension of ``x``, with a Hadamard matrix H of ones and minus ones: H H = b.

    In blocks of b elements, the largest power of two that divides the dimension: so each is spread over a whole block.
    Sums and differences of two elements at a time, 1, 2, 4, ... apart (the fast Walsh-Hadamard transform), in fp32 or
    fp64, so all devices give the same bits.
    """
    x = x.to(table_dtype(x.dtype))
    block, distance = hadamard_block(x.shape[-1]), 1
    while distance < block:
        a, b = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        distance *= 2
    return x


def hadamard_block(dim: int) -> int:
    """Elements of a block of `hadamard`."""
    return dim & -dim


def dequantise_keys(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys that a ring of 8 bits holds as ``q`` and ``scales``, in fp32 or fp64: H (q * scale) / b."""
    return hadamard(q.to(dtype) * scales.to(dtype)) / hadamard_block(q.shape[-1])


class _Slots(NamedTuple):
    """Keys or values of one row, ``[kv_heads, slots, dim]``, by slot: sinks, then the ring."""

    ring: Tensor
    sinks: Tensor | None
    scales: Tensor | None
    are_keys: bool

    @classmethod
    def of_row(cls, row: int, ring: Tensor, sinks: Tensor | None, scales: Tensor | None, *, are_keys: bool) -> _Slots:
        """Slots of one row of a cache."""
        sinks, scales = (None if x is None else x[row] for x in (sinks, scales))
        return cls(ring[row], sinks, scales, are_keys)

    def write(self, slot: int, x: Tensor) -> None:
        """Write one token, ``[kv_heads, dim]``."""
        if self.sinks is None or self.scales is None:
            self.ring[:, slot] = x
        elif slot < (num_sinks := self.sinks.shape[1]):
            self.sinks[:, slot] = x
        else:
            x = hadamard(x) if self.are_keys else x
            self.ring[:, slot - num_sinks], self.scales[:, slot - num_sinks] = quantise(x, self.ring.dtype)

    def read(self, slots: list[int], dtype: torch.dtype) -> Tensor:
        """Tokens in the order of ``slots``, ``[kv_heads, tokens, dim]``."""
        index = torch.tensor(slots, device=self.ring.device)
        if self.sinks is None or self.scales is None:
            return self.ring[:, index]
        wide = table_dtype(dtype)
        if self.are_keys:
            ring = dequantise_keys(self.ring, self.scales, wide)
        else:
            ring = self.ring.to(wide) * self.scales.to(wide)
        return torch.cat((self.sinks.to(dtype), ring.to(dtype)), dim=1)[:, index]


def visible(token: int, num_sinks: int, window: int, begin: int = 0) -> list[int]:
    """Tokens that the query of ``token`` sees, oldest first; the index in the list is the rotary position.

    begin: first token that the window may hold, at most ``token``.
    """
    return [*range(min(num_sinks, token + 1)), *range(max(num_sinks, token - window + 1, begin), token + 1)]


def slot_of(token: int, num_sinks: int, ring: int, ring_slot: int | None = None) -> int:
    """Slot of a token in a cache with ``ring`` slots from ``ring_slot`` on, which follow the sinks if it is None."""
    ring_slot = num_sinks if ring_slot is None else ring_slot
    return token if token < num_sinks else ring_slot + (token - num_sinks) % ring


def attention_weights(
    scores: Tensor,
    distances: Tensor,
    *,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Softmax of the scaled scores ``[heads, keys]`` of one query, in the dtype of the rotary tables.

    distances: ``[keys]`` cache-relative distance from query to key, in tokens, for ALiBi (arXiv 2108.12409).
    softcap: ``softcap * tanh(scores / softcap)`` (Gemma 2). sink_logits: ``[heads]`` extra logit without a value
    (gpt-oss).
    """
    scores = scores.to(table_dtype(scores.dtype))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None] * distances.to(scores.dtype)
    if sink_logits is not None:
        scores = torch.cat((scores, sink_logits.to(scores.dtype)[:, None]), dim=-1)
    weights = scores.softmax(dim=-1)
    return weights[:, :-1] if sink_logits is not None else weights


def attend(
    parts: list[tuple[Tensor, Tensor]], values: Tensor, distances: Tensor, *, scale: float, **options: Any
) -> Tensor:
    """Output ``[heads, value_dim]`` of one query over the keys that it sees.

    parts: pairs of a query ``[heads, head_dim]``, rotated for some keys, and these keys ``[heads, keys, head_dim]``;
    values: ``[heads, keys, value_dim]`` of all of them. distances, options: as for `attention_weights`.
    """
    # The power of two in the scale goes into the query before the dot product, which is exact: fp16 scores would
    # overflow otherwise.
    mantissa, exponent = math.frexp(scale)
    scores = torch.cat([keys @ (query * 2.0**exponent)[:, :, None] for query, keys in parts], dim=1)[..., 0]
    weights = attention_weights(scores * mantissa, distances, **options)
    return (weights[:, None].to(values.dtype) @ values)[:, 0]


def _per_row(given: Tensor | None, batch: int, otherwise: int) -> list[int]:
    return [otherwise] * batch if given is None else given.tolist()


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_sinks: int,
    window: int,
    rope: Rope | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    row_sinks: Tensor | None = None,
    begins: Tensor | None = None,
) -> Tensor:
    """Attention over whole streams from their first token; gathers and rotates every key for every query.

    query ``[batch, heads, tokens, head_dim]``, key and value ``[batch, kv_heads, tokens, head_dim]``, not rotated;
    lengths ``[batch]``: tokens of each stream; the output of the others, padding, is zero. row_sinks ``[batch]``: sinks
    of each stream, instead of ``num_sinks``; begins ``[batch, tokens]``: first token that the window of each query may
    hold. Returns the shape of query (with the head_dim of value).
    """
    batch, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = query.new_zeros(batch, heads, tokens, value.shape[-1])
    sinks = _per_row(row_sinks, batch, num_sinks)
    for row, count in enumerate(_per_row(lengths, batch, tokens)):
        for token in range(count):
            begin = 0 if begins is None else int(begins[row, token])
            gathered = torch.tensor(visible(token, sinks[row], window, begin), device=query.device)
            positions = torch.arange(len(gathered), device=query.device)
            q, k, v = query[row, :, token], key[row][:, gathered], value[row][:, gathered]
            if rope is not None:
                cos, sin = rope.tables(positions, table_dtype(query.dtype))
                q = rotate(q, cos[-1], sin[-1], interleaved=rope.interleaved)
                k = rotate(k, cos, sin, interleaved=rope.interleaved)
            k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
            out[row, :, token] = attend(
                [(q, k)],
                v,
                positions[-1] - positions,
                scale=scale,
                sink_logits=sink_logits,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
            )
    return out


def sink_attention_(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_sinks: int,
    window: int,
    scale: float,
    interleaved: bool = False,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    rows: Tensor | None = None,
    row_sinks: Tensor | None = None,
    begins: Tensor | None = None,
    sink_keys: Tensor | None = None,
    sink_values: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Append to the ring and attend, token by token; writes keys and values, does not change ``seen``.

    The arguments are those of `sinkattn.ops.sink_attention_`. Over a ring of 8 bits the query may be in fp64, for an
    exact output of what key and value, in the dtype of the sinks, leave in the ring.
    """
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or none")
    batch, heads, tokens, _ = query.shape
    groups = heads // keys.shape[1]
    ring = keys.shape[2] - (num_sinks if sink_keys is None else 0)
    out = query.new_zeros(batch, heads, tokens, values.shape[-1])
    cache_rows = range(batch) if rows is None else rows.tolist()
    all_sinks, all_begins = _per_row(row_sinks, batch, num_sinks), _per_row(begins, batch, 0)
    for row, count in enumerate(_per_row(lengths, batch, tokens)):
        cache_row, of_row = cache_rows[row], all_sinks[row]
        row_keys = _Slots.of_row(cache_row, keys, sink_keys, key_scales, are_keys=True)
        row_values = _Slots.of_row(cache_row, values, sink_values, value_scales, are_keys=False)
        for i in range(count):
            token = int(seen[row]) + i
            new_key, q_window, q_sink = key[row, :, i], query[row, :, i], query[row, :, i]
            if cos is not None and sin is not None:
                new_key, q_window = (
                    rotate(
                        x, *(table[0, row, i].to(table_dtype(x.dtype)) for table in (cos, sin)), interleaved=interleaved
                    )
                    for x in (new_key, q_window)
                )
                q_sink = rotate(q_sink, cos[1, row, i], sin[1, row, i], interleaved=interleaved)
            slot = slot_of(token, of_row, ring, num_sinks)
            row_keys.write(slot, new_key)
            row_values.write(slot, value[row, :, i])

            tokens_seen = visible(token, of_row, window, all_begins[row])
            slots = [slot_of(t, of_row, ring, num_sinks) for t in tokens_seen]
            sinks = min(of_row, token + 1)
            k, v = (x.read(slots, query.dtype).repeat_interleave(groups, dim=0) for x in (row_keys, row_values))
            out[row, :, i] = attend(
                [(q_sink, k[:, :sinks]), (q_window, k[:, sinks:])],
                v,
                torch.arange(len(tokens_seen) - 1, -1, -1, device=keys.device),
                scale=scale,
                sink_logits=sink_logits,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
            )
    return out


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: Ring,
    *,
    rope: Rope | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    rows: Tensor | None = None,
    row_sinks: Tensor | None = None,
    begins: Tensor | None = None,
) -> Tensor:
    """Specification of `sinkattn.sink_attention`, on a ring of any dtype and device. Advances ``ring.seen``."""
    tokens = query.shape[2]
    seen = ring.seen if rows is None else ring.seen[rows]
    layout = ring.layout
    cos, sin = (None, None)
    if rope is not None:
        cos, sin = rope.stream_tables(
            seen,
            tokens,
            num_sinks=layout.num_sinks,
            window=layout.window,
            dtype=table_dtype(query.dtype),
            row_sinks=row_sinks,
            begins=begins,
        )
    out = sink_attention_(
        ring.keys,
        ring.values,
        query,
        key,
        value,
        seen,
        cos,
        sin,
        num_sinks=layout.num_sinks,
        window=layout.window,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        interleaved=rope is not None and rope.interleaved,
        lengths=lengths,
        sink_logits=sink_logits,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        rows=rows,
        row_sinks=row_sinks,
        begins=begins,
        **ring.eight_bit,
    )
    seen = seen + (tokens if lengths is None else lengths)
    ring.seen[slice(None) if rows is None else rows] = seen
    return out
