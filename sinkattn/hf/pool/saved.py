"""Streams of a pool in files: those of `SinkCache.save`, with what the pool knows of the stream besides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.id_history import MAX_PREFIX_IDS, UNKNOWN_ID, IdHistory
from sinkattn.hf.cache.load_stream import load_cache, read_saved
from sinkattn.hf.cache.stream_file import SavedStreams, read_header
from sinkattn.hf.fingerprint import Accepted, fingerprint
from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.leading import LeadingMemory
from sinkattn.hf.pool.memory import Memory, StreamMemory
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.ops import DTYPES

POOL = "pool"
# What rank 1 has of a stream, if rank 0 leads the pool, is in the part "rank1", and so on.
RANK = "rank"


def file_parts(
    patch: ModelPatch, state: StreamState, memory: Memory, stream: StreamMemory, logits: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """What `write_streams` writes for `Stream.save`.

    Args:
        patch: of the model.
        state: the stream.
        memory: of the pool.
        stream: a copy of what it has in memory, which must not be used any more.
        logits: those after its last token; None if they are not known.
    """
    shards = memory.shards(stream) if isinstance(memory, LeadingMemory) else []
    cache = memory.to_cache(stream)
    params = state.sampler.params
    if cache.state.history.prefix_ids is None:
        _record(cache.state.history, state.ids)
    numbers, ids = (torch.from_numpy(x) for x in state.ids.known())
    tensors = {"numbers": numbers, "ids": ids}
    if logits is not None:
        tensors["logits"] = logits
    own_fields = {
        "prefix": state.prefix,
        "queue": [*state.queue],
        "num_ids": len(state.ids),
        "peak_ids": state.ids.peak,
        "num_known": len(ids),
        "message_begins": None if state.messages is None else state.messages.begins,
        "message_ends": [] if state.messages is None else state.messages.ends,
        "logits_dtype": None if logits is None else str(logits.dtype),
        "sampling": {x.name: getattr(params, x.name) for x in fields(params) if x.name != "processors"},
        "has_processors": bool(params.processors),
        "sampler": state.sampler.state(),
        "notes": state.notes,
    }
    return (
        cache.state_tensors()
        | {f"{RANK}{rank}.{name}": x for rank, shard in enumerate(shards, 1) for name, x in shard.items()}
        | {f"{POOL}.{name}": x.unsqueeze(0) for name, x in tensors.items()},
        fingerprint(patch),
        {**cache.state_fields(), POOL: own_fields},
    )


def load(
    path: str | Path,
    patch: ModelPatch,
    memory: Memory,
    new_sampler: Callable[[SamplingParams], StreamSampler],
    *,
    vocabulary: int,
    sampling: SamplingParams | None,
    accept: Collection[Accepted],
) -> StreamState:
    """Load a stream, without a row; see `StreamPool.load`."""
    saved = read_saved(patch, path, accept)
    if not isinstance(saved.fields.get(POOL), dict):
        raise ValueError(f"path: expected a stream of a StreamPool, got {path}, which SinkCache.save has written")
    own = saved.part(POOL, rows=1)
    if isinstance(memory, LeadingMemory):
        stream = memory.load(saved, [saved.split(f"{RANK}{rank}") for rank in range(1, memory.num_ranks)])
    else:
        stream = memory.from_cache(load_cache(patch, saved))
    layout = patch.layout_with(stream.num_sinks)
    state = StreamState(
        _ids(own, "prefix", vocabulary),
        _sampler(own, new_sampler, sampling),
        stream,
        StreamIds(layout),
        None
        if own.field("message_begins", (list, NoneType)) is None
        else Messages(layout.num_sinks, layout.window, layout.headroom),
        queue=deque(_ids(own, "queue", vocabulary)),
    )
    shape, cpu = (own.count("num_known"),), torch.device("cpu")
    numbers, ids = (own.tensor(name, shape, torch.int64, cpu)[0].numpy() for name in ("numbers", "ids"))
    count = own.count("num_ids")
    if count != stream.seen or not ((numbers >= 0) & (numbers < count) & (ids >= 0) & (ids < vocabulary)).all():
        raise ValueError(f"path: pool.ids: expected those of {stream.seen} tokens")
    state.ids.restore(count, max(count, own.count("peak_ids")), numbers, ids)
    if state.messages is not None:
        begins, ends = own.counts("message_begins"), own.counts("message_ends")
        # There are none where a rollback has ended in the midst of a long message whose beginning is forgotten.
        has_first = bool(begins) or count > layout.num_sinks
        if not has_first or len(ends) != len(begins) or begins != sorted(begins):
            raise ValueError(f"path: pool.message_begins: expected messages in order, got {begins} and {ends}")
        state.messages.restore(begins, ends)
    if (name := own.field("logits_dtype", (str, NoneType))) is not None:
        dtype = next((x for x in DTYPES if str(x) == name), torch.float32)
        state.parked_logits, state.has_logits = own.tensor("logits", (vocabulary,), dtype, cpu)[0], True
    if "notes" in own.fields:  # files of before have none
        state.notes = own.field("notes", dict)
    saved.check_all_taken()
    return state


def read_notes(path: str | Path) -> Any:
    """`Stream.notes` in a file, of which nothing else is read or checked.

    Raises:
        OSError: the file cannot be read.
        LookupError, TypeError, ValueError: it is no file of a stream, or is damaged.
    """
    return read_header(path)["state"][POOL]["notes"]


def _ids(own: SavedStreams, name: str, vocabulary: int) -> list[int]:
    ids = own.counts(name)
    if any(x >= vocabulary for x in ids):
        raise ValueError(f"path: pool.{name}: expected ids below {vocabulary}, got {max(ids)}")
    return ids


def _sampler(
    own: SavedStreams, new_sampler: Callable[[SamplingParams], StreamSampler], sampling: SamplingParams | None
) -> StreamSampler:
    """The sampler as it was, or a new one for ``sampling``."""
    if sampling is not None:
        return new_sampler(sampling)
    if own.field("has_processors", bool):
        raise ValueError("sampling: expected the parameters again, as a file has no logits processors, got None")
    saved, drawn = own.field("sampling", dict), own.part("sampler")
    try:
        bias = {int(token): float(value) for token, value in saved.get("logit_bias", {}).items()}
        sampler = new_sampler(SamplingParams(**{**saved, "logit_bias": bias}))
        sampler.restore(
            {
                "seed": drawn.field("seed", int),  # of 64 bits
                "draws": drawn.count("draws"),
                "grammar_ids": drawn.counts("grammar_ids"),
            }
        )
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"path: pool.sampling: {error}") from error
    return sampler


def _record(history: IdHistory, ids: StreamIds) -> None:
    """Record the ids of a stream in the history of an empty cache."""
    count = len(ids)
    numbers, known = (torch.from_numpy(x) for x in ids.known())
    for begin, end in ((0, min(count, MAX_PREFIX_IDS)), (max(0, count - history.capacity), count)):
        part = torch.full((1, end - begin), UNKNOWN_ID)
        is_inside = (numbers >= begin) & (numbers < end)
        part[0, numbers[is_inside] - begin] = known[is_inside]
        if count:
            history.record(begin, torch.tensor([begin]), part)
