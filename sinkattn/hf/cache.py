"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from sinkattn.hf.cache_layers import SinkLayer, Streams
from sinkattn.hf.id_history import UNKNOWN, IdHistory
from sinkattn.ops import RingLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkattn.hf.enabled import Enabled


def find_swap(model: torch.nn.Module) -> Enabled | None:
    """What `enable` left on a model, or on one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


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
        layout = swap.layout
        self.streams = Streams(layout, IdHistory(layout.num_sinks + layout.window + layout.headroom))
        super().__init__(layers=swap.cache_layers(self.streams))

    def __copy__(self) -> SinkCache:
        """Refused: two caches over one memory would overwrite each other."""
        raise TypeError("a SinkCache cannot be copied shallowly; copy.deepcopy makes an independent fork")

    @property
    def layout(self) -> RingLayout:
        """Slot arithmetic of the rings of all layers but those with a sliding window of their own."""
        return self.streams.layout

    @property
    def tokens_seen(self) -> int:
        """Tokens that every row has seen, padding included."""
        return self.streams.tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers."""
        return sum(layer.ring.nbytes for layer in self._sink_layers if layer.ring is not None)

    @property
    def seen(self) -> Tensor | None:
        """Tokens that each row has seen, without padding: int64 ``[batch]``, on the device; None before the first."""
        return None if self.streams.ring is None else self.streams.ring.seen

    @property
    def has_padding(self) -> bool:
        """Whether some rows may have seen fewer tokens than others."""
        return self.streams.history.padded

    @property
    def counts_anew(self) -> bool:
        """Whether `generate` counts positions from where it began, and not from where the streams did."""
        return self.streams.origin is not None

    @property
    def ended(self) -> Tensor | None:
        """Rows that `generate` feeds padding from now on, because they have ended: bool ``[batch]``; None if none."""
        return self.streams.ended

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

    def note(self, ids: Tensor | None, *, alone: bool) -> None:
        """Note the ids that a whole model is given, for its decoder may be given embeddings; and whether it is more."""
        self.streams.noted = ids
        self.streams.ids_alone &= alone

    def check_past(self, past: Tensor) -> None:
        """Check the part of a mask, ``[batch, columns]``, that is about columns which the streams have been fed.

        Of those in sight, for the mask may be as long as the stream. Raises ValueError.
        """
        streams = self.streams
        if streams.generating or past.shape[1] != streams.tokens_seen or not streams.tokens_seen:
            return
        begin = streams.history.oldest
        past = past[:, begin:] != 0
        present = streams.history.present(begin, streams.tokens_seen)
        if not torch.equal(present, past):
            row, column = (present != past).nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask: expected {int(present[row, column])} in row {row} at token {begin + column} of the "
                f"past, as it was fed, got {int(past[row, column])}"
            )

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
        return self.streams.unusable is None

    def check_usable(self) -> None:
        """Raise RuntimeError if the streams cannot go on."""
        if not self.usable:
            raise RuntimeError(f"cache: {self.streams.unusable}")

    def carry_out_plan(self) -> None:
        """Do what `generate` has planned to do before its first forward."""
        streams = self.streams
        if streams.plan is not None:
            plan, streams.plan, counted = streams.plan, None, self.get_seq_length()
            plan()
            streams.interrupted = True  # until generate comes to its end
            if streams.origin is not None:
                streams.origin = streams.tokens_seen - counted

    def continue_at(self, column: int, ids: Tensor, fed: Tensor) -> None:
        """Count columns as `generate` does: what it feeds begins with ``column``.

        ids int64, fed bool ``[batch, tokens]``: all ids that it has, and which are tokens of the streams already. Some
        rows may be further than others.
        """
        streams, device = self.streams, self.seen.device
        ids, fed = ids.to(device), fed.to(device)
        streams.history.count_as(ids[:, :column], fed[:, :column])
        streams.tokens_seen = column
        streams.peak = max(streams.peak, column)
        if fed[:, column:].any():
            streams.fed_before = (ids, fed)

    def catch_up(self) -> None:
        """Count the columns in which some rows are further than others, if what was to be fed there never came."""
        streams = self.streams
        if streams.fed_before is not None:
            (ids, fed), streams.fed_before, begin = streams.fed_before, None, streams.tokens_seen
            end = int(fed.any(dim=0).nonzero()[-1]) + 1
            if begin < end:
                streams.history.record_columns(begin, ids[:, begin:end], fed[:, begin:end])
                streams.tokens_seen = end
                streams.peak = max(streams.peak, end)

    def refuse(self, why: str, column: int, ids: Tensor, present: Tensor) -> None:
        """Let no stream go on until `generate` is given all of them; columns from ``column`` on are as given here.

        ids, present: ``[batch, tokens]`` ids, and which are no padding.
        """
        streams, device = self.streams, self.seen.device
        streams.unusable = why
        streams.history.record_columns(column, ids.to(device), present.to(device))
        streams.tokens_seen = column + ids.shape[1]

    def note_ended(self, rows: Tensor, last: Tensor) -> None:
        """Note which rows ended before others, bool ``[batch]``, and so were given padding as their ``last`` id."""
        if rows.any():
            self.streams.pending = (rows, int(last[rows][0]))

    def begin(self, batch: int, tokens: int, ids: Tensor | None) -> None:
        """Open a forward of ``tokens`` new tokens per row; raises, with nothing changed, if it cannot be taken."""
        streams = self.streams
        if streams.arriving is not None:
            raise RuntimeError("cache: is in the middle of a forward already, in this thread or another")
        if (seen := self.seen) is not None and len(seen) != batch and streams.tokens_seen:
            raise ValueError(f"cache: holds {len(seen)} streams, got a batch of {batch}")
        if self._max_batch_size is not None and batch > self._max_batch_size:
            raise ValueError(f"cache: max_batch_size is {self._max_batch_size}, got a batch of {batch}")
        self.check_usable()
        noted, streams.noted = streams.noted, None
        if ids is None and noted is not None and noted.shape == (batch, tokens):
            ids = noted
        if seen is not None and len(seen) != batch:
            self._give_memory_back()  # of other streams, before reset()
        streams.arriving, streams.ids = tokens, ids

    def finish(self, present: Tensor | None) -> None:
        """Close the forward: its tokens are in all rings, and count; those ``present``, bool ``[batch, tokens]``."""
        ring, tokens = self.streams.ring, self.streams.arriving
        self._count_columns(present, ring.seen)
        ring.advance(tokens if present is None else present.sum(dim=1))

    def _count_columns(self, present: Tensor | None, seen: Tensor) -> None:
        # seen: tokens of every row before.
        streams, before, index = self.streams, None, None
        ids, tokens, begin = streams.ids, streams.arriving, streams.tokens_seen
        if ids is None:
            ids = torch.full((len(seen), tokens), UNKNOWN, device=seen.device)
        if present is not None and streams.fed_before is not None:
            before = streams.fed_before[1][:, begin : begin + tokens]
            before = functional.pad(before, (0, tokens - before.shape[1]))
        if torch.compiler.is_dynamo_compiling() and tokens <= streams.history.capacity:
            index = seen[0] + torch.arange(tokens, device=seen.device)
        streams.history.record(begin, seen, ids, present, before=before, index=index)
        streams.tokens_seen += tokens
        streams.peak = max(streams.peak, streams.tokens_seen)
        streams.arriving = streams.ids = streams.pending = None

    def abandon(self, *, written: bool) -> None:
        """Close a forward that failed: its tokens do not count, though some layers may have ``written`` them.

        The next tokens overwrite them, so the stream can go on, unless the last of them took slots of tokens that
        the next query sees.
        """
        streams = self.streams
        seen, tokens, streams.arriving, streams.ids = streams.tokens_seen, streams.arriving, None, None
        if seen == 0:
            self._give_memory_back()
            return
        interrupted = (
            "a forward was interrupted when it had overwritten a part of what the next needs; call reset() and start "
            "the stream anew"
        )
        if written:
            streams.ring.note_uncounted(tokens)
            streams.peak = max(streams.peak, seen + tokens)
            for layout in {layer.layout for layer in self._sink_layers}:
                oldest_kept = seen + tokens - layout.ring
                if layout.window_begin(seen) < min(oldest_kept, seen):
                    streams.unusable = interrupted
        if self.has_states:
            streams.unusable = interrupted

    def _give_memory_back(self) -> None:
        self.streams.ring = None
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
        streams = self.streams
        if streams.tokens_seen == 0:
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
            if streams.history.padded:
                present = streams.history.present(streams.tokens_seen - columns, streams.tokens_seen)
                if present is None:
                    raise RuntimeError(f"cache: it is not known any more where there was padding {columns} tokens back")
                counts = present.sum(dim=1)
            self.take_back(counts)
            streams.tokens_seen -= columns
        for layer in self._state_layers:
            if layer.record_past:
                LinearAttentionLayer.crop(layer, -columns)

    def can_take_back(self, counts: Tensor, rows: Tensor) -> bool:
        """Whether ``counts[i]`` tokens, int64, can be taken back of row ``rows[i]``; columns are left as they are."""
        if self.has_states and counts.any():
            return False
        rows = rows.to(self.seen.device)
        return bool((counts.to(rows.device) <= self.streams.ring.most_back(self._headroom)[rows]).all())

    def take_back(self, counts: int | Tensor) -> None:
        """Forget the last ``counts`` tokens of every row, int64 ``[batch]``; columns are left as they are.

        Raises RuntimeError, with nothing changed, if they cannot all be taken back: `can_take_back`.
        """
        self.streams.ring.rollback(counts, headroom=self._headroom)
        self._note_rolled_back(counts)

    def _note_rolled_back(self, counts: int | Tensor) -> None:
        if self.streams.pending is not None:
            rows, last = self.streams.pending
            self.streams.pending = (rows & (torch.as_tensor(counts, device=rows.device) == 0), last)

    @property
    def _headroom(self) -> int | None:
        # While no ring has gone round, nothing was overwritten.
        smallest = min(layer.layout.slots for layer in self._sink_layers)
        return None if self.streams.peak > smallest else smallest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        self._reorder_notes(beam_idx)

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
        self._reorder_notes(indices)

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
        for layer in sorted(self._sink_layers, key=lambda layer: layer.ring is not self.streams.ring):
            layer.take_rows(indices)

    def _reorder_notes(self, index: Tensor) -> None:
        streams = self.streams
        streams.history.take_rows(index)
        if streams.given is not None:
            streams.given = streams.given[index.to(streams.given.device)]
        if streams.pending is not None:
            rows, token = streams.pending
            streams.pending = rows[index.to(rows.device)], token

    def reset(self) -> None:
        """Start all streams anew, in the same memory."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        streams = self.streams
        streams.history.clear()
        streams.tokens_seen = streams.peak = 0
        streams.ids_alone = streams.mendable = True
        streams.interrupted = False
        streams.fed_before = streams.unusable = streams.pending = streams.given = streams.noted = None
