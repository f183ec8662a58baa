"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache
from sinkattn.rope import Rope, table_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkattn.hf.swap import Swap


def find_swap(model: torch.nn.Module) -> Swap | None:
    """What `enable` left on a model, or on one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


class SinkLayer(CacheLayerMixin):
    """Ring of one attention layer. Holds no memory until its layer first runs."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: SinkCache) -> None:
        super().__init__()
        self._cache = cache
        self.ring: RingKVCache | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back at all."""
        return self._cache.layout.headroom > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys and values like these."""
        batch, kv_heads, _, head_dim = key_states.shape
        layout = self._cache.layout
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
            share_seen_with=self._cache.first_ring,
        )
        self.keys, self.values = self.ring.keys, self.ring.values
        self.batch_size = batch
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through: the attention function appends them to the ring itself."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask, which is never made: the ring knows what is visible."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens ever seen, not slots in use: what `generate` cuts its inputs by."""
        return self._cache.tokens_seen

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
        self.layout: RingLayout = swap.layout
        self.swap_id: int = swap.id
        self._max_batch_size = max_batch_size
        self.tokens_seen = 0
        self._tokens = 0
        self._broken = False
        self._tables: tuple[Tensor, Tensor] | None = None
        super().__init__(layers=[SinkLayer(self) for _ in range(swap.num_layers)])

    @property
    def first_ring(self) -> RingKVCache | None:
        """Ring whose counters all layers share."""
        return next((layer.ring for layer in self.layers if layer.ring is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self.layers if layer.ring is not None)

    def begin(self, batch: int, tokens: int) -> None:
        """Start a forward of ``tokens`` new tokens per row; raises, with nothing changed, if it cannot be taken."""
        ring = self.first_ring
        if ring is not None and len(ring.seen) != batch:
            raise ValueError(f"past_key_values: holds {len(ring.seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"past_key_values: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        if self._broken:
            raise RuntimeError(
                "past_key_values: a forward was interrupted after it had overwritten a part of the window; call "
                "reset() and start the stream anew"
            )
        self._tokens = tokens

    def finish(self) -> None:
        """Count the tokens of the forward that began as seen, by all layers."""
        self.first_ring.advance(self._tokens)
        self.tokens_seen += self._tokens
        self._tokens, self._tables = 0, None

    def abandon(self, *, written: bool) -> None:
        """Forget the forward that began; ``written``: some layer has appended its tokens already.

        Tokens that were not counted are overwritten by the next ones, so the stream can go on, unless the last of
        them took slots of tokens that the next query sees.
        """
        oldest_kept = self.tokens_seen + self._tokens - self.layout.ring
        next_window = self.layout.window_begin(self.tokens_seen)
        if written and next_window < min(oldest_kept, self.tokens_seen):
            self._broken = True
        self._tokens, self._tables = 0, None

    def tables(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotary tables of the forward under way, made once and shared by all layers."""
        if self._tables is None:
            ring = self.first_ring
            self._tables = rope.stream_tables(
                ring.seen,
                self._tokens,
                num_sinks=self.layout.num_sinks,
                window=self.layout.window,
                dtype=table_dtype(ring.keys.dtype),
            )
        return self._tables

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises ValueError for a positive number, RuntimeError beyond the headroom; nothing is changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.first_ring is None:
            return
        self.first_ring.rollback(-tokens_to_remove)
        self.tokens_seen += tokens_to_remove

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
        self.tokens_seen = 0
        self._broken = False
