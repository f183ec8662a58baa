"""`RingKVCache`, the cache of a batch of streams, and `sink_attention` over it; no transformers needed."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sinkattn import ops
from sinkattn.argument_checks import check_kind, check_tensors, check_whole
from sinkattn.reference import dequantise_keys
from sinkattn.rope import Rope, table_dtype

CacheDtype = Literal["int8", "fp8"]


class RingKVCache:
    """Keys and values of ``batch_size`` streams in a fixed number of slots, evicted in place.

    The first ``num_sinks`` tokens of a stream are never evicted. The ``window`` most recent ones are in a ring of
    ``window + headroom`` slots, where a new token overwrites the oldest. Cached keys are never moved or rotated again.

    With a ``cache_dtype`` tokens that are not sinks are held in 8 bits: each vector is rounded once, when it is
    written, with a scale of its own (`sinkattn.reference.quantise`; keys after `sinkattn.reference.hadamard`), and
    every query sees it so. Sinks stay in ``dtype``.

    Args:
        batch_size, kv_heads, head_dim: shape of the cache; one row per stream.
        num_sinks: first tokens that are never evicted (0 or more).
        window: most recent tokens a query sees, itself included (1 or more).
        headroom: spare ring slots: the number of tokens that can always be rolled back.
        value_dim: head_dim of the values, if different.
        dtype: float32, float16, bfloat16 or float64 (not with a cache_dtype); default: torch's. Of queries and outputs.
        device: default: torch's.
        cache_dtype: "int8", or "fp8" for float8_e4m3fn; None holds all tokens in ``dtype``.
        layout: a `RingLayout`, instead of num_sinks, window and headroom.
        share_seen_with: another ring; this one reads its token counters and does not advance them (layers of a model).

    Attributes:
        keys, values: ``[batch, kv_heads, num_sinks + ring, head_dim]``; keys are rotated at their stream position. With
            a cache_dtype ``[batch, kv_heads, ring, head_dim]``, without the sinks.
        eight_bit: with a cache_dtype, what `sinkattn.ops.append_` takes beside them: ``sink_keys``, ``sink_values``,
            ``key_scales`` and ``value_scales``; else empty.
        seen: int64 ``[batch]`` tokens ever appended to each stream, on the device.
        arrivals: int32 ``[batch, kv_heads]`` completion counters of the KV splits on a GPU, zero between calls.
        layout: `RingLayout`, the slot arithmetic.

    Raises:
        ValueError: an argument; the message names it.
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        num_sinks: int = 4,
        window: int = 1020,
        headroom: int = 0,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cache_dtype: CacheDtype | None = None,
        layout: ops.RingLayout | None = None,
        share_seen_with: RingKVCache | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "kv_heads": kv_heads, "head_dim": head_dim}
        if value_dim is not None:
            sizes["value_dim"] = value_dim
        for name, size in sizes.items():
            check_whole(name, size, 1)
        for name, number in (("num_sinks", num_sinks), ("window", window), ("headroom", headroom)):
            check_whole(name, number, None)
        for name, x, kind in (("layout", layout, ops.RingLayout), ("share_seen_with", share_seen_with, RingKVCache)):
            if x is not None:
                check_kind(name, x, kind, f"a {kind.__name__}")
        # Dynamo cannot trace the C++ constructor, so a ring that is made inside torch.compile is given its layout.
        self.layout = ops.RingLayout(num_sinks, window, headroom) if layout is None else layout
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in ops.DTYPES:
            raise ValueError(f"dtype: expected one of {ops.DTYPES}, got {dtype}")
        if cache_dtype is not None:
            check_cache_dtype(cache_dtype)
            if dtype == torch.float64:
                raise ValueError("dtype: expected float32, float16 or bfloat16 with a cache_dtype, got torch.float64")
        value_dim = head_dim if value_dim is None else value_dim
        if share_seen_with is not None and len(share_seen_with.seen) != batch_size:
            raise ValueError(f"share_seen_with: expected a ring of {batch_size} rows, got {len(share_seen_with.seen)}")
        # Ordinary tensors even under torch.inference_mode(): the stream may continue outside of it.
        with torch.inference_mode(False):
            # Zeros, as an unwritten slot has weight 0, and 0 times NaN would be NaN.
            def zeros(slots: int, dim: int, dtype: torch.dtype) -> Tensor:
                return ops.zeros(batch_size, kv_heads, slots, dim, dtype=dtype, device=device)

            self.eight_bit: dict[str, Tensor] = {}
            if cache_dtype is None:
                slots, stored = self.layout.slots, dtype
            else:
                slots, stored = self.layout.ring, ops.EIGHT_BIT_DTYPES[cache_dtype]
                self.eight_bit = {
                    "sink_keys": zeros(self.layout.num_sinks, head_dim, dtype),
                    "sink_values": zeros(self.layout.num_sinks, value_dim, dtype),
                    "key_scales": zeros(slots, 1, torch.float32),
                    "value_scales": zeros(slots, 1, torch.float32),
                }
            self.keys, self.values = zeros(slots, head_dim, stored), zeros(slots, value_dim, stored)
            self.arrivals = torch.zeros(batch_size, kv_heads, dtype=torch.int32, device=device)
            self._owns_seen = True
            self.seen: Tensor = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self._peak = torch.zeros_like(self.seen)
        if share_seen_with is not None:
            self.share_seen(share_seen_with)

    def __repr__(self) -> str:
        """Shape, layout and dtype."""
        batch, kv_heads, _, head_dim = self.keys.shape
        cache_dtype = f"cache_dtype={self.cache_dtype!r}, " if self.eight_bit else ""
        return (
            f"RingKVCache(batch_size={batch}, kv_heads={kv_heads}, head_dim={head_dim}, "
            f"num_sinks={self.layout.num_sinks}, window={self.layout.window}, headroom={self.layout.headroom}, "
            f"dtype={self.dtype}, {cache_dtype}device={self.keys.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of queries, new keys and values, outputs and sinks."""
        return self.eight_bit["sink_keys"].dtype if self.eight_bit else self.keys.dtype

    @property
    def cache_dtype(self) -> CacheDtype | None:
        """Name of the dtype of tokens that are not sinks; None if it is `dtype`."""
        names: dict[torch.dtype, CacheDtype] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
        return names.get(self.keys.dtype)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held of the tokens, by name, rows first: ``keys``, ``values`` and what `eight_bit` has."""
        return {"keys": self.keys, "values": self.values, **self.eight_bit}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors of keys, each with that of values, which have slots."""
        tensors = list(self.tensors.values())
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return [(x, y) for x, y in pairs if x.shape[2]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens; they do not grow with the streams."""
        return sum(x.nbytes for x in self.tensors.values())

    def append(self, key: Tensor, value: Tensor, *, rope: Rope | None = None, lengths: Tensor | None = None) -> None:
        """Append tokens without attending, and advance ``seen``.

        key, value ``[batch, kv_heads, tokens, head_dim]``, key not yet rotated; lengths int64 ``[batch]``: tokens of
        each row, the others are padding. Raises ValueError, TypeError or RuntimeError, with nothing changed.
        """
        check_tensors(key=key)
        if key.ndim != 4:
            raise ValueError(f"key: expected [batch, kv_heads, tokens, head_dim], got {list(key.shape)}")
        cos, sin = _tables(self, rope, self.seen, key.shape[2])
        ops.append_(
            self.keys,
            self.values,
            key,
            value,
            self.seen,
            num_sinks=self.layout.num_sinks,
            lengths=lengths,
            cos=None if cos is None else cos[0],
            sin=None if sin is None else sin[0],
            interleaved=rope is not None and rope.interleaved,
            **self.eight_bit,
        )
        self.advance(key.shape[2] if lengths is None else lengths.clamp(0, key.shape[2]))

    def advance(self, tokens: int | Tensor, rows: Tensor | None = None) -> None:
        """Add to ``seen``, of all rows or of ``rows`` (int64, all different), unless another ring owns the counters."""
        if not self._owns_seen:
            return
        if rows is None:
            self.seen += tokens
        else:
            self.seen[rows] += tokens

    def set_seen(self, seen: int, peak: int) -> None:
        """Count ``seen`` tokens in every row, of which, or of those since rolled back, ``peak`` were written."""
        self.seen.fill_(seen)
        self._peak.fill_(peak)

    def note_uncounted(self, tokens: int) -> None:
        """Record that up to ``tokens`` tokens beyond ``seen`` were written: they may have overwritten older ones."""
        torch.maximum(self._peak, self.seen + tokens, out=self._peak)

    def rollback(self, counts: int | Tensor, *, headroom: int | None = None) -> None:
        """Forget the last ``counts`` tokens, of every row or int64 ``[batch]``, as if they had never been appended.

        Raises RuntimeError, with nothing changed, if a row would go back more than ``headroom`` tokens behind the
        furthest point that it has reached, or has fewer tokens. The default headroom is the layout's; a caller that
        knows that no slot has been overwritten yet may pass more.
        """
        if not self._owns_seen:
            return
        if not isinstance(counts, Tensor):
            counts = torch.full_like(self.seen, counts)
        ops.check_tensor("counts", counts, tuple(self.seen.shape), torch.int64, self.seen.device)
        headroom = self.layout.headroom if headroom is None else headroom
        ops.rollback_(self.seen, self._peak, counts, headroom=headroom)

    def max_rollback(self, headroom: int | None = None) -> Tensor:
        """The most tokens that `rollback` can forget of each row: int64 ``[batch]``."""
        headroom = self.layout.headroom if headroom is None else headroom
        return torch.minimum(self.seen, (headroom - (torch.maximum(self._peak, self.seen) - self.seen)).clamp(min=0))

    def reorder(self, source: Tensor) -> None:
        """Row i becomes what row ``source[i]`` (int64 ``[batch]``) was, in place: beam search, forks."""
        ops.check_tensor("source", source, tuple(self.seen.shape), torch.int64, self.seen.device)
        for keys, values in self._pairs():
            ops.reorder_(keys, values, source)
        if self._owns_seen:
            self.seen.copy_(self.seen[source])
            self._peak.copy_(self._peak[source])

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` (int64) was, in new memory; the number of rows may change.

        A ring that shares its counters must call `share_seen` again.
        """
        with torch.inference_mode(False), torch.no_grad():
            seen, peak = self.seen, self._peak
            if self._owns_seen:
                seen, peak = seen[index], peak[index]
            self.replace({name: x[index] for name, x in self.tensors.items()}, seen, peak)

    @property
    def peak(self) -> Tensor:
        """The furthest point that each row has reached: int64 ``[batch]``; may be less where ``seen`` is that point."""
        return self._peak

    def replace(self, tensors: dict[str, Tensor], seen: Tensor, peak: Tensor) -> None:
        """Hold these `tensors` from now on, of any number of rows.

        Rings that share counters are given the same ones.
        """
        self.eight_bit = {name: tensors[name] for name in self.eight_bit}
        self.keys, self.values, self.seen, self._peak = tensors["keys"], tensors["values"], seen, peak
        self.arrivals = self.arrivals.new_zeros(self.keys.shape[:2])

    def share_seen(self, other: RingKVCache) -> None:
        """Read the token counters of another ring, which advances them."""
        self._owns_seen = False
        self.seen, self._peak = other.seen, other._peak

    def reset(self, rows: Tensor | None = None) -> None:
        """Start new streams in the given rows (int64, default all) and zero their memory."""
        if rows is None:
            rows = torch.arange(len(self.seen), device=self.seen.device)
        for keys, values in self._pairs():
            ops.reset_(keys, values, rows)
        if self._owns_seen:
            self.seen.index_fill_(0, rows, 0)
            self._peak.index_fill_(0, rows, 0)

    def linearise(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values in order of time: sinks, then the window, then zeros.

        ``[batch, kv_heads, num_sinks + window, head_dim]`` in `dtype`; row b holds ``min(seen[b], num_sinks + window)``
        tokens.
        """
        num_sinks, window = self.layout.num_sinks, self.layout.window
        if not self.eight_bit:
            return ops.linearise(self.keys, self.values, self.seen, num_sinks=num_sinks, window=window)
        sink_keys, sink_values, key_scales, value_scales = self.eight_bit.values()
        seen = (self.seen - num_sinks).clamp(min=0)
        sinks: tuple[Tensor, Tensor] = (sink_keys, sink_values)
        if num_sinks:
            sinks = ops.linearise(*sinks, self.seen.clamp(max=num_sinks), num_sinks=0, window=num_sinks)
        ring = zip(
            ops.linearise(self.keys, self.values, seen, num_sinks=0, window=window),
            ops.linearise(key_scales, value_scales, seen, num_sinks=0, window=window),
            strict=True,
        )
        (keys, key_scales), (values, value_scales) = ring
        in_ring = dequantise_keys(keys, key_scales, torch.float32), values.float() * value_scales
        keys, values = (torch.cat((x, y.to(self.dtype)), dim=2) for x, y in zip(sinks, in_ring, strict=True))
        return keys, values


def check_cache_dtype(cache_dtype: object) -> None:
    """Raise ValueError unless it names a dtype of 8 bits."""
    names = tuple(ops.EIGHT_BIT_DTYPES)
    if cache_dtype not in names:
        raise ValueError(f"cache_dtype: expected one of {names}, or None, got {cache_dtype!r}")


def _tables(
    ring: RingKVCache, rope: Rope | None, seen: Tensor, tokens: int, **options: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    check_kind("rope", rope, Rope, "a Rope or None")
    layout, dtype = ring.layout, table_dtype(ring.dtype)
    return rope.stream_tables(seen, tokens, num_sinks=layout.num_sinks, window=layout.window, dtype=dtype, **options)


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: RingKVCache,
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
    backend: ops.Backend = "auto",
) -> Tensor:
    """Append new tokens to ``ring``, attend, advance ``ring.seen``.

    A token's output depends only on the tokens it sees (the first ``num_sinks`` and the ``window`` most recent, itself
    included), not on how the stream is cut into calls. Positions are ranks among those tokens.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, not yet rotated; heads a multiple of kv_heads.
        key, value: ``[batch, kv_heads, tokens, head_dim]``, not yet rotated; any strides.
        ring: the cache of these streams, and with ``rows`` of others, which stay as they are.
        rope: rotary embedding; None for none.
        scale: factor on the scores; default ``1 / sqrt(head_dim)``.
        lengths: int64 ``[batch]`` new tokens of each row, followed by padding; all ``tokens`` if None.
        sink_logits: ``[heads]`` learned extra logit per head (gpt-oss).
        softcap: ``softcap * tanh(scores / softcap)`` (Gemma 2).
        alibi_slopes: ``[heads]`` ALiBi slopes, on cache-relative distances.
        rows: int64 ``[batch]`` the ring's row of each row of the call, all different; row i if None.
        row_sinks: int64 ``[batch]`` sink tokens of each row, up to the ring's ``num_sinks``; so many if None. It
            must be the same in all calls of a stream.
        begins: int64 ``[batch]`` first token of each row that a window may hold, up to ``ring.seen``; 0 if None. Tokens
            before it are not seen, but for sinks.
        backend: "auto", "cpu", "triton" or "reference"; the environment variable SINKATTN_BACKEND overrides.

    Returns:
        ``[batch, heads, tokens, value_dim]``; zeros for padding. It has gradients for ``query``, ``key``, ``value`` and
        ``sink_logits``; what the ring held before is a constant.

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument; nothing was changed.
        RuntimeError: rows, row_sinks, begins or lengths out of range; a backend that cannot run here; gradients for
            ``alibi_slopes``, or of a call with rows, row_sinks, begins or a ring of 8 bits. Nothing was changed.
    """
    per_head = {"sink_logits": sink_logits, "alibi_slopes": alibi_slopes}
    check_tensors(query=query, key=key, value=value, **{name: x for name, x in per_head.items() if x is not None})
    check_kind("ring", ring, RingKVCache, "a RingKVCache")
    if query.ndim != 4:
        raise ValueError(f"query: expected [batch, heads, tokens, head_dim], got {list(query.shape)}")
    batch, _, tokens, _ = query.shape
    seen, arrivals = ring.seen, ring.arrivals
    options = {"row_sinks": row_sinks, "begins": begins}
    for name, x in {"rows": rows, **options}.items():
        if x is not None:
            ops.check_tensor(name, x, (batch,), torch.int64, seen.device)
    if rows is not None:
        # The operator refuses rows out of range, with a message that says more.
        seen, arrivals = seen[rows.clamp(0, len(seen) - 1)], arrivals[:batch]
    cos, sin = _tables(ring, rope, seen, tokens, **options)
    out = ops.sink_attention_(
        ring.keys,
        ring.values,
        query,
        key,
        value,
        seen,
        cos,
        sin,
        num_sinks=ring.layout.num_sinks,
        window=ring.layout.window,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        interleaved=rope is not None and rope.interleaved,
        lengths=lengths,
        sink_logits=sink_logits,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        arrivals=arrivals,
        rows=rows,
        **options,
        **ring.eight_bit,
        backend=backend,
    )
    # GPU kernels clamp `lengths` instead of validating them, so clamp here too.
    ring.advance(tokens if lengths is None else lengths.clamp(0, tokens), rows)
    return out
