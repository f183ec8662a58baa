"""Block sizes, warps and pipeline stages of the kernels, by shape and architecture: small tables, no autotuning."""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_SPLITS = 128


class Config(NamedTuple):
    """How a kernel is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def block_of(size: int) -> int:
    """Smallest power of two, 16 or more, that holds ``size``: what the matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def fits_decode(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether one tile holds the ``rows`` queries of a key head without running out of registers."""
    return rows <= 16 or block_of(rows) * dim <= (2048 if dtype == torch.float32 else 8192)


def decode_config(rows: int, dim: int, dtype: torch.dtype, capability: int) -> Config:
    """For ``rows`` queries of one key head that `fits_decode`."""
    block_m = block_of(rows)
    if dtype == torch.float32:
        return Config(block_m, 16 if dim > 128 else 32, 8, 2)
    warps = 8 if block_m * dim > 2048 else 4
    return Config(block_m, 32 if dim > 128 else 64, warps, 3 if block_m < 64 or _shared_is_large(capability) else 2)


def chunk_config(dim: int, dtype: torch.dtype, capability: int) -> Config:
    """For blocks of queries of many tokens."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 2) if dim <= 64 else Config(16, 16, 8, 2) if dim <= 128 else Config(16, 16, 4, 1)
    if dim > 128:
        return Config(64, 32, 8, 2) if _shared_is_large(capability) else Config(32, 32, 4, 2)
    return Config(128, 64, 8, 3 if _shared_is_large(capability) else 2)


def _shared_is_large(capability: int) -> bool:
    # 227 KiB per program on Hopper and on data centres' Blackwell; 163 on A100, 99 on all others.
    return 90 <= capability < 120


def parts_of_a_line(lines: int, slots: int, block_n: int, processors: int) -> int:
    """Over how many programs the work of each line is split, by shape alone: what is held now is on the device.

    One does it all, or several share the ring and one more does the rest. The time is taken to be the number of times
    that all processors, with room for two programs each, are filled, times the blocks of keys of a program and two
    more, for what else it does.
    """
    blocks = -(-slots // block_n)
    splits = min(
        range(1, min(blocks, MOST_SPLITS) + 1),
        key=lambda splits: -(-lines * splits // (2 * processors)) * (-(-blocks // splits) + 2),
    )
    return splits if splits == 1 else splits + 1
