"""`join_pool`: what the ranks of a model do while rank 0 leads a pool of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.load_stream import load_cache
from sinkattn.hf.cache.stream_file import SavedStreams
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool import records
from sinkattn.hf.pool.engine import step_modes
from sinkattn.hf.pool.leading import is_of_layer
from sinkattn.hf.pool.memory import NewTokens, StreamMemory, memory_for
from sinkattn.hf.pool.records import Record


def join_pool(model: PreTrainedModel) -> None:
    """Take part in the pool that rank 0 makes with ``leads=True``, on every other rank; returns when it is closed.

    The model runs what rank 0's runs, and keeps the keys and values of its own heads. The process should end if this
    raises an error, as then the pool cannot go on.

    Args:
        model: as on rank 0, spread over ranks by ``tp_plan`` and prepared by `sinkattn.enable`.

    Raises:
        ValueError: for a model that is not enabled or not spread over ranks, and on rank 0.
        RuntimeError: if rank 0 ends without closing the pool, and for an error of the model.
    """
    require_patch(model)
    ranks = records.check_ranks(model, leads=False)
    group = records.new_group(ranks)
    joined = JoinedMemory(model, ranks.rank(), *records.receive(group).arguments)
    while (record := records.receive(group)).name != "close":
        result = joined.follow(record)
        if record.name == "shards":
            records.gather(group, result)


class JoinedMemory:
    """Memory of another rank than 0, which does what records say.

    Args:
        model: on this rank.
        rank: this one.
        num_rows: see `memory_for`.
        num_sinks: see `memory_for`.
    """

    def __init__(self, model: PreTrainedModel, rank: int, num_rows: int, num_sinks: int) -> None:
        self._model, self._rank = model, rank
        self._memory = memory_for(model, num_rows, num_sinks)
        self.streams: dict[int, StreamMemory] = {}
        """By their numbers; those that rank 0 has."""

    def follow(self, record: Record) -> dict[str, Tensor] | None:
        """Do what a record says; returns what it wants to know, if anything."""
        for number in record.gone:
            self.streams.pop(number, None)
        streams = [self._updated(*x) for x in record.streams]
        with step_modes(self._model.device):
            match record.name:
                case "run":
                    new = zip(streams, record.arguments, strict=True)
                    self._memory.run([NewTokens(stream, *each) for stream, each in new])
                case "copy":
                    self.streams[record.result] = self._memory.copy(*streams)
                case "load":
                    self._load(record.result, *record.arguments)
                case "shards":
                    tensors = self._memory.to_cache(*streams).state_tensors()
                    return {name: x.cpu() for name, x in tensors.items() if is_of_layer(name)}
                case name:
                    getattr(self._memory, name)(*streams, *record.arguments)
        return None

    def _updated(self, number: int, given: StreamMemory) -> StreamMemory:
        """The stream of a number, with as many tokens as it has on rank 0."""
        if given.seen and number not in self.streams:
            raise RuntimeError(f"rank {self._rank}: expected a stream that rank 0 has, got none")
        stream = self.streams.setdefault(number, StreamMemory(given.num_sinks))
        stream.seen, stream.peak = given.seen, given.peak
        return stream

    def _load(
        self,
        number: int,
        fields: dict[str, Any],
        rows: int,
        converts_dtype: bool,
        common: dict[str, Tensor],
        shards: Sequence[dict[str, Tensor]],
    ) -> None:
        saved = SavedStreams(None, fields, {**common, **shards[self._rank - 1]}, rows=rows)
        saved.converts_dtype = converts_dtype
        try:
            cache = load_cache(require_patch(self._model), saved)
        except ValueError:
            return  # rank 0 raises it, too
        self.streams[number] = self._memory.from_cache(cache)
