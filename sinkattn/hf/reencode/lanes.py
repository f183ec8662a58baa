"""Lanes: rows of a batch that have seen equally many tokens and share one context, which is rebuilt when it is full.

Keys with a position in them for good cannot be moved, so rows can share a forward only if their tokens have the same
positions. Rows that bring different numbers of tokens part into lanes of their own; each lane runs without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkattn.ops import RingLayout


def kept_tokens(layout: RingLayout) -> int:
    """Tokens of the window that stay in the context when it is rebuilt."""
    return layout.window // 2


def rebuild_period(layout: RingLayout) -> int:
    """Tokens from one rebuild to the next."""
    return layout.window - kept_tokens(layout)


def extra_tokens(layout: RingLayout) -> float:
    """Tokens that are encoded anew for each token of a long stream, on average; the sinks stay as they are."""
    return kept_tokens(layout) / rebuild_period(layout)


def context_start(token: int, layout: RingLayout) -> int:
    """First token after the sinks in the context of a token, both counted from 0 in the stream.

    The context of token t is the sinks and {context_start(t) .. t}: up to ``num_sinks + window`` tokens.
    """
    past_full = token - layout.num_sinks - layout.window
    rebuilds = max(0, past_full // rebuild_period(layout) + 1)
    return layout.num_sinks + rebuilds * rebuild_period(layout)


def first_token(start: int, layout: RingLayout) -> int:
    """First token whose context starts at ``start``, which is the `context_start` of some token."""
    return 0 if start == layout.num_sinks else start + kept_tokens(layout)


class ContextLayer(CacheLayerMixin):
    """Keys and values of one layer for up to ``capacity`` tokens, in memory that is taken once."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory for keys and values like these."""
        # Not inference tensors, even if made under torch.inference_mode(): a stream may go on outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.empty(*x.shape[:-2], self.capacity, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, heads, tokens, head_dim]``; returns those of the whole context."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[..., begin : self.length, :] = key_states
        self.values[..., begin : self.length, :] = value_states
        # A stream may enter or leave autocast midway.
        return (
            self.keys[..., : self.length, :].to(key_states.dtype),
            self.values[..., : self.length, :].to(value_states.dtype),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, key offset) of a mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that it holds."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that it can hold."""
        return self.capacity

    def take(self, index: Tensor) -> ContextLayer:
        """Copy of the rows ``index``, int64 ``[rows]``."""
        taken = ContextLayer(self.capacity)
        if self.is_initialized:
            with torch.inference_mode(False):
                taken.keys, taken.values = (x.index_select(0, index) for x in (self.keys, self.values))
            taken.is_initialized, taken.length = True, self.length
        return taken


class Lane:
    """Streams of equal length: their ids that may be needed again, and one context.

    Args:
        layout: sinks, window and headroom of each stream.
        rows: which rows of the batch they are, in ascending order.
        ids: their tokens so far, none yet: int64 ``[len(rows), 0]``.
    """

    def __init__(self, layout: RingLayout, rows: Sequence[int], ids: Tensor) -> None:
        self.layout = layout
        self.rows = list(rows)
        self.ids = ids
        """Sinks and recent tokens: int64 ``[len(rows), up to num_sinks + window - 1 + headroom]``."""
        self.seen = 0
        """Tokens of each stream."""
        self.first = layout.num_sinks
        """First token that is kept after the sinks, counted from 0 in the stream."""
        self.context = Cache(layer_class_to_replicate=partial(ContextLayer, layout.num_sinks + layout.window))
        self.held = (layout.num_sinks, 0)
        """`context_start` of what the context holds, and how many tokens of it are right."""

    @property
    def nbytes(self) -> int:
        """Bytes of ids, keys and values."""
        layers = [layer for layer in self.context.layers if layer.is_initialized]
        return self.ids.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def max_rollback(self) -> int:
        """Tokens that can be taken back: those after which the context of the next one is among the ids still."""
        return self.seen - first_token(self.first, self.layout)

    def pieces(self, new: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        """Cut new tokens, int64 ``[len(rows), tokens]``, where the context is rebuilt.

        Yields the ids to run, the position of the first of them, and how many at the end are new. The context holds
        what comes before them then; that they have been run is believed when the next piece is asked for.
        """
        sinks, window = self.layout.num_sinks, self.layout.window
        ids = torch.cat((self.ids, new), dim=1)
        token, end = self.seen, self.seen + new.shape[1]
        while token < end:
            start = context_start(token, self.layout)
            stop = min(end, start + window)
            held_start, right = self.held
            # The sinks stay where they are in every context.
            right = min(right, sinks + token - start, right if held_start == start else sinks)
            self.held = (start, right)
            for layer in self.context.layers:
                layer.length = right
            past_sinks = sinks + start - self.first
            context = torch.cat((ids[:, :sinks], ids[:, past_sinks : past_sinks + stop - start]), dim=1)
            yield context[:, right:], right, stop - token
            self.held = (start, sinks + stop - start)
            token = stop

    def append(self, new: Tensor) -> None:
        """Count new tokens, int64 ``[len(rows), tokens]``, that have been run."""
        sinks, layout = self.layout.num_sinks, self.layout
        self.seen += new.shape[1]
        ids = torch.cat((self.ids, new), dim=1)
        # What the context of the oldest token that can come next needs.
        first = max(self.first, context_start(self.seen - layout.headroom, layout))
        if first > self.first:
            ids = torch.cat((ids[:, :sinks], ids[:, sinks + first - self.first :]), dim=1)
        self.ids, self.first = ids, first

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens, `max_rollback` at most; the next token rebuilds the context if needed."""
        self.seen -= count
        self.ids = self.ids[:, : self.ids.shape[1] - count]

    def take(self, places: Tensor, rows: Sequence[int]) -> Lane:
        """Copy of the streams at ``places`` in this lane, int64 ``[len(rows)]``, as these rows of a batch."""
        taken = Lane(self.layout, rows, self.ids.index_select(0, places))
        taken.seen, taken.first, taken.held = self.seen, self.first, self.held
        taken.context.layers = [layer.take(places) for layer in self.context.layers]
        return taken

    def split(self, counts: Sequence[int]) -> dict[int, Lane]:
        """Lanes by a number that each row of the batch has: this lane itself if it is the same in all of its rows."""
        own = [counts[row] for row in self.rows]
        if len(set(own)) == 1:
            return {own[0]: self}
        parts = {}
        for count in sorted(set(own)):
            places = [place for place, other in enumerate(own) if other == count]
            index = torch.tensor(places, device=self.ids.device)
            parts[count] = self.take(index, [self.rows[place] for place in places])
        return parts
