"""The cache that an enabled model writes to: one ring per attention layer behind transformers' `Cache` interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from sinkattn.hf.id_history import UNKNOWN, IdHistory
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import RingKVCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkattn.hf.enabled import Enabled


def find_swap(model: torch.nn.Module) -> Enabled | None:
    """What `enable` left on a model, or on one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


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
    """The last `generate` did not come to its end."""
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
