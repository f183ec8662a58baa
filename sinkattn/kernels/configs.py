"""Block sizes, warps and pipeline stages of the kernels, by shape and architecture: small tables, no autotuning."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
    large = block_m * dim > 2048
    if dtype == torch.float32:
        return Config(block_m, 16 if dim > 128 else 32, 8, 2)
    return Config(block_m, 32 if dim > 128 else 64, 8 if large else 4, 3)


def chunk_config(dim: int, dtype: torch.dtype, capability: int) -> Config:
    """For blocks of queries of many tokens."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 2) if dim <= 64 else Config(16, 16, 8, 2 if dim <= 128 else 1)
    if dim > 128:
        return Config(32, 32, 4, 2) if capability < 90 else Config(64, 32, 8, 2)
    return Config(128, 64, 8, 2 if capability < 90 else 3)


def splits(lines: int, slots: int, block_n: int, processors: int) -> int:
    """Over how many programs the window of each line is split: some three per processor, each with a block of keys.

    Chosen by shape alone: what is held at the moment is on the device.
    """
    wanted = 3 * processors // max(lines, 1)
    return max(1, min(wanted, -(-slots // block_n), 128))
