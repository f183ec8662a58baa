"""Layers of a `SinkCache`: one ring per attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache


class SinkLayer(CacheLayerMixin):
    """Ring of one attention layer. Its memory is allocated when the layer first runs.

    Args:
        state: of the cache.
        layout: of the ring.
        model_factors: factors of new streams, powers of two, ``[kv_heads, head_dim]``; None for ones.

    Attributes:
        key_factors: what keys of the ring are divided by, and their queries multiplied, before they are rotated:
            ``[batch, kv_heads, head_dim]``, in the dtype of the ring; None for ones.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, state: SharedCacheState, layout: RingLayout, model_factors: Tensor | None = None) -> None:
        super().__init__()
        self.state = state
        self.layout = layout
        self.model_factors = model_factors
        self.ring: RingKVCache | None = None
        self.key_factors: Tensor | None = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # a property, as in some layers of transformers
        """Whether tokens can be rolled back at any length of the stream."""
        return self.layout.headroom > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring, with shape, dtype and device of these keys and values."""
        batch, kv_heads, _, head_dim = key_states.shape
        batch = self.state.num_rows or batch
        self.ring = RingKVCache(
            batch,
            kv_heads,
            head_dim,
            value_dim=value_states.shape[-1],
            dtype=value_states.dtype,
            device=key_states.device,
            cache_dtype=self.state.cache_dtype,
            layout=self.layout,
            share_seen_with=self.state.counter_ring,
        )
        if self.state.counter_ring is None:
            self.state.counter_ring = self.ring
        self._ring_changed(self.ring)
        self.set_factors(slice(None), self.model_factors)
        self.is_initialized = True

    def free(self) -> None:
        """Release the memory of the ring."""
        self.ring = self.keys = self.values = self.key_factors = None
        self.is_initialized = False
        self.__dict__.pop("batch_size", None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held of the streams, by name, rows first: `RingKVCache.tensors`, and ``key_factors`` if any."""
        tensors = {} if self.ring is None else self.ring.tensors
        return tensors if self.key_factors is None else {**tensors, "key_factors": self.key_factors}

    @property
    def key_exponents(self) -> Tensor:
        """Of `key_factors`, of a ring of 8 bits: int8 ``[batch, kv_heads, head_dim]``, 0 without any."""
        if self.key_factors is None:
            assert self.ring is not None
            return torch.zeros_like(self.ring.keys[:, :, 0], dtype=torch.int8)
        return self.key_factors.log2().round().to(torch.int8)

    def set_factors(self, rows: int | slice, factors: Tensor | None) -> None:
        """Set the factors ``[..., kv_heads, head_dim]`` that the keys of rows are divided by; None for ones."""
        if self.key_factors is None and factors is not None:
            assert self.ring is not None
            batch, kv_heads, _, head_dim = self.ring.keys.shape
            shape, dtype, device = (batch, kv_heads, head_dim), self.ring.dtype, self.ring.keys.device
            with torch.inference_mode(False):
                self.key_factors = torch.ones(shape, dtype=dtype, device=device)
        if self.key_factors is not None:
            self.key_factors[rows] = 1 if factors is None else factors

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values unchanged: the attention function appends them to the ring."""
        if not self.state.num_new_tokens:
            raise RuntimeError("cache: a SinkCache works only in the model that sinkattn.enable prepared")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and key offset of a mask. No mask is made from them: visibility follows from the ring."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Columns fed so far, not slots in use: `generate` slices its inputs by this number.

        Within `generate`, only columns of its own ids. Within a forward, at most ``num_sinks + window - 1``, because
        models allocate tensors of this length; within a compiled decode step always that, because another number would
        need another graph.
        """
        state = self.state
        seen, layout = state.num_columns, state.layout
        if state.compiled_seq_length is not None:
            return state.compiled_seq_length
        if state.num_new_tokens:
            return min(seen, layout.num_sinks + layout.window - 1)
        return seen - (state.generate_offset or 0)

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in place."""
        if self.ring is not None:
            beam_idx = beam_idx.to(self.ring.seen.device, torch.int64)
            self.ring.reorder(beam_idx)
            if self.key_factors is not None:
                self.key_factors.copy_(self.key_factors[beam_idx])

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; the number of rows may change."""
        if self.ring is not None:
            self.ring.take_rows(index)
            if self.state.counters is not self.ring:
                self.ring.share_seen(self.state.counters)
            if self.key_factors is not None:
                with torch.inference_mode(False), torch.no_grad():
                    self.key_factors = self.key_factors[index]
            self._ring_changed(self.ring)

    def _ring_changed(self, ring: RingKVCache) -> None:
        self.keys, self.values = ring.keys, ring.values
        self.batch_size = len(ring.keys)

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Hold these `layer_tensors`, of as many rows as the counters have now."""
        if self.ring is not None:
            self.ring.replace(tensors, self.state.counters.seen, self.state.counters.peak)
            self._ring_changed(self.ring)
            self.key_factors = None
            exponents = tensors.get("key_exponents")
            if exponents is not None and exponents.any():
                self.set_factors(slice(None), exponents.exp2())

    def reset(self) -> None:
        """Start new streams in the same memory."""
        if self.ring is not None:
            self.ring.reset()
            self.set_factors(slice(None), self.model_factors)


class StatefulSinkLayer(SinkLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]  # bases differ in `device`
    """Ring and states of a layer with attention and a convolutional or recurrent state (Falcon-H1)."""

    def __init__(
        self,
        state: SharedCacheState,
        layout: RingLayout,
        number_of_states: int,
        model_factors: Tensor | None = None,
    ) -> None:
        SinkLayer.__init__(self, state, layout, model_factors)
        LinearAttentionLayer.__init__(self, number_of_states)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # as in SinkLayer
        """Whether tokens can be rolled back at any length of the stream."""
        return super().is_croppable and LinearAttentionLayer.is_croppable.__get__(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Positional arguments allocate the ring, keyword arguments the states."""
        (SinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        SinkLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]  # annotated as LongTensor, a legacy type

    def reset(self) -> None:
        """Start new streams in the same memory."""
        SinkLayer.reset(self)
        LinearAttentionLayer.reset(self)


def layer_tensors(layer: Any) -> dict[str, Tensor]:
    """What `SinkCache.save` saves of a layer of its own or of transformers, rows first: ring and states.

    Of each layer with a ring of 8 bits ``key_exponents``, too: those of its factors, int8, 0 where it has none. So a
    file in which they are missing is noticed.
    """
    tensors: dict[str, Tensor] = {}
    if isinstance(layer, SinkLayer) and (ring := layer.ring) is not None:
        tensors |= ring.tensors
        if ring.eight_bit:
            tensors["key_exponents"] = layer.key_exponents
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for i in range(layer.number_of_states):
            conv, recurrent = layer.conv_states[i], layer.recurrent_states[i]
            if conv is not None:  # it may be longer where a layer records its past, which a crop would need
                tensors[f"conv_states.{i}"] = conv[..., -(layer.conv_kernel_size[i] or 0) :]
            if recurrent is not None:
                tensors[f"recurrent_states.{i}"] = recurrent
    return tensors


def load_layer(layer: Any, saved: SavedStreams) -> None:
    """Replace what `layer_tensors` returns by what was saved; the counters of the rings are replaced already."""
    tensors = {name: saved.like(name, x) for name, x in layer_tensors(layer).items()}
    if "keys" in tensors:
        layer.replace(tensors)
    for name, x in tensors.items():
        kind, _, i = name.partition(".")
        if i:
            getattr(layer, kind)[int(i)] = x
