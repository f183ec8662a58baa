"""Memory of the streams of a pool, and the forwards on it: rows of shared rings, or a cache for each stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool.row_cache import RowCache, RowInput
from sinkattn.hf.stream import keep_last_logits
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.hf.versions import forward_cache


@dataclass(eq=False)
class StreamMemory:
    """What a stream has in memory."""

    num_sinks: int
    row: int | None = None
    """Its row; None while it is parked."""
    contents: Any = field(default=None, repr=False)
    """Keys and values while it is parked, or its cache; None for none."""
    seen: int = 0
    """Tokens of the stream in rings."""
    peak: int = 0
    """The most ever written there, by failed forwards too; a rollback does not lower it."""


class NewTokens(NamedTuple):
    """New tokens of a stream, which a forward runs."""

    stream: StreamMemory
    ids: Sequence[int]
    begin: int
    """First token that their window may hold."""


class Memory(Protocol):
    """Memory for the streams of a pool, in rows."""

    is_batched: bool
    """Whether a forward may run several streams."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """Append tokens to streams that have a row. Returns the logits of the last one of each: ``[streams, vocab]``.

        They count only after `commit`.
        """

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """Count the tokens that a forward has appended to a stream, which has so many then."""

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """Give a stream a free row."""

    def park(self, stream: StreamMemory) -> None:
        """Free the row of a stream, whose contents go to host memory."""

    def drop(self, stream: StreamMemory) -> None:
        """Free the row of a stream, which is empty then."""

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """A copy, without a row."""

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """A copy of the contents as the cache of one stream, on any device, without its history of ids."""

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """The contents of such a cache, without a row; the cache must not be used any more."""

    def can_rollback(self, stream: StreamMemory, count: int) -> bool:
        """Whether the last ``count`` tokens can be forgotten, and after that the one before be run again."""

    def can_go_on(self, stream: StreamMemory, count: int) -> bool:
        """Whether tokens can follow if the last ``count`` are forgotten.

        For none: unless a forward that failed has overwritten others.
        """

    def rollback(self, stream: StreamMemory, count: int) -> None:
        """Forget the last ``count`` tokens, which must be possible."""


def memory_for(model: PreTrainedModel, num_rows: int, num_sinks: int) -> Memory:
    """Memory for the streams of a model: ``num_rows`` of them, with up to ``num_sinks`` sinks each."""
    if isinstance(require_patch(model), RingPatch) and not SinkCache(model).has_states:
        return RingMemory(model, num_rows, num_sinks)
    return OwnCaches(model, num_sinks)


class RingMemory:
    """A row of each layer's ring for each stream. Forwards run any of them together."""

    is_batched = True

    def __init__(self, model: PreTrainedModel, num_rows: int, num_sinks: int) -> None:
        self._model = model
        self._cache = RowCache(model, num_rows, num_sinks=num_sinks)
        self._options = {forward_cache(model): self._cache, "use_cache": True, **keep_last_logits(model)}

    @property
    def nbytes(self) -> int:
        """See `Memory`."""
        return self._cache.nbytes

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """See `Memory`."""
        ids, mask = self._cache.select(
            [RowInput(_row(x.stream), x.stream.seen, x.stream.num_sinks, x.begin, x.ids) for x in inputs]
        )
        for x in inputs:
            x.stream.peak = max(x.stream.peak, x.stream.seen + len(x.ids))
        output = self._model(input_ids=ids, attention_mask=mask, **self._options)
        return output.logits[: len(inputs), -1]

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """See `Memory`."""
        stream.seen = seen

    def _tensors(self, row: int) -> list[Tensor]:
        """Keys and values of a row, of all layers that have memory."""
        return [x[row] for layer in self._cache.layers if layer.is_initialized for x in (layer.keys, layer.values)]

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """See `Memory`."""
        if (contents := stream.contents) is not None:
            for layer, keys, values in zip(self._cache.layers, contents[::2], contents[1::2], strict=True):
                if not layer.is_initialized:  # it was loaded before the first forward
                    layer.lazy_initialization(*(x.unsqueeze(0).to(self._model.device) for x in (keys, values)))
                layer.keys[row].copy_(keys)
                layer.values[row].copy_(values)
        stream.row, stream.contents = row, None

    def park(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        parked = self.copy(stream)
        stream.contents, stream.peak = parked.contents, parked.peak
        self._clear(stream)

    def drop(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        stream.contents, stream.seen, stream.peak = None, 0, 0
        self._clear(stream)

    def _clear(self, stream: StreamMemory) -> None:
        """Free the row of a stream, and let nothing of it stay there."""
        row, stream.row = stream.row, None
        if row is not None:
            for x in self._tensors(row):
                x.zero_()

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """See `Memory`."""
        if not stream.seen:
            return StreamMemory(stream.num_sinks)
        contents = stream.contents if stream.row is None else self._tensors(stream.row)
        return replace(stream, row=None, contents=[x.to("cpu", copy=True) for x in contents])

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """See `Memory`."""
        cache = SinkCache(self._model, num_sinks=stream.num_sinks)
        contents = self.copy(stream).contents or []
        for layer, num_sinks, keys, values in zip(
            cache.layers, self._reserved_sinks(), contents[::2], contents[1::2], strict=False
        ):
            # Slots that are reserved for more sinks are left out.
            own = [
                torch.cat((x[:, : layer.layout.num_sinks], x[:, num_sinks:]), dim=1).unsqueeze(0)
                for x in (keys, values)
            ]
            layer.lazy_initialization(*own)
            layer.keys.copy_(own[0])
            layer.values.copy_(own[1])
        cache.state.set_tokens(stream.seen, stream.peak)
        return cache

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """See `Memory`."""
        stream, contents = StreamMemory(cache.layout.num_sinks), list[Tensor]()
        if cache.seen is None:
            return stream
        for layer, num_sinks in zip(cache.layers, self._reserved_sinks(), strict=True):
            own = layer.layout.num_sinks
            for x in (layer.keys[0], layer.values[0]):
                sinks = functional.pad(x[:, :own], (0, 0, 0, num_sinks - own))
                contents.append(torch.cat((sinks, x[:, own:]), dim=1))
        stream.contents, stream.seen, stream.peak = contents, cache.tokens_seen, cache.state.peak_columns
        return stream

    def _reserved_sinks(self) -> list[int]:
        """Slots for sinks of every layer."""
        return [layer.layout.num_sinks for layer in self._cache.layers]

    def can_rollback(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        # The token before, which may run again, needs the oldest token of its window.
        return self._keeps(stream, count, self._cache.layout.headroom)

    def can_go_on(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        # The next token has the slot of one that has left its window.
        return self._keeps(stream, count, self._cache.layout.headroom + 1)

    def _keeps(self, stream: StreamMemory, count: int, limit: int) -> bool:
        """Whether the last ``count`` tokens are there, and all are at most ``limit`` behind the furthest one."""
        if count > stream.seen or stream.peak - stream.seen + count <= limit:
            return count <= stream.seen
        # Until a ring wraps around, nothing is overwritten.
        layouts = [layer.layout for layer in self._cache.layers]
        return all(stream.peak <= (stream.num_sinks if x.num_sinks else 0) + x.ring for x in layouts)

    def rollback(self, stream: StreamMemory, count: int) -> None:
        """See `Memory`."""
        stream.seen -= count


class OwnCaches:
    """A `SinkCache` for each stream, and a forward for each: for models with states, and those that re-encode."""

    is_batched = False

    def __init__(self, model: PreTrainedModel, num_sinks: int) -> None:
        SinkCache(model, num_sinks=num_sinks)  # raises ValueError if the model does not take so many
        self._model = model
        self._streams: list[StreamMemory] = []

    @property
    def nbytes(self) -> int:
        """See `Memory`."""
        return sum(stream.contents.nbytes for stream in self._streams)

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """See `Memory`."""
        [(stream, ids, _)], model = inputs, self._model
        if (uncounted := stream.contents.tokens_seen - stream.seen) > 0:
            stream.contents.crop(-uncounted)  # of a forward after which an interruption came
        options = {forward_cache(model): stream.contents, "use_cache": True, **keep_last_logits(model)}
        return model(input_ids=torch.tensor([[*ids]], device=model.device), **options).logits[:, -1]

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """See `Memory`; the cache has counted them, too."""
        stream.seen = seen

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """See `Memory`."""
        if stream.contents is None:
            stream.contents = SinkCache(self._model, num_sinks=stream.num_sinks)
        stream.row = row
        self._streams.append(stream)

    def park(self, stream: StreamMemory) -> None:
        """See `Memory`; the contents stay where they are."""
        self._streams.remove(stream)
        stream.row = None

    def drop(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        if stream.row is not None:
            self.park(stream)
        stream.contents, stream.seen = None, 0

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """See `Memory`; the contents stay on the device."""
        return replace(stream, row=None, contents=copy.deepcopy(stream.contents))

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """See `Memory`."""
        cache = stream.contents
        return SinkCache(self._model, num_sinks=stream.num_sinks) if cache is None else copy.deepcopy(cache)

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """See `Memory`."""
        return StreamMemory(cache.layout.num_sinks, contents=cache, seen=cache.tokens_seen)

    def can_rollback(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        cache = stream.contents
        return cache is not None and count <= cache.tokens_seen and cache.can_rollback(*torch.tensor([[count], [0]]))

    def can_go_on(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        if count:
            return self.can_rollback(stream, count)
        return stream.contents is None or stream.contents.is_usable

    def rollback(self, stream: StreamMemory, count: int) -> None:
        """See `Memory`."""
        if count:
            stream.contents.crop(-count)
            stream.seen -= count


def _row(stream: StreamMemory) -> int:
    assert stream.row is not None
    return stream.row
