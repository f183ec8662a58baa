"""One decode step of one layer on a full window: sinkattn against the two ways it replaces.

    python -m pytest bench/bench_decode.py --benchmark-json=decode.json

Every step rotates, appends one token per stream and attends over sinks and window, but for ``sdpa``, which only
attends, over keys that lie contiguous and rotated already: what is left if everything else cost nothing.
``streaming-llm`` is the scheme of the StreamingLLM paper's code: keys are kept unrotated, eviction concatenates slices,
and the whole cache is rotated anew for every token (written here from the paper's description). Each takes its turn
over the caches of several layers, so that no cache stays in the processor's own.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import sinkattn
from sinkattn.rope import rotate

HEADS, KV_HEADS, HEAD_DIM, NUM_SINKS, LAYERS = 32, 8, 128, 4, 4
ROPE = sinkattn.Rope(1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
SCALE = 1 / math.sqrt(HEAD_DIM)


def new_token(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, heads, 1, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))


class Sinkattn:
    def __init__(self, history, window: int) -> None:
        key, value = history
        self.ring = sinkattn.RingKVCache(len(key), KV_HEADS, HEAD_DIM, NUM_SINKS, window, dtype=key.dtype)
        self.ring.append(key, value, rope=ROPE)

    def step(self, query, key, value):
        return sinkattn.sink_attention(query, key, value, self.ring, rope=ROPE)


class StreamingLLM:
    def __init__(self, history, window: int) -> None:
        self.keys, self.values = history
        self.cos, self.sin = ROPE.tables(torch.arange(NUM_SINKS + window))

    def step(self, query, key, value):
        evict_and_add = ((self.keys, key), (self.values, value))
        self.keys, self.values = (
            torch.cat((old[:, :, :NUM_SINKS], old[:, :, NUM_SINKS + 1 :], new), dim=2) for old, new in evict_and_add
        )
        query = rotate(query, self.cos[-1:], self.sin[-1:], interleaved=False)
        keys = rotate(self.keys, self.cos, self.sin, interleaved=False).repeat_interleave(HEADS // KV_HEADS, dim=1)
        values = self.values.repeat_interleave(HEADS // KV_HEADS, dim=1)
        weights = (query @ keys.mT * SCALE).softmax(dim=-1, dtype=torch.float32)
        return weights.to(values.dtype) @ values


class Sdpa:
    """Attention alone, on a cache without sinks' rotation and without append: a lower bound, not a peer."""

    def __init__(self, history, window: int) -> None:
        self.keys, self.values = (x.contiguous() for x in history)

    def step(self, query, key, value):
        return F.scaled_dot_product_attention(query, self.keys, self.values, scale=SCALE, enable_gqa=True)


WAYS = {"sinkattn": Sinkattn, "streaming-llm": StreamingLLM, "sdpa": Sdpa}


def caches(way: str, batch: int, window: int, dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    shape = (batch, KV_HEADS, NUM_SINKS + window, HEAD_DIM)
    return [WAYS[way]([torch.randn(shape, dtype=dtype) for _ in "kv"], window) for _ in range(LAYERS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [1024, 4096], ids=lambda window: f"window{window}")
@pytest.mark.parametrize("batch", [1, 8], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("way", WAYS)
def test_decode(benchmark, way: str, batch: int, window: int, dtype: torch.dtype) -> None:
    if way == "streaming-llm" and batch * window > 8192:
        pytest.skip("takes seconds a step and gigabytes of temporary keys")
    if way == "sinkattn":
        check_that_both_ways_agree(window, dtype)
    benchmark.group = f"decode B={batch} W={window} {dtype}"
    layers = itertools.cycle(caches(way, batch, window, dtype))
    token = new_token(batch, dtype)
    with torch.inference_mode():
        benchmark.pedantic(lambda: next(layers).step(*token), rounds=12, iterations=4, warmup_rounds=2)
    read = 2 * batch * KV_HEADS * (NUM_SINKS + window) * HEAD_DIM * dtype.itemsize
    benchmark.extra_info.update(
        bytes_read=read,
        gigabytes_per_second=round(read / benchmark.stats.stats.median / 1e9, 2),
        threads=torch.get_num_threads(),
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )


def check_that_both_ways_agree(window: int, dtype: torch.dtype) -> None:
    """A step must give the same on both sides before either is timed."""
    ours, theirs = (caches(way, 1, window, dtype)[0] for way in ("sinkattn", "streaming-llm"))
    for _ in range(3):
        token = new_token(1, dtype)
        torch.testing.assert_close(ours.step(*token), theirs.step(*token), atol=2e-3, rtol=2e-2)
