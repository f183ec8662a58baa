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
    """Ring of one attention layer. Its memory is allocated when the layer first runs."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, state: SharedCacheState, layout: RingLayout) -> None:
        super().__init__()
        self.state = state
        self.layout = layout
        self.ring: RingKVCache | None = None

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
        self.is_initialized = True

    def free(self) -> None:
        """Release the memory of the ring."""
        self.ring = self.keys = self.values = None
        self.is_initialized = False
        self.__dict__.pop("batch_size", None)

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
            self.ring.reorder(beam_idx.to(self.ring.seen.device, torch.int64))

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; the number of rows may change."""
        if self.ring is not None:
            self.ring.take_rows(index)
            if self.state.counters is not self.ring:
                self.ring.share_seen(self.state.counters)
            self._ring_changed(self.ring)

    def _ring_changed(self, ring: RingKVCache) -> None:
        self.keys, self.values = ring.keys, ring.values
        self.batch_size = len(ring.keys)

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Hold these tensors (`RingKVCache.tensors`) in the ring, of as many rows as the counters have now."""
        if self.ring is not None:
            self.ring.replace(tensors, self.state.counters.seen, self.state.counters.peak)
            self._ring_changed(self.ring)

    def reset(self) -> None:
        """Start new streams in the same memory."""
        if self.ring is not None:
            self.ring.reset()


class StatefulSinkLayer(SinkLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]  # bases differ in `device`
    """Ring and states of a layer with attention and a convolutional or recurrent state (Falcon-H1)."""

    def __init__(self, state: SharedCacheState, layout: RingLayout, number_of_states: int) -> None:
        SinkLayer.__init__(self, state, layout)
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
    """What `SinkCache.save` saves of a layer of its own or of transformers, rows first: ring and states."""
    tensors: dict[str, Tensor] = {}
    if isinstance(layer, SinkLayer) and layer.ring is not None:
        tensors |= layer.ring.tensors
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
