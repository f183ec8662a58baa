"""How work is dealt out to programs."""

import pytest

pytest.importorskip("triton")

from sinkattn.kernels.configs import MAX_RING_SPLITS, block_size, num_kv_splits


@pytest.mark.parametrize("lines", [1, 8, 24, 64, 128, 320, 512, 5000])
@pytest.mark.parametrize("slots", [1, 64, 65, 1024, 4096, 16384, 10**6])
def test_parts_fill_the_processors(lines, slots):
    processors, block_n = 132, 64
    parts, blocks = num_kv_splits(lines, slots, block_n, processors), -(-slots // block_n)
    assert parts != 2, "one alone, or two and one more"
    splits = max(1, parts - 1)
    assert splits <= blocks
    rounds = -(-lines * splits // (2 * processors)) * -(-blocks // splits)
    ideal = lines * blocks / (2 * processors)
    assert rounds <= max(1.25 * ideal + 3, -(-blocks // MAX_RING_SPLITS))


def test_blocks_are_powers_of_two_of_16_or_more():
    assert [block_size(size) for size in (1, 16, 17, 64, 71, 80, 128, 256)] == [16, 16, 32, 64, 128, 128, 128, 256]
