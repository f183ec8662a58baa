"""`Record`: what rank 0 tells the other ranks of a model that it leads in a pool, and how it gets there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from sinkattn.hf.pool.memory import StreamMemory
from sinkattn.hf.ranks import group_of_ranks

# How long ranks wait for rank 0, which may have nothing to do. The end of its process ends this at once.
PATIENCE = timedelta(days=3650)
CPU = torch.device("cpu")


class Named(NamedTuple):
    """A stream, as all ranks know it."""

    number: int
    memory: StreamMemory
    """Its numbers on rank 0, without contents."""


class Record(NamedTuple):
    """What all ranks do next."""

    name: str
    """Of a method of `Memory` or `LeadingMemory`; "open" and "close" are before and after all others."""
    streams: Sequence[Named] = ()
    arguments: Sequence[Any] = ()
    result: int = -1
    """Number of the stream that it makes, if it makes one."""
    gone: Collection[int] = ()
    """Numbers of streams that rank 0 has no more."""


def check_ranks(model: PreTrainedModel, *, leads: bool) -> ProcessGroup:
    """The ranks of a model; raises ValueError if it is in one process, or if not this but another rank ``leads``."""
    ranks = group_of_ranks(model)
    if ranks is None:
        raise ValueError("model: expected one that is spread over ranks (tp_plan), got one in one process")
    rank = torch.distributed.get_rank(ranks)
    if (rank == 0) != leads:
        expected = "rank 0 to lead the pool" if leads else "other ranks than 0, which leads it, to join the pool"
        raise ValueError(f"model: expected {expected}, got rank {rank}")
    return ranks


def new_group(ranks: ProcessGroup) -> ProcessGroup:
    """A group of these ranks for records; waits for all of them."""
    members = torch.distributed.get_process_group_ranks(ranks)
    return torch.distributed.new_group(members, PATIENCE, "gloo", use_local_synchronization=True)


def send(group: ProcessGroup, record: Record) -> None:
    """Tell the other ranks what to do."""
    torch.distributed.broadcast_object_list([record], group=group, device=CPU, group_src=0)


def receive(group: ProcessGroup) -> Record:
    """What rank 0 tells; raises RuntimeError if it has ended."""
    box: list[Any] = [None]
    try:
        torch.distributed.broadcast_object_list(box, group=group, device=CPU, group_src=0)
    except RuntimeError as error:
        raise RuntimeError("model: rank 0, which leads its pool, has ended without closing it") from error
    record: Record = box[0]
    return record


def gather(group: ProcessGroup, x: Any) -> list[Any]:
    """On rank 0 what each rank has given, in order; nothing on the others."""
    is_first = torch.distributed.get_rank(group) == 0
    given: list[Any] = [None] * torch.distributed.get_world_size(group) if is_first else []
    torch.distributed.gather_object(x, given if is_first else None, group=group, group_dst=0)
    return given
