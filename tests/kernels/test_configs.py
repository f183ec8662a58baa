"""How work is dealt out to programs."""

import pytest

pytest.importorskip("triton")

import torch

from sinkattn.kernels.configs import (
    MAX_RING_SPLITS,
    Config,
    Target,
    block_size,
    decode_config,
    num_chunk_splits,
    num_kv_splits,
)

NUM_SMS = 132


@pytest.mark.parametrize("warps", [2, 4, 8])
@pytest.mark.parametrize("num_kv_rows", [1, 8, 24, 64, 100, 128, 320, 512, 5000])
@pytest.mark.parametrize("ring", [1, 64, 65, 1024, 4096, 16384, 10**6])
def test_splits_fill_the_gpu_once(ring, num_kv_rows, warps):
    config = Config(16, 64, warps, 3)
    parts, blocks = num_kv_splits(num_kv_rows, ring, config, NUM_SMS), -(-ring // 64)
    assert parts != 2, "one alone, or two and one more"
    splits = max(1, parts - 1)
    assert splits <= min(blocks, MAX_RING_SPLITS)
    at_once = NUM_SMS if warps > 2 else 3 * NUM_SMS
    assert parts <= 3 or num_kv_rows * parts <= at_once
    longest = -(-blocks // splits)
    assert -(-blocks // longest) == splits, "fewer splits would be as long"
    if num_kv_rows < NUM_SMS and blocks > 1:
        assert splits > 1
        more = next((n for n in range(splits + 1, blocks + 1) if -(-blocks // n) < longest), None)
        assert more is None or more > MAX_RING_SPLITS or more == 3 or num_kv_rows * (more + 1) > at_once


@pytest.mark.parametrize(
    ("num_kv_rows", "window", "config", "parts"),
    [
        (8, 1024, Config(16, 64, 4, 3), 9),
        (8, 4096, Config(16, 64, 4, 3), 14),
        (8, 16384, Config(16, 64, 4, 3), 16),
        (32, 4096, Config(16, 32, 2, 3), 12),
        (64, 1024, Config(16, 32, 2, 3), 6),
        (64, 4096, Config(16, 32, 2, 3), 6),
        (512, 4096, Config(16, 32, 2, 3), 1),
    ],
)
def test_shapes_that_were_measured(num_kv_rows, window, config, parts):
    """On an H200: 132 multiprocessors, four queries for each KV head, head_dim 128."""
    chosen = decode_config(4, 128, torch.bfloat16, Target(90, NUM_SMS), num_kv_rows)
    assert chosen == config
    assert num_kv_splits(num_kv_rows, window, chosen, NUM_SMS) == parts


def test_blocks_are_powers_of_two_of_16_or_more():
    assert [block_size(size) for size in (1, 16, 17, 64, 71, 80, 128, 256)] == [16, 16, 32, 64, 128, 128, 128, 256]


def test_chunks_are_split_when_queries_are_few_and_keys_many():
    config = Config(64, 128, 8, 3)
    assert num_chunk_splits(32, 4160, config, NUM_SMS) == 4, "one wave"
    assert num_chunk_splits(1, 1024, config, NUM_SMS) == 4, "two blocks of keys for each"
    assert num_chunk_splits(1, 1, config, NUM_SMS) == 1
    assert num_chunk_splits(NUM_SMS // 2 + 1, 4160, config, NUM_SMS) == 1
    assert num_chunk_splits(10 * NUM_SMS, 4160, config, NUM_SMS) == 1
