"""Block sizes, warps and pipeline stages of the kernels, by shape and architecture: small tables, no autotuning."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_RING_SPLITS = 128
# (row, KV head) pairs from which on the decode kernel uses programs of two warps.
MANY_KV_ROWS = 32


class Target(NamedTuple):
    """What kernels are compiled for: compute capability (90 for 9.0) and number of streaming multiprocessors."""

    capability: int
    num_sms: int


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


def decode_config(
    rows: int, dim: int, dtype: torch.dtype, target: Target, num_kv_rows: int, eight_bit: bool = False
) -> Config:
    """Config of the decode kernel for ``rows`` queries per (row, KV head), which `fits_decode`.

    eight_bit: over a ring of 8 bits. No such config has run on a GPU: they are those of the ``dtype`` of queries, or
    smaller where these spill registers.
    """
    block_m = block_size(rows)
    if dtype == torch.float32:
        return Config(block_m, 16, 8, 1) if eight_bit else Config(block_m, 16 if dim > 128 else 32, 8, 2)
    if num_kv_rows >= MANY_KV_ROWS and block_m == 16 and 64 < dim <= 128:
        # On an H200, head_dim 128 (bench/results/nvidia-h200-2026-11-27-sweep.json): microseconds of this config and of
        # four warps with blocks of 64, each with its best number of splits.
        #   KV rows 32, window 4096: 22.8, 23.5;  64, 4096: 41.1, 42.7;  64, 1024: 16.4, 17.2;
        #   512, 4096: 246.3, 247.5;  512, 1024: 71.6, 75.5;  but 8, 4096: 16.1, 14.1;  8, 1024: 10.5, 9.7.
        return Config(block_m, 32, 2, 3)
    warps = 8 if block_m * dim > 2048 else 4
    return Config(
        block_m, 32 if dim > 128 else 64, warps, 3 if block_m < 64 or _shared_is_large(target.capability) else 2
    )


def chunk_config(
    dim: int, dtype: torch.dtype, target: Target, num_kv_rows: int, rows: int, eight_bit: bool = False
) -> Config:
    """Config of the chunk kernel for ``rows`` queries per (row, KV head); eight_bit: as for `decode_config`."""
    capability = target.capability
    if dtype == torch.float32:
        return Config(32, 32, 8, 2) if dim <= 64 else Config(16, 16, 8, 2) if dim <= 128 else Config(16, 16, 4, 1)
    if dim > 128:
        return Config(64, 32, 8, 2) if _shared_is_large(capability) else Config(32, 32, 4, 2)
    if not _shared_is_large(capability):
        return Config(128, 64, 8, 2)
    if 2 * num_kv_rows * -(-rows // 128) <= target.num_sms:
        # Measured as above, 8 KV rows of 256 queries, window 4096: 94 us, and 115 us in larger blocks of queries.
        return Config(64, 64 if eight_bit else 128, 8, 3)
    return Config(128, 64, 8, 3)


def backward_config(dim: int, dtype: torch.dtype, target: Target) -> Config:
    """Config of the backward kernels: blocks of ``block_m`` queries and ``block_n`` keys. Not tuned on a GPU."""
    if dtype == torch.float32:
        return Config(32, 32, 8, 1) if dim <= 64 else Config(16, 16, 8, 1)
    if dim > 128:
        return Config(32, 32, 8, 1)
    return Config(64, 64, 8, 2 if _shared_is_large(target.capability) else 1)


def _shared_is_large(capability: int) -> bool:
    # Shared memory per program: 227 KiB on Hopper and data-centre Blackwell, 163 on A100, 99 on all others.
    return 90 <= capability < 120


def num_kv_splits(num_kv_rows: int, ring: int, config: Config, num_sms: int) -> int:
    """Programs per (row, KV head), from shapes only: how many tokens the ring holds is known only on the device.

    Either one program does everything, or several share the ring and one more does sinks and new tokens. As many as run
    at the same time (but two splits if one would leave processors idle), or fewer if the longest has no more blocks of
    keys to read then: each split adds to what is combined at the end.
    """
    # Measured as above, 8 KV rows, window 4096: 14.1 us with 12 splits and 104 programs, 17.5 with 32 and 264. With two
    # warps, 64 KV rows: 41.1 us with 448 programs, 44.7 with 576.
    programs = num_sms if config.warps > 2 else 3 * num_sms
    # With two splits, more programs than fit at once are still better than too few to use all processors.
    most = min(max(programs // num_kv_rows - 1, 2 if num_kv_rows < num_sms else 1), MAX_RING_SPLITS)
    blocks = -(-ring // config.block_n)
    splits = -(-blocks // -(-blocks // most))
    return splits if splits == 1 else splits + 1


def num_chunk_splits(programs: int, keys: int, config: Config, num_sms: int) -> int:
    """Parts into which the keys of a chunk are split, for so many ``programs`` of queries and ``keys`` in sight.

    As many as run at the same time, each with two blocks of keys or more: combining them costs about as much as one.
    """
    return max(1, min(num_sms // programs, -(-keys // config.block_n) // 2))
