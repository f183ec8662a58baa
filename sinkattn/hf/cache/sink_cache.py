"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from sinkattn.hf.cache.id_history import IdHistory
from sinkattn.hf.cache.layers import SinkLayer
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.model_patch import ModelPatch, get_patch
from sinkattn.ops import RingLayout


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
        patch = None if model is None else get_patch(model)  # None: a copy, or one that is unpickled
        return super().__new__(cls if patch is None else patch.cache_class)

    def __init__(self, model: PreTrainedModel, max_batch_size: int | None = None) -> None:
        patch = get_patch(model)
        if patch is None:
            raise ValueError("model: expected a model prepared by sinkattn.enable(model), got one that is not enabled")
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected 1 or more, got {max_batch_size}")
        self.patch_id: str = patch.id
        self._max_batch_size = max_batch_size
        layout = patch.layout
        self.state = SharedCacheState(layout, IdHistory(layout.num_sinks + layout.window + layout.headroom))
        super().__init__(layers=patch.cache_layers(self.state))

    def __copy__(self) -> SinkCache:
        """Refused: two caches over one memory would overwrite each other."""
        raise TypeError("a SinkCache cannot be copied shallowly; copy.deepcopy makes an independent fork")

    @property
    def layout(self) -> RingLayout:
        """Slot arithmetic of the rings of all layers but those with a sliding window of their own."""
        return self.state.layout

    @property
    def tokens_seen(self) -> int:
        """Tokens that every row has seen, padding included."""
        return self.state.tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self._sink_layers if layer.ring is not None)

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before the first."""
        return None if self.state.ring is None else self.state.ring.seen

    @property
    def has_padding(self) -> bool:
        """Whether some rows may have seen fewer tokens than others."""
        return self.state.history.padded

    @property
    def counts_from_generate(self) -> bool:
        """Whether `generate` counts positions from where it began, and not from where the streams did."""
        return self.state.generate_start is not None

    @property
    def ended_rows(self) -> Tensor | None:
        """Rows that `generate` feeds padding from now on, because they have ended: bool ``[batch]``; None if none."""
        return self.state.ended_rows

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

    def note_inputs(self, ids: Tensor | None, *, alone: bool) -> None:
        """Note the ids that a whole model is given, for its decoder may be given embeddings; and whether it is more."""
        self.state.model_ids = ids
        self.state.only_ids &= alone

    def check_padding(self, present: Tensor) -> None:
        """Raise ValueError for padding in a model that cannot leave it out; present: bool ``[batch, tokens]``."""
        if self.has_states and not present.all():
            raise ValueError(
                "attention_mask: padding is not supported in models with layers that keep a state, expected ones; run "
                "rows of equal length, or one by one"
            )

    @property
    def usable(self) -> bool:
        """Whether the streams can go on."""
        return self.state.unusable_reason is None

    def check_usable(self) -> None:
        """Raise RuntimeError if the streams cannot go on."""
        if not self.usable:
            raise RuntimeError(f"cache: {self.state.unusable_reason}")

    def carry_out_plan(self) -> None:
        """Do what `generate` has planned to do before its first forward."""
        state = self.state
        if state.pending_plan is not None:
            plan, state.pending_plan, counted = state.pending_plan, None, self.get_seq_length()
            plan()
            state.interrupted = True  # until generate comes to its end
            if state.generate_start is not None:
                state.generate_start = state.tokens_seen - counted

    def begin_forward(self, batch: int, tokens: int, ids: Tensor | None) -> None:
        """Open a forward of ``tokens`` new tokens per row; raises, with nothing changed, if it cannot be taken."""
        state = self.state
        if state.num_new_tokens is not None:
            raise RuntimeError("cache: is in the middle of a forward already, in this thread or another")
        if (seen := self.seen) is not None and len(seen) != batch and state.tokens_seen:
            raise ValueError(f"cache: holds {len(seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        self.check_usable()
        noted, state.model_ids = state.model_ids, None
        if ids is None and noted is not None and noted.shape == (batch, tokens):
            ids = noted
        if seen is not None and len(seen) != batch:
            self._give_memory_back()  # of other streams, before reset()
        state.num_new_tokens, state.forward_ids = tokens, ids

    def finish_forward(self, present: Tensor | None) -> None:
        """Close the forward: its tokens are in all rings, and count; those ``present``, bool ``[batch, tokens]``."""
        ring, tokens = self.state.ring, self.state.num_new_tokens
        self.state.count_columns(present, ring.seen)
        ring.advance(tokens if present is None else present.sum(dim=1))

    def abandon_forward(self, *, written: bool) -> None:
        """Close a forward that failed: its tokens do not count, though some layers may have ``written`` them.

        The next tokens overwrite them, so the stream can go on, unless the last of them took slots of tokens that
        the next query sees.
        """
        state = self.state
        seen, tokens, state.num_new_tokens, state.forward_ids = state.tokens_seen, state.num_new_tokens, None, None
        if seen == 0:
            self._give_memory_back()
            return
        interrupted = (
            "a forward was interrupted when it had overwritten a part of what the next needs; call reset() and start "
            "the stream anew"
        )
        if written:
            state.ring.note_uncounted(tokens)
            state.peak = max(state.peak, seen + tokens)
            for layout in {layer.layout for layer in self._sink_layers}:
                oldest_kept = seen + tokens - layout.ring
                if layout.window_begin(seen) < min(oldest_kept, seen):
                    state.unusable_reason = interrupted
        if self.has_states:
            state.unusable_reason = interrupted

    def _give_memory_back(self) -> None:
        self.state.ring = None
        for layer in self._state_layers:
            LinearAttentionLayer.__init__(layer, layer.number_of_states)
        for layer in self._sink_layers:
            layer.drop()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Rows that had padding there lose what was none. Until a ring is full, any number can be taken back.

        Raises ValueError for a positive number, RuntimeError beyond the headroom, or if a layer has a state that cannot
        go back; nothing is changed then.
        """
        columns = -int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if columns < 0:
            raise ValueError(f"tokens_to_remove: expected a negative number of tokens, got {-columns}")
        state = self.state
        if state.tokens_seen == 0:
            return
        if columns:
            if any(
                not (layer.record_past and LinearAttentionLayer.is_croppable.fget(layer))
                for layer in self._state_layers
            ):
                raise RuntimeError(
                    "cache: some layers have a state that cannot go back; assisted decoding needs a model "
                    "without such layers"
                )
            counts: int | Tensor = columns
            if state.history.padded:
                present = state.history.present(state.tokens_seen - columns, state.tokens_seen)
                if present is None:
                    raise RuntimeError(f"cache: it is not known any more where there was padding {columns} tokens back")
                counts = present.sum(dim=1)
            self.roll_back(counts)
            state.tokens_seen -= columns
        for layer in self._state_layers:
            if layer.record_past:
                LinearAttentionLayer.crop(layer, -columns)

    def can_roll_back(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether ``counts[i]`` tokens, int64, can be taken back of row ``rows[i]``; columns are left as they are."""
        if self.has_states and counts.any():
            return False
        rows = rows.to(self.seen.device)
        return bool((counts.to(rows.device) <= self.state.ring.max_rollback(self._headroom)[rows]).all())

    def roll_back(self, counts: int | Tensor) -> None:
        """Forget the last ``counts`` tokens of every row, int64 ``[batch]``; columns are left as they are.

        Raises RuntimeError, with nothing changed, if they cannot all be taken back: `can_roll_back`.
        """
        self.state.ring.rollback(counts, headroom=self._headroom)
        self.state.note_rolled_back(counts)

    @property
    def _headroom(self) -> int | None:
        # While no ring has gone round, nothing was overwritten.
        smallest = min(layer.layout.slots for layer in self._sink_layers)
        return None if self.state.peak > smallest else smallest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self.state.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, one copy after the other: several continuations of one stream."""
        if repeats < 1:
            raise ValueError(f"repeats: expected 1 or more, got {repeats}")
        if self.seen is not None:
            rows = torch.arange(len(self.seen), device=self.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was, int64 ``[rows]``: streams are dropped, copied or both.

        Raises ValueError or TypeError, with nothing changed, for indices that are none of rows, or for more rows than
        ``max_batch_size``.
        """
        if self.seen is None:
            return
        indices = self._check_rows(indices)
        self._take_rows(indices)
        self.state.select_rows(indices)

    def _check_rows(self, indices: Tensor) -> Tensor:
        rows = len(self.seen)
        indices = torch.as_tensor(indices, device=self.seen.device)
        if indices.dtype == torch.bool and indices.shape == (rows,):
            indices = indices.nonzero().flatten()
        if indices.ndim != 1 or not len(indices) or indices.is_floating_point():
            raise ValueError(f"indices: expected int64 [rows], one or more, got {indices.dtype} {list(indices.shape)}")
        if self._max_batch_size is not None and len(indices) > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got {len(indices)} rows")
        indices = torch.where(indices < 0, indices + rows, indices).to(torch.int64)
        if not ((indices >= 0) & (indices < rows)).all():
            raise ValueError(f"indices: expected rows from 0 to {rows - 1}, got {indices.tolist()}")
        return indices

    def _take_rows(self, indices: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                LinearAttentionLayer.reorder_cache(layer, indices)  # which takes any number of rows
        # The ring whose counters the others share comes first.
        for layer in sorted(self._sink_layers, key=lambda layer: layer.ring is not self.state.ring):
            layer.take_rows(indices)

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        super().reset()
        self.state.clear()


def check_cache(patch: ModelPatch, name: str, cache: Any) -> None:
    """Raise TypeError or ValueError unless ``cache``, the argument ``name`` of a call, is None or of this patch."""
    if cache is None:
        return
    if not isinstance(cache, SinkCache):
        raise TypeError(
            f"{name}: expected a sinkattn.SinkCache or None, got {type(cache).__name__}; if you gave none, it is "
            "from what holds the enabled model: enable the outer model instead, or give it a SinkCache; prefix "
            "tuning is not supported"
        )
    if cache.patch_id != patch.id:
        raise ValueError(f"{name}: this SinkCache was made for another model or before the last enable()")
