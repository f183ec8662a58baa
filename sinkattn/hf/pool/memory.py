"""Memory of the streams of a pool, and the forwards on it: rows of shared rings, or a cache for each stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool.disk import OnDisk
from sinkattn.hf.pool.moved import moved
from sinkattn.hf.pool.row_cache import RowCache, RowInput
from sinkattn.hf.pool.row_tensors import RowTensors, clear_row, row_tensors, with_sinks, write_row
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
    """Keys and values while it is parked, in host memory or `OnDisk`, or its cache; None for none."""
    seen: int = 0
    """Tokens of the stream in rings."""
    peak: int = 0
    """The most ever written there, by failed forwards too; a rollback does not lower it."""

    @property
    def place(self) -> Literal["device", "host", "disk"] | None:
        """Where its keys and values are; None without any."""
        if self.row is not None:
            return "device"
        return None if self.contents is None else "disk" if isinstance(self.contents, OnDisk) else "host"


class NewTokens(NamedTuple):
    """New tokens of a stream, which a forward runs."""

    stream: StreamMemory
    ids: Sequence[int]
    begin: int
    """First token that their window may hold."""
    num_logits: int = 1
    """How many of them, the last ones, the logits are wanted of."""


class Memory(Protocol):
    """Memory for the streams of a pool, in rows."""

    is_batched: bool
    """Whether a forward may run several streams."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """Append tokens to streams that have a row.

        They count only after `commit`, maybe of some of them, the first ones; then the others may count later, as long
        as nothing else is appended and nothing rolled back. Until then they are a part of the contents.

        Returns:
            Logits of the last tokens of each, as many as are wanted of any: ``[streams, tokens, vocabulary]``.
        """

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """Count tokens that a forward has appended to a stream, which has so many then."""

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """Give a stream, which is not on disk, a free row."""

    def park(self, stream: StreamMemory) -> None:
        """Free the row of a stream, whose contents go to host memory."""

    def drop(self, stream: StreamMemory) -> None:
        """Free the row of a stream, which is empty then."""

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """A copy, in host memory, of a stream that is not on disk."""

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """The contents of a stream in host memory, which must not be used any more, as a cache without recorded ids."""

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """The contents of such a cache in host memory; the cache must not be used any more."""

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
        require_patch(self._model)  # or another forward would get these caches
        ids, mask = self._cache.select(
            [RowInput(_row(x.stream), x.stream.seen, x.stream.num_sinks, x.begin, x.ids) for x in inputs]
        )
        for x in inputs:
            x.stream.peak = max(x.stream.peak, x.stream.seen + len(x.ids))
        options, num_logits = self._options, max(x.num_logits for x in inputs)
        if "logits_to_keep" in options:
            options = {**options, "logits_to_keep": num_logits}
        output = self._model(input_ids=ids, attention_mask=mask, **options)
        return output.logits[: len(inputs), -num_logits:]

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """See `Memory`."""
        stream.seen = seen

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """See `Memory`."""
        if stream.contents is not None:
            for layer, tensors in zip(self._cache.layers, stream.contents, strict=True):
                write_row(layer, row, tensors, self._model.device)
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
            for layer in self._cache.layers:
                clear_row(layer, row)

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """See `Memory`."""
        if not stream.seen:
            return StreamMemory(stream.num_sinks)
        contents = stream.contents if stream.row is None else row_tensors(self._cache.layers, stream.row)
        return replace(stream, row=None, contents=moved(contents, "cpu"))

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """See `Memory`."""
        cache = SinkCache(self._model, num_sinks=stream.num_sinks)
        for layer, num_sinks, tensors in zip(cache.layers, self._reserved_sinks(), stream.contents or [], strict=False):
            # Slots that are reserved for more sinks are left out.
            own = with_sinks(tensors, num_sinks, layer.layout.num_sinks)
            write_row(layer, 0, own, torch.device("cpu"))
        cache.state.set_tokens(stream.seen, stream.peak)
        return cache

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """See `Memory`."""
        stream, contents = StreamMemory(cache.layout.num_sinks), list[RowTensors]()
        if cache.seen is None:
            return stream
        for layer, num_sinks in zip(cache.layers, self._reserved_sinks(), strict=True):
            own = {name: x[0].cpu() for name, x in layer.tensors.items()}
            contents.append(with_sinks(own, layer.layout.num_sinks, num_sinks))
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
        self._rows: dict[int, StreamMemory] = {}
        """The last stream that got each row; it may have lost it since."""

    @property
    def nbytes(self) -> int:
        """See `Memory`."""
        residents = [stream for row, stream in [*self._rows.items()] if stream.row == row]
        return sum(cache.nbytes for stream in residents if (cache := stream.contents) is not None)

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """See `Memory`."""
        require_patch(self._model)
        [(stream, ids, *_)], model = inputs, self._model
        _drop_uncounted(stream)
        options = {forward_cache(model): stream.contents, "use_cache": True, **keep_last_logits(model)}
        return model(input_ids=torch.tensor([[*ids]], device=model.device), **options).logits[:, -1:]

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """See `Memory`; the cache has counted them, too."""
        stream.seen = seen

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """See `Memory`."""
        cache = stream.contents
        if cache is None:
            cache = SinkCache(self._model, num_sinks=stream.num_sinks)
        stream.contents = moved(cache, self._model.device)
        self._rows[row], stream.row = stream, row

    def park(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        stream.row = None
        stream.contents = moved(stream.contents, "cpu")

    def drop(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        stream.row, stream.contents, stream.seen = None, None, 0

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """See `Memory`."""
        return replace(stream, row=None, contents=moved(stream.contents, "cpu"))

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """See `Memory`."""
        if stream.contents is None:
            return SinkCache(self._model, num_sinks=stream.num_sinks)
        _drop_uncounted(stream)
        cache: SinkCache = stream.contents
        return cache

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """See `Memory`."""
        return StreamMemory(cache.layout.num_sinks, contents=moved(cache, "cpu"), seen=cache.tokens_seen)

    def can_rollback(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        cache = _outline(stream)
        if cache is None or count > stream.seen:
            return False
        return cache.can_rollback(*torch.tensor([[cache.tokens_seen - stream.seen + count], [0]]))

    def can_go_on(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        if count:
            return self.can_rollback(stream, count)
        cache = _outline(stream)
        return cache is None or cache.is_usable

    def rollback(self, stream: StreamMemory, count: int) -> None:
        """See `Memory`; the cache forgets them before it is used again."""
        stream.seen -= count


def _outline(stream: StreamMemory) -> SinkCache | None:
    """The cache of a stream, maybe without the data of its tensors."""
    contents = stream.contents
    cache: SinkCache | None = contents.outline if isinstance(contents, OnDisk) else contents
    return cache


def _drop_uncounted(stream: StreamMemory) -> None:
    """Let a cache forget tokens that were rolled back, or of a forward after which an interruption came."""
    if (uncounted := stream.contents.tokens_seen - stream.seen) > 0:
        stream.contents.crop(-uncounted)


def _row(stream: StreamMemory) -> int:
    assert stream.row is not None
    return stream.row
