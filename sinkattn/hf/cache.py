"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkattn.hf.swap import Swap


def find_swap(model: torch.nn.Module) -> Swap | None:
    """What `enable` left on a model, or on one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


@dataclass
class Streams:
    """What the layers of a cache share."""

    layout: RingLayout
    tokens_seen: int = 0
    """Tokens counted in every row; the host's copy of the ring's `seen`."""
    ring: RingKVCache | None = None
    """The ring whose counters all layers use."""
    arriving: int | None = None
    """Tokens of the forward under way; None between forwards."""
    broken: bool = False
    """A part of the window was overwritten by tokens that do not count."""


class SinkLayer(CacheLayerMixin):
    """Ring of one attention layer. Holds no memory until its layer first runs."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams
        self.ring: RingKVCache | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back at all."""
        return self._streams.layout.headroom > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys and values like these."""
        batch, kv_heads, _, head_dim = key_states.shape
        layout = self._streams.layout
        self.ring = RingKVCache(
            batch,
            kv_heads,
            head_dim,
            layout.num_sinks,
            layout.window,
            layout.headroom,
            value_dim=value_states.shape[-1],
            dtype=key_states.dtype,
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
            raise RuntimeError("past_key_values: a SinkCache works only in the model that sinkattn.enable prepared")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask, which is never made: the ring knows what is visible."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens ever seen, not slots in use: what `generate` cuts its inputs by."""
        return self._streams.tokens_seen

    def get_max_length(self) -> int:
        """Return -1: a stream has no maximum length."""
        return -1


class SinkCache(Cache):
    """Constant-memory cache of an enabled model; pass it as ``past_key_values`` and keep it between turns.

    Each layer keeps its sink tokens and a ring of recent ones, in place. `generate` on an enabled model makes one
    by itself; make your own to go on with a stream later. ``copy.deepcopy`` forks it.

    Args:
        model: a model that `sinkattn.enable` has prepared.
        max_batch_size: refuse larger batches. Memory is taken when the first batch comes, for that batch.

    Raises:
        ValueError: if the model is not enabled, or max_batch_size is below 1.
    """

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        swap = find_swap(model)
        if swap is None:
            raise ValueError("model: expected a model prepared by sinkattn.enable(model), got one that is not enabled")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected 1 or more, got {max_batch_size}")
        self.swap_id: str = swap.id
        self._max_batch_size = max_batch_size
        self._streams = Streams(swap.layout)
        super().__init__(layers=[SinkLayer(self._streams) for _ in range(swap.num_layers)])

    def __copy__(self) -> SinkCache:
        """Refused: two caches over one memory would overwrite each other."""
        raise TypeError("a SinkCache cannot be copied shallowly; copy.deepcopy makes an independent fork")

    @property
    def layout(self) -> RingLayout:
        """Slot arithmetic of every layer's ring."""
        return self._streams.layout

    @property
    def tokens_seen(self) -> int:
        """Tokens that every row has seen."""
        return self._streams.tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self.layers if layer.ring is not None)

    def begin(self, batch: int, tokens: int) -> None:
        """Open a forward of ``tokens`` new tokens per row; raises, with nothing changed, if it cannot be taken."""
        streams = self._streams
        if streams.arriving is not None:
            raise RuntimeError("past_key_values: is in the middle of a forward already, in this thread or another")
        if streams.ring is not None and len(streams.ring.seen) != batch:
            raise ValueError(f"past_key_values: holds {len(streams.ring.seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"past_key_values: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        if streams.broken:
            raise RuntimeError(
                "past_key_values: a forward was interrupted after it had overwritten a part of the window; call "
                "reset() and start the stream anew"
            )
        streams.arriving = tokens

    def finish(self) -> None:
        """Close the forward: its tokens are in the rings of all layers, and count."""
        streams = self._streams
        streams.ring.advance(streams.arriving)
        streams.tokens_seen += streams.arriving
        streams.arriving = None

    def abandon(self, *, written: bool) -> None:
        """Close a forward that failed: its tokens do not count, though some layers may have ``written`` them.

        The next tokens overwrite them, so the stream can go on, unless the last of them took slots of tokens that
        the next query sees.
        """
        streams, layout = self._streams, self.layout
        tokens, streams.arriving = streams.arriving, None
        if not written:
            return
        if streams.tokens_seen == 0:
            streams.ring = None
            for layer in self.layers:
                layer.drop()
            return
        streams.ring.note_uncounted(tokens)
        oldest_kept = streams.tokens_seen + tokens - layout.ring
        if layout.window_begin(streams.tokens_seen) < min(oldest_kept, streams.tokens_seen):
            streams.broken = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises ValueError for a positive number, RuntimeError beyond the headroom; nothing is changed then.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self._streams.ring is None:
            return
        self._streams.ring.rollback(-tokens_to_remove)
        self._streams.tokens_seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, in place."""
        for layer in self.layers:
            if layer.ring is not None:
                layer.ring.reorder(beam_idx.to(layer.ring.seen.device, torch.int64))

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        for layer in self.layers:
            if layer.ring is not None:
                layer.ring.reset()
        self._streams.tokens_seen = 0
        self._streams.broken = False
