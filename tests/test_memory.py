"""Memory of rings on Linux: huge pages are asked for where a tensor has room for them."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from sinkattn import RingKVCache, ops

SMAPS = Path("/proc/self/smaps")
needs_huge_pages = pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux with huge pages"
)


def is_advised(x: torch.Tensor) -> bool:
    """Whether the memory in the middle of a tensor is marked for huge pages (flag hg of its mapping)."""
    middle = x.data_ptr() + x.nbytes // 2
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)[1:]:
        begin, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if begin <= middle < end:
            return "hg" in re.search("^VmFlags: (.*)", mapping, re.MULTILINE)[1].split()
    raise AssertionError("no mapping")


@needs_huge_pages
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_large_ring_is_in_huge_pages(cache_dtype):
    large = RingKVCache(1, 8, 128, 4, 12_000, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert is_advised(large.keys)
    assert is_advised(large.values)
    assert not large.keys.count_nonzero()


@needs_huge_pages
def test_other_memory_is_not():
    """Negative control of `is_advised`."""
    assert not is_advised(torch.frombuffer(mmap.mmap(-1, 8 << 20), dtype=torch.uint8))


def test_a_small_ring_asks_for_none(monkeypatch):
    asked = []
    monkeypatch.setattr("sinkattn.ops.memory.advise_huge_pages", lambda address, size: asked.append((address, size)))
    RingKVCache(1, 2, 16, 4, 40)
    assert not asked
    large = RingKVCache(1, 8, 128, 4, 12_000, dtype=torch.bfloat16)
    assert asked == [(x.data_ptr(), x.nbytes) for x in (large.keys, large.values)]


def test_memory_is_that_of_torch_zeros():
    for size in ((2, 3, 4, 5), (4, 8, 12_000, 16), (1, 1, 0, 16)):
        x = ops.zeros(*size, dtype=torch.float16)
        assert torch.equal(x, torch.zeros(size, dtype=torch.float16))
    assert ops.zeros(1, 8, 12_000, 128, dtype=torch.int8, device="meta").is_meta
