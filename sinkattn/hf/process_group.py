"""`begin_process_group`: the processes that torchrun has started find each other."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

# Ranks may take long to load a model, some longer than others.
TIMEOUT = timedelta(hours=2)


def begin_process_group() -> None:
    """Begin the default process group as transformers would, unless there is one, also after a restart by torchrun.

    The store of torchrun outlives its processes. Without a prefix of their own, those of a new attempt would find there
    the addresses of those before.
    """
    if distributed.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "gloo" if device is None else "nccl",
        store=distributed.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]  # not in its __all__
        rank=rank,
        world_size=world_size,
        device_id=device,
        timeout=TIMEOUT,
    )
