"""Layers of the cache of an enabled model, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from sinkattn.hf.id_history import IdHistory
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache


@dataclass
class Streams:
    """What the layers of a cache share."""

    layout: RingLayout
    """Of the layers with full attention."""
    history: IdHistory
    """Ids that the streams were fed."""
    tokens_seen: int = 0
    """Columns that every row was fed, padding included: without any, the host's copy of the ring's `seen`."""
    peak: int = 0
    """The most columns that were ever written, whether they count or not."""
    ring: RingKVCache | None = None
    """The ring whose counters all layers use."""
    noted: Tensor | None = None
    """Ids that the whole model was given in the forward under way, for a decoder that gets embeddings."""
    ids_alone: bool = True
    """The model was never given anything that ids do not say, like pictures."""
    ids: Tensor | None = None
    """Ids of the forward under way; None if nobody has them."""
    arriving: int | None = None
    """Columns of the forward under way; None between forwards."""
    unusable: str | None = None
    """Why the streams cannot go on, as a message."""
    mendable: bool = True
    """Streams that cannot go on can be fed anew."""
    generating: bool = False
    """`generate` runs: masks of past columns are its own."""
    interrupted: bool = False
    """The last `generate` has begun, and did not come to its end."""
    origin: int | None = None
    """Column from which `generate`, which may know the new ones alone, counts; None if that is the stream's own."""
    plan: Callable[[], None] | None = None
    """What the first forward of `generate` has to do first."""
    ended: Tensor | None = None
    """Rows that `generate` feeds padding because they have ended: bool ``[batch]``."""
    pending: tuple[Tensor, int] | None = None
    """Rows whose last returned id, not fed yet, is such padding, bool ``[batch]``; and the id of padding."""
    fed_before: tuple[Tensor, Tensor] | None = None
    """All ids that `generate` has, and which are tokens of the streams already, ``[batch, columns]`` each."""
    given: Tensor | None = None
    """Tokens of every row before and after what `generate` was last given, int64 ``[batch, 2]``, on the device."""


class SinkLayer(CacheLayerMixin):
    """Ring of one attention layer, by the layout that its layer has. Holds no memory until its layer first runs."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, streams: Streams, layout: RingLayout) -> None:
        super().__init__()
        self.streams = streams
        self.layout = layout
        self.ring: RingKVCache | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back however long the stream is."""
        return self.layout.headroom > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys and values like these."""
        batch, kv_heads, _, head_dim = key_states.shape
        self.ring = RingKVCache(
            batch,
            kv_heads,
            head_dim,
            value_dim=value_states.shape[-1],
            dtype=value_states.dtype,
            device=key_states.device,
            layout=self.layout,
            share_seen_with=self.streams.ring,
        )
        if self.streams.ring is None:
            self.streams.ring = self.ring
        self.keys, self.values = self.ring.keys, self.ring.values
        self.batch_size = batch
        self.is_initialized = True

    def drop(self) -> None:
        """Give the memory back."""
        self.ring = self.keys = self.values = None
        self.is_initialized = False
        self.__dict__.pop("batch_size", None)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through: the attention function appends them to the ring itself."""
        if self.streams.arriving is None:
            raise RuntimeError("cache: a SinkCache works only in the model that sinkattn.enable prepared")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask, which is never made: the ring knows what is visible."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens ever seen, not slots in use: what `generate` cuts its inputs by.

        Within a forward, where models make things of that size, no more than the new ones can see; within `generate`,
        those that it knows of.
        """
        streams = self.streams
        seen, layout = streams.tokens_seen, streams.layout
        if streams.arriving is not None:
            return min(seen, layout.num_sinks + layout.window - 1)
        return seen - (streams.origin or 0)

    def get_max_length(self) -> int:
        """Return -1: a stream has no maximum length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in place."""
        if self.ring is not None:
            self.ring.reorder(beam_idx.to(self.ring.seen.device, torch.int64))

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row ``index[i]`` was; there may be another number of rows then."""
        if self.ring is not None:
            self.ring.take_rows(index)
            if self.streams.ring is not self.ring:
                self.ring.share_seen(self.streams.ring)
            self.keys, self.values = self.ring.keys, self.ring.values
            self.batch_size = len(index)

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        if self.ring is not None:
            self.ring.reset()


class StatefulSinkLayer(SinkLayer, LinearAttentionAndFullAttentionLayer):
    """Ring of a layer that has a convolution or a recurrent state beside its attention (Falcon-H1)."""

    def __init__(self, streams: Streams, layout: RingLayout, number_of_states: int) -> None:
        SinkLayer.__init__(self, streams, layout)
        LinearAttentionLayer.__init__(self, number_of_states)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back however long the stream is."""
        return SinkLayer.is_croppable.fget(self) and LinearAttentionLayer.is_croppable.fget(self)

    def lazy_initialization(self, *args, **kwargs) -> None:
        """For keys and values, as arguments by place, or for states, as arguments by name."""
        (SinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        SinkLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        SinkLayer.reset(self)
        LinearAttentionLayer.reset(self)
