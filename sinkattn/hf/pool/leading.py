"""`LeadingMemory`: rank 0 leads a pool of a model that is spread over ranks, and the others do what it does.

Rank 0 alone has streams, a scheduler and samplers. Whatever changes keys and values, it first tells the other ranks, in
a record of a few numbers and new ids. So all make the same forwards in the same order, whichever threads want them.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.load_stream import load_cache
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool import records
from sinkattn.hf.pool.engine import step_modes
from sinkattn.hf.pool.memory import NewTokens, StreamMemory, memory_for
from sinkattn.hf.pool.records import Named, Record


class LeadingMemory:
    """Memory of streams on rank 0, which lets the other ranks, in `join_pool`, do the same to theirs.

    After an operation that has failed here, or could not be sent, the ranks may be in different forwards. So nothing
    but `drop` works any more.

    Args:
        model: spread over ranks; raises ValueError if it is not, or if this is another rank.
        num_rows: see `memory_for`.
        num_sinks: see `memory_for`.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, num_sinks: int) -> None:
        self._model, self._arguments = model, (num_rows, num_sinks)
        self._ranks = records.check_ranks(model, leads=True)
        self._memory = memory_for(model, num_rows, num_sinks)
        self.is_batched = self._memory.is_batched
        self._lock = threading.Lock()
        self._numbers = weakref.WeakKeyDictionary[StreamMemory, int]()
        self._next_number = itertools.count()
        self._gone = deque[int]()
        """Of streams that were forgotten, maybe by a garbage collection in the midst of anything."""
        self._has_failed = self._is_closed = False

    def open(self) -> None:
        """Wait until the other ranks are in `join_pool`; once, before everything else."""
        self._group = records.new_group(self._ranks)
        records.send(self._group, Record("open", arguments=self._arguments))

    @property
    def num_ranks(self) -> int:
        """Ranks of the model."""
        return self._ranks.size()

    @property
    def has_failed(self) -> bool:
        """Whether the ranks cannot go on."""
        return self._has_failed

    def close(self) -> None:
        """Let the other ranks return from `join_pool`."""
        with self._lock:
            if not self._is_closed and not self._has_failed:
                self._is_closed = True
                with suppress(RuntimeError):  # a rank that has ended need not be told
                    records.send(self._group, Record("close"))

    @property
    def nbytes(self) -> int:
        """See `Memory`; on this rank."""
        return self._memory.nbytes

    def run(self, inputs: Sequence[NewTokens]) -> Tensor:
        """See `Memory`."""
        require_patch(self._model)  # before the others are told
        arguments = [(list(x.ids), x.begin, x.num_logits) for x in inputs]
        with self._telling("run", [x.stream for x in inputs], arguments):
            return self._memory.run(inputs)

    def commit(self, stream: StreamMemory, seen: int) -> None:
        """See `Memory`; the next record has the number."""
        self._memory.commit(stream, seen)

    def bring_in(self, stream: StreamMemory, row: int) -> None:
        """See `Memory`."""
        with self._telling("bring_in", [stream], [row]):
            self._memory.bring_in(stream, row)

    def park(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        with self._telling("park", [stream]):
            self._memory.park(stream)

    def drop(self, stream: StreamMemory) -> None:
        """See `Memory`."""
        try:
            with self._telling("drop", [stream]):
                self._memory.drop(stream)
        except RuntimeError:
            self._memory.drop(stream)

    def copy(self, stream: StreamMemory) -> StreamMemory:
        """See `Memory`."""
        with self._telling("copy", [stream]) as number:
            copied = self._memory.copy(stream)
            self._note(copied, number)
            return copied

    def to_cache(self, stream: StreamMemory) -> SinkCache:
        """See `Memory`; what this rank has, after `shards`."""
        return self._memory.to_cache(stream)

    def from_cache(self, cache: SinkCache) -> StreamMemory:
        """See `Memory`; what this rank has. `load` does so on all of them."""
        return self._memory.from_cache(cache)

    def shards(self, stream: StreamMemory) -> list[dict[str, Tensor]]:
        """What each of the other ranks has of a stream, a copy, by the names of `SinkCache.save`. It has no more then.

        Of this rank it is what the layers have in `to_cache`.
        """
        with self._telling("shards", [stream]):
            return records.gather(self._group, None)[1:]

    def load(self, saved: SavedStreams, shards: list[dict[str, Tensor]]) -> StreamMemory:
        """A stream in host memory that was saved, with the `shards` of the other ranks; raises ValueError for others.

        Args:
            saved: what this rank had.
            shards: what each of the other ranks had.
        """
        common, own = dict[str, Tensor](), dict[str, Tensor]()
        for name, x in saved.tensors.items():
            (own if is_of_layer(name) else common)[name] = x
        for rank, shard in enumerate(shards, 1):
            if _kinds(shard) != _kinds(own):
                raise ValueError(f"path: rank{rank}: expected as many keys and values of other heads as rank 0 has")
        arguments = (saved.fields, saved.rows, saved.converts_dtype, common, shards)
        with self._telling("load", arguments=arguments) as number, step_modes(self._model.device):
            try:
                stream = self._memory.from_cache(load_cache(require_patch(self._model), saved))
            except ValueError as error:  # on all ranks, as their tensors have the same shapes
                refusal = error
            else:
                self._note(stream, number)
                return stream
        raise refusal

    def can_rollback(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        return self._memory.can_rollback(stream, count)

    def can_go_on(self, stream: StreamMemory, count: int) -> bool:
        """See `Memory`."""
        return self._memory.can_go_on(stream, count)

    def rollback(self, stream: StreamMemory, count: int) -> None:
        """See `Memory`; the next record has the number."""
        self._memory.rollback(stream, count)

    @contextmanager
    def _telling(self, name: str, streams: Sequence[StreamMemory] = (), arguments: Sequence[Any] = ()) -> Iterator[int]:
        """Do something here that the other ranks are told to do as well; raises RuntimeError if they cannot go on.

        Returns the number of the stream that it makes, if it makes one.
        """
        with self._lock:  # so all do everything in the order in which it is sent
            if self._has_failed or self._is_closed:
                why = "an operation has failed on one of them" if self._has_failed else "they have ended"
                raise RuntimeError(f"pool: cannot go on with the ranks of its model, as {why}")
            named = [Named(self._number(x), replace(x, contents=None)) for x in streams]
            gone = [self._gone.popleft() for _ in range(len(self._gone))]
            number = next(self._next_number)
            try:
                records.send(self._group, Record(name, named, arguments, number, gone))
                yield number
            except BaseException:
                self._has_failed = True
                raise

    def _number(self, stream: StreamMemory) -> int:
        if (number := self._numbers.get(stream)) is None:
            number = next(self._next_number)
            self._note(stream, number)
        return number

    def _note(self, stream: StreamMemory, number: int) -> None:
        self._numbers[stream] = number
        weakref.finalize(stream, self._gone.append, number).atexit = False


def is_of_layer(name: str) -> bool:
    """Whether a tensor of `SinkCache.save` is of a layer, and another one on each rank."""
    return name.startswith("layers.")


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}
