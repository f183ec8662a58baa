"""Block sizes, warps and pipeline stages of the kernels, by shape and architecture: small tables, no autotuning."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_RING_SPLITS = 128


class Config(NamedTuple):
    """How a kernel is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def block_size(size: int) -> int:
    """Smallest power of two, 16 or more, that holds ``size``: the least that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def fits_decode(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether one tile holds the ``rows`` queries of a KV head without spilling registers."""
    return rows <= 16 or block_size(rows) * dim <= (2048 if dtype == torch.float32 else 8192)


def decode_config(rows: int, dim: int, dtype: torch.dtype, capability: int) -> Config:
    """Config of the decode kernel for ``rows`` queries per KV head, which `fits_decode`."""
    block_m = block_size(rows)
    if dtype == torch.float32:
        return Config(block_m, 16 if dim > 128 else 32, 8, 2)
    warps = 8 if block_m * dim > 2048 else 4
    return Config(block_m, 32 if dim > 128 else 64, warps, 3 if block_m < 64 or _shared_is_large(capability) else 2)


def chunk_config(dim: int, dtype: torch.dtype, capability: int) -> Config:
    """Config of the chunk kernel."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 2) if dim <= 64 else Config(16, 16, 8, 2) if dim <= 128 else Config(16, 16, 4, 1)
    if dim > 128:
        return Config(64, 32, 8, 2) if _shared_is_large(capability) else Config(32, 32, 4, 2)
    return Config(128, 64, 8, 3 if _shared_is_large(capability) else 2)


def _shared_is_large(capability: int) -> bool:
    # Shared memory per program: 227 KiB on Hopper and data-centre Blackwell, 163 on A100, 99 on all others.
    return 90 <= capability < 120


def num_kv_splits(num_kv_rows: int, ring: int, block_n: int, num_sms: int) -> int:
    """Programs per (row, KV head), from shapes only: how many tokens the ring holds is known only on the device.

    Either one program does everything, or several share the ring and one more does sinks and new tokens. The number
    minimises an estimate of the time: waves of programs, with two programs per SM, times the key blocks of a program
    plus two, which stand for its other work.
    """
    blocks = -(-ring // block_n)
    splits = min(
        range(1, min(blocks, MAX_RING_SPLITS) + 1),
        key=lambda splits: -(-num_kv_rows * splits // (2 * num_sms)) * (-(-blocks // splits) + 2),
    )
    return splits if splits == 1 else splits + 1
