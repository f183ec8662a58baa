"""Lanes: rows of a batch with equally many tokens, which share one context that is rebuilt when it is full.

With absolute positions keys cannot be moved, so rows share a forward only if their tokens have the same positions. A
lane is split when its rows get different numbers of new tokens. Each lane runs without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.ops import RingLayout


def kept_tokens(layout: RingLayout) -> int:
    """Tokens of the window that remain in the context when it is rebuilt."""
    return layout.window // 2


def rebuild_period(layout: RingLayout) -> int:
    """Tokens from one rebuild to the next."""
    return layout.window - kept_tokens(layout)


def extra_tokens(layout: RingLayout) -> float:
    """Tokens encoded again per token of a long stream, on average; the sinks are not encoded again."""
    return kept_tokens(layout) / rebuild_period(layout)


def context_start(token: int, layout: RingLayout) -> int:
    """First token after the sinks in the context of a token, both as indices in the stream.

    The context of token t is the sinks and {context_start(t) .. t}: up to ``num_sinks + window`` tokens.
    """
    past_full = token - layout.num_sinks - layout.window
    rebuilds = max(0, past_full // rebuild_period(layout) + 1)
    return layout.num_sinks + rebuilds * rebuild_period(layout)


def first_token_with_start(start: int, layout: RingLayout) -> int:
    """First token whose context starts at ``start``, which is the `context_start` of some token."""
    return 0 if start == layout.num_sinks else start + kept_tokens(layout)


class ContextLayer(CacheLayerMixin):
    """Keys and values of one layer for up to ``capacity`` tokens, in a preallocated buffer."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    keys: Tensor  # None, as in every layer of transformers, until is_initialized
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.recorded: tuple[Tensor, Tensor] | None = None
        """Keys and values of the context with the graph of a call that autograd records; None between calls."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for keys and values like these."""
        # No inference tensors, even under torch.inference_mode(): the stream may continue outside of it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                torch.empty(*x.shape[:-2], self.capacity, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (key_states, value_states)
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[batch, heads, tokens, head_dim]``; returns the whole context."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, self.length = self.length, self.length + key_states.shape[-2]
        # The buffer has no graph: for later calls these tokens are a constant.
        self.keys[..., past : self.length, :] = key_states.detach()
        self.values[..., past : self.length, :] = value_states.detach()
        if self.recorded is not None or torch.is_grad_enabled():
            # Copies, because autograd keeps them until the backward, and the buffer changes.
            keys, values = (self.keys, self.values) if self.recorded is None else self.recorded
            self.recorded = (
                torch.cat((keys[..., :past, :].to(key_states.dtype), key_states), dim=-2),
                torch.cat((values[..., :past, :].to(value_states.dtype), value_states), dim=-2),
            )
            return self.recorded
        # A stream may enter or leave autocast between calls.
        return (
            self.keys[..., : self.length, :].to(key_states.dtype),
            self.values[..., : self.length, :].to(value_states.dtype),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(Key length, key offset) of a mask."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the context."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit into the context."""
        return self.capacity

    def select_rows(self, index: Tensor) -> ContextLayer:
        """Copy with only the rows ``index``, int64 ``[rows]``."""
        selected = ContextLayer(self.capacity)
        if self.is_initialized:
            with torch.inference_mode(False):
                selected.keys, selected.values = (x.index_select(0, index) for x in (self.keys, self.values))
            selected.is_initialized, selected.length = True, self.length
        return selected

    def load(self, saved: SavedStreams, index: int, length: int) -> ContextLayer:
        """The layer of this index that was saved, with ``length`` tokens, and memory like that of this one."""
        keys, values = (
            saved.tensor(f"{name}.{index}", (x.shape[1], length, x.shape[-1]), x.dtype, x.device)
            for name, x in (("keys", self.keys), ("values", self.values))
        )
        loaded = self.select_rows(torch.zeros(saved.rows, dtype=torch.int64, device=keys.device))
        loaded.keys[..., :length, :], loaded.values[..., :length, :] = keys, values
        loaded.length = length
        return loaded


class ContextCache(Cache):
    """Context of a lane: one `ContextLayer` for each layer of the model, created when it first runs."""

    layers: list[Any]

    def __init__(self, capacity: int) -> None:
        # transformers calls this to create a layer, so it need not be a class.
        create_layer: Any = partial(ContextLayer, capacity)
        super().__init__(layer_class_to_replicate=create_layer)


class Segment(NamedTuple):
    """Tokens to run that share a context."""

    ids: Tensor
    """int64 ``[rows, tokens]``."""
    first_position: int
    num_past: int
    """How many of them, at the beginning, are from earlier calls."""
    num_new: int
    """How many of them, at the end, are new; those before are encoded again."""


class Lane:
    """Streams of equal length: the ids that a rebuild may need, and one context.

    Args:
        layout: sinks, window and headroom of each stream.
        rows: the streams' rows in the batch, in ascending order.
        ids: their ids so far: int64 ``[len(rows), tokens]``, with no tokens for new streams.
    """

    def __init__(self, layout: RingLayout, rows: Sequence[int], ids: Tensor) -> None:
        self.layout = layout
        self.rows = list(rows)
        self.ids = ids
        """Sinks and recent tokens: int64 ``[len(rows), up to num_sinks + window - 1 + headroom]``."""
        self.seen = 0
        """Tokens of each stream."""
        self.first_kept = layout.num_sinks
        """Index in the stream of the first id after the sinks in ``ids``."""
        self.context = ContextCache(layout.num_sinks + layout.window)
        self.encoded = (layout.num_sinks, 0)
        """`context_start` of the tokens in the context, and how many of them are valid, from the sinks on."""

    @property
    def nbytes(self) -> int:
        """Bytes of ids, keys and values."""
        layers = [layer for layer in self.context.layers if layer.is_initialized]
        return self.ids.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @property
    def max_rollback(self) -> int:
        """Tokens that can be rolled back: afterwards ``ids`` must still contain the context of the next token."""
        return self.seen - first_token_with_start(self.first_kept, self.layout)

    def segments(self, new: Tensor) -> Iterator[Segment]:
        """Split new tokens, int64 ``[len(rows), tokens]``, where the context is rebuilt.

        Before each yield the context is cut to the tokens before the segment; resuming the generator marks the segment
        as encoded.
        """
        num_sinks, window = self.layout.num_sinks, self.layout.window
        ids = torch.cat((self.ids, new), dim=1)
        token, end = self.seen, self.seen + new.shape[1]
        while token < end:
            start = context_start(token, self.layout)
            stop = min(end, start + window)
            encoded_start, num_valid = self.encoded
            # After a rebuild only the sinks are valid: they have the same positions in every context.
            num_valid = min(num_valid, num_sinks + token - start, num_valid if encoded_start == start else num_sinks)
            self.encoded = (start, num_valid)
            for layer in self.context.layers:
                layer.length = num_valid
            begin = num_sinks + start - self.first_kept
            context = torch.cat((ids[:, :num_sinks], ids[:, begin : begin + stop - start]), dim=1)
            num_past = max(0, min(self.seen, num_sinks) + max(0, self.seen - start) - num_valid)
            yield Segment(context[:, num_valid:], num_valid, num_past, stop - token)
            self.encoded = (start, num_sinks + stop - start)
            token = stop

    def drop_graph(self) -> None:
        """Keep keys and values of a call that autograd has recorded as a constant."""
        for layer in self.context.layers:
            layer.recorded = None

    def append(self, new: Tensor) -> None:
        """Append new tokens that have been run, int64 ``[len(rows), tokens]``; drop ids that are not needed again."""
        num_sinks, layout = self.layout.num_sinks, self.layout
        self.seen += new.shape[1]
        ids = torch.cat((self.ids, new), dim=1)
        # Keep the context of the token that is next after a rollback by the headroom.
        first = max(self.first_kept, context_start(self.seen - layout.headroom, layout))
        if first > self.first_kept:
            ids = torch.cat((ids[:, :num_sinks], ids[:, num_sinks + first - self.first_kept :]), dim=1)
        self.ids, self.first_kept = ids, first

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens, up to `max_rollback`; the next token rebuilds the context if needed."""
        self.seen -= count
        self.ids = self.ids[:, : self.ids.shape[1] - count]

    def select(self, index: Tensor, rows: Sequence[int]) -> Lane:
        """Copy with only the streams ``index`` of this lane, int64 ``[len(rows)]``, as ``rows`` of a batch."""
        selected = Lane(self.layout, rows, self.ids.index_select(0, index))
        selected.seen, selected.first_kept, selected.encoded = self.seen, self.first_kept, self.encoded
        selected.context.layers = [layer.select_rows(index) for layer in self.context.layers]
        return selected

    def state_tensors(self) -> dict[str, Tensor]:
        """What `SinkCache.save` saves of the lane, rows first: ids, and the valid part of the context."""
        tensors, num_valid = {"ids": self.ids.to(torch.int64)}, self.encoded[1]
        for i, layer in enumerate(self.context.layers if num_valid else ()):
            tensors |= {f"keys.{i}": layer.keys[..., :num_valid, :], f"values.{i}": layer.values[..., :num_valid, :]}
        return tensors

    def state_fields(self) -> dict[str, Any]:
        """What it saves besides tensors."""
        return {"rows": self.rows, "seen": self.seen, "first_kept": self.first_kept, "encoded": self.encoded}

    def load(self, saved: SavedStreams) -> Lane:
        """The lane that was saved, with a context like that of this one, which has fed its first tokens."""
        rows, encoded = saved.counts("rows"), saved.counts("encoded")
        seen, first_kept, num_sinks = saved.count("seen"), saved.count("first_kept"), self.layout.num_sinks
        if len(encoded) != 2 or encoded[1] > num_sinks + self.layout.window or first_kept < num_sinks:
            raise ValueError(f"path: lanes: expected a context of the layout {self.layout}, got {saved.fields}")
        num_ids = min(seen, num_sinks) + max(0, seen - first_kept)
        saved.rows = len(rows)
        lane = Lane(self.layout, rows, saved.tensor("ids", (num_ids,), torch.int64, self.ids.device))
        lane.seen, lane.first_kept, lane.encoded = seen, first_kept, (encoded[0], encoded[1])
        for i, layer in enumerate(self.context.layers if encoded[1] else ()):
            lane.context.layers.append(layer.load(saved, i, encoded[1]))
        return lane

    def split(self, counts: Sequence[int]) -> dict[int, Lane]:
        """Split the lane by ``counts[row]``, one number for each row of the batch; returns the parts by that number.

        The lane itself is returned if the number is the same in all of its rows.
        """
        own = [counts[row] for row in self.rows]
        if len(set(own)) == 1:
            return {own[0]: self}
        parts = {}
        for count in sorted(set(own)):
            indices = [i for i, other in enumerate(own) if other == count]
            parts[count] = self.select(torch.tensor(indices, device=self.ids.device), [self.rows[i] for i in indices])
        return parts
