"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkattn.hf.enabled import Enabled


# Ids that a cache keeps of how its streams began, to tell whole streams from new ids alone: those of the first forward
# up to the larger number, and of further ones up to the smaller.
MOST_REMEMBERED, LEAST_REMEMBERED = 512, 16


def find_swap(model: torch.nn.Module) -> Enabled | None:
    """What `enable` left on a model, or on one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


@dataclass
class Streams:
    """What the layers of a cache share."""

    layout: RingLayout
    """Of the layers with full attention."""
    tokens_seen: int = 0
    """Tokens counted in every row, padding included: without any, the host's copy of the ring's `seen`."""
    clean: int = 0
    """So many of the last of them are no padding, in any row."""
    ring: RingKVCache | None = None
    """The ring whose counters all layers use."""
    beginning: Tensor | None = None
    """Ids that the streams began with, ``[batch, tokens]``; None if that were embeddings."""
    ids: Tensor | None = None
    """Ids of the forward under way; None if it got embeddings."""
    arriving: int | None = None
    """Tokens of the forward under way; None between forwards."""
    broken: bool = False
    """A part of the window was overwritten by tokens that do not count."""


class SinkLayer(CacheLayerMixin):
    """Ring of one attention layer, by the layout that its layer has. Holds no memory until its layer first runs."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, streams: Streams, layout: RingLayout) -> None:
        super().__init__()
        self._streams = streams
        self.layout = layout
        self.ring: RingKVCache | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back at all."""
        return self.layout.headroom > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys and values like these."""
        batch, kv_heads, _, head_dim = key_states.shape
        self.ring = RingKVCache(
            batch,
            kv_heads,
            head_dim,
            self.layout.num_sinks,
            self.layout.window,
            self.layout.headroom,
            value_dim=value_states.shape[-1],
            dtype=value_states.dtype,
            device=key_states.device,
            share_seen_with=self._streams.ring,
        )
        if self._streams.ring is None:
            self._streams.ring = self.ring
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
        if self._streams.arriving is None:
            raise RuntimeError("cache: a SinkCache works only in the model that sinkattn.enable prepared")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask, which is never made: the ring knows what is visible."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens ever seen, not slots in use: what `generate` cuts its inputs by.

        Within a forward, where models make things of that size, no more than the new ones can see.
        """
        seen, layout = self._streams.tokens_seen, self._streams.layout
        return seen if self._streams.arriving is None else min(seen, layout.num_sinks + layout.window - 1)

    def get_max_length(self) -> int:
        """Return -1: a stream has no maximum length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in place."""
        if self.ring is not None:
            self.ring.reorder(beam_idx.to(self.ring.seen.device, torch.int64))

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
        """Whether tokens can be taken back at all."""
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


class SinkCache(Cache):
    """Constant-memory cache of an enabled model; pass it as ``cache`` (until transformers
    5.23: ``past_key_values``) and keep it between turns.

    Each layer keeps its sink tokens and a ring of recent ones, in place. `generate` on an enabled model makes one
    by itself; make your own to go on with a stream later. ``copy.deepcopy`` forks it.

    Args:
        model: a model that `sinkattn.enable` has prepared.
        max_batch_size: refuse larger batches. Memory is taken when the first batch comes, for that batch.

    Raises:
        ValueError: if the model is not enabled, or max_batch_size is below 1.
    """

    def __new__(cls, model: PreTrainedModel | None = None, *args, **kwargs) -> SinkCache:
        """Make the kind of cache that the model streams with."""
        swap = None if model is None else find_swap(model)  # None: a copy, or one that is unpickled
        return super().__new__(cls if swap is None else swap.cache_class)

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        swap = find_swap(model)
        if swap is None:
            raise ValueError("model: expected a model prepared by sinkattn.enable(model), got one that is not enabled")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected 1 or more, got {max_batch_size}")
        self.swap_id: str = swap.id
        self._max_batch_size = max_batch_size
        self._streams = Streams(swap.layout)
        super().__init__(layers=swap.cache_layers(self._streams))

    def __copy__(self) -> SinkCache:
        """Refused: two caches over one memory would overwrite each other."""
        raise TypeError("a SinkCache cannot be copied shallowly; copy.deepcopy makes an independent fork")

    @property
    def layout(self) -> RingLayout:
        """Slot arithmetic of the rings of all layers but those with a sliding window of their own."""
        return self._streams.layout

    @property
    def tokens_seen(self) -> int:
        """Tokens that every row has seen, padding included."""
        return self._streams.tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self._sink_layers if layer.ring is not None)

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before the first."""
        return None if self._streams.ring is None else self._streams.ring.seen

    @property
    def has_padding(self) -> bool:
        """Whether some rows may have seen fewer tokens than others."""
        return self._streams.clean < self._streams.tokens_seen

    @property
    def has_states(self) -> bool:
        """Whether some layers keep a state that is no ring."""
        return bool(self._state_layers)

    @property
    def _sink_layers(self) -> list[SinkLayer]:
        return [layer for layer in self.layers if isinstance(layer, SinkLayer)]

    @property
    def _state_layers(self) -> list[LinearAttentionCacheLayerMixin]:
        return [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]

    def continues_with(self, ids: Tensor) -> bool:
        """Whether ``ids`` ``[batch, tokens]`` are all of the stream so far and more, as opposed to new ones alone."""
        streams = self._streams
        if streams.tokens_seen == 0:
            return True
        if ids.shape[1] <= streams.tokens_seen:
            return False
        beginning = streams.beginning
        if beginning is None:
            return False  # nobody has the ids of embeddings
        return len(beginning) != len(ids) or self.common_beginning(ids) == beginning.shape[1]

    def common_beginning(self, ids: Tensor) -> int:
        """How many of the first ``ids`` ``[batch, tokens]`` are, in all rows, those that the stream began with."""
        beginning = self._streams.beginning
        if beginning is None or len(beginning) != len(ids):
            return 0
        known = min(beginning.shape[1], ids.shape[1])
        return int((beginning[:, :known] == ids[:, :known]).all(dim=0).cumprod(dim=0).sum())

    def _remember_beginning(self) -> None:
        # Before the tokens of a forward count.
        streams = self._streams
        ids, streams.ids = streams.ids, None
        if streams.tokens_seen == 0:
            streams.beginning = None if ids is None else ids[:, :MOST_REMEMBERED].clone()
        elif torch.compiler.is_dynamo_compiling():
            pass  # not a new graph for each of the first tokens
        elif streams.tokens_seen < LEAST_REMEMBERED and streams.beginning is not None and ids is not None:
            more = ids[:, : LEAST_REMEMBERED - streams.tokens_seen]
            streams.beginning = torch.cat((streams.beginning[:, : streams.tokens_seen], more), dim=1)

    def begin(self, batch: int, tokens: int, ids: Tensor | None) -> None:
        """Open a forward of ``tokens`` new tokens per row; raises, with nothing changed, if it cannot be taken."""
        streams = self._streams
        if streams.arriving is not None:
            raise RuntimeError("cache: is in the middle of a forward already, in this thread or another")
        if (seen := self.seen) is not None and len(seen) != batch:
            raise ValueError(f"cache: holds {len(seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        if streams.broken:
            raise RuntimeError(
                "cache: a forward was interrupted when it had overwritten a part of what the next needs; "
                "call reset() and start the stream anew"
            )
        streams.arriving, streams.ids = tokens, ids

    def finish(self, lengths: Tensor | None) -> None:
        """Close the forward: its tokens, or so many of each row (int64 ``[batch]``), are in all rings, and count."""
        streams = self._streams
        self._remember_beginning()
        streams.ring.advance(streams.arriving if lengths is None else lengths)
        streams.tokens_seen += streams.arriving
        streams.clean = streams.clean + streams.arriving if lengths is None else 0
        streams.arriving = None

    def abandon(self, *, written: bool) -> None:
        """Close a forward that failed: its tokens do not count, though some layers may have ``written`` them.

        The next tokens overwrite them, so the stream can go on, unless the last of them took slots of tokens that
        the next query sees.
        """
        streams = self._streams
        seen, tokens, streams.arriving, streams.ids = streams.tokens_seen, streams.arriving, None, None
        if seen == 0:
            streams.ring = None
            for layer in self._state_layers:
                LinearAttentionLayer.__init__(layer, layer.number_of_states)
            for layer in self._sink_layers:
                layer.drop()
            return
        if written:
            streams.ring.note_uncounted(tokens)
            for layout in {layer.layout for layer in self._sink_layers}:
                oldest_kept = seen + tokens - layout.ring
                if layout.window_begin(seen) < min(oldest_kept, seen):
                    streams.broken = True
        if self.has_states:
            streams.broken = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises ValueError for a positive number, RuntimeError beyond the headroom, into padding, or if a layer has a
        state that cannot go back; nothing is changed then.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {tokens_to_remove}")
        streams = self._streams
        if streams.ring is None:
            return
        if tokens_to_remove:
            if any(
                not (layer.record_past and LinearAttentionLayer.is_croppable.fget(layer))
                for layer in self._state_layers
            ):
                raise RuntimeError(
                    "cache: some layers have a state that cannot go back; assisted decoding needs a model "
                    "without such layers"
                )
            if self.has_padding and streams.clean < -tokens_to_remove:
                raise RuntimeError(f"tokens_to_remove: {-tokens_to_remove} tokens back there is padding")
            streams.ring.rollback(-tokens_to_remove)
            streams.tokens_seen += tokens_to_remove
            streams.clean += tokens_to_remove
            self._forget_beginning()
        for layer in self._state_layers:
            if layer.record_past:
                LinearAttentionLayer.crop(layer, tokens_to_remove)

    def _forget_beginning(self) -> None:
        # What was taken back may have been among it.
        streams = self._streams
        if streams.beginning is not None and streams.tokens_seen < streams.beginning.shape[1]:
            streams.beginning = streams.beginning[:, : streams.tokens_seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        streams = self._streams
        if streams.beginning is not None:
            streams.beginning = streams.beginning[beam_idx.to(streams.beginning.device)]

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        super().reset()
        self._streams.tokens_seen = self._streams.clean = 0
        self._streams.broken = False
