"""Forward and backward of one layer's attention over a full window, compared with PyTorch's.

    python -m pytest bench/bench_gradients.py

``sinkattn`` rotates, appends and attends over its ring; its backward gives the gradients of queries, keys and values.
``sdpa``: PyTorch's attention over contiguous keys, rotated already, to which the new ones are concatenated, under the
exact mask; nothing is rotated or appended. Both gradients are compared first, without rotation.
"""

import pytest
import torch
import torch.nn.functional as F
from bench_attention import NUM_SINKS
from torch import Tensor

import sinkattn

WINDOW, TOKENS, ROUNDS = 1020, 512, 7
SHAPES = {"H=32 Hkv=8 D=128": (32, 8, 128), "H=9 Hkv=3 D=64": (9, 3, 64)}


def leaves(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, h, TOKENS, head_dim, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_chunk(bench, name: str, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = SHAPES[name]
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        past = [torch.randn(1, kv_heads, NUM_SINKS + WINDOW, head_dim, dtype=dtype) for _ in range(2)]
        ring = sinkattn.RingKVCache(1, kv_heads, head_dim, NUM_SINKS, WINDOW, dtype=dtype)
        ring.append(*past)
        rope = sinkattn.Rope(1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))
        gradient = torch.randn(1, heads, TOKENS, head_dim, dtype=dtype)
        query, key = torch.arange(TOKENS)[:, None] + NUM_SINKS + WINDOW, torch.arange(NUM_SINKS + WINDOW + TOKENS)
        mask = (key <= query) & ((key < NUM_SINKS) | (key > query - WINDOW))

        def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, (key, value), strict=True))
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

        inputs = leaves(heads, kv_heads, head_dim, dtype)
        gradients = []
        for attend in (lambda *x: sinkattn.sink_attention(*x, ring), sdpa):
            attend(*inputs).backward(gradient)
            gradients.append([x.grad.float() for x in inputs])
            for x in inputs:
                x.grad = None
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * theirs.norm()

        def run(attend) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                attend(*inputs).backward(gradient)

        methods = {
            "sinkattn": lambda: lambda: run(lambda *x: sinkattn.sink_attention(*x, ring, rope=rope)),
            "sdpa": lambda: lambda: run(sdpa),
        }
        timings = bench.time_interleaved(methods, ROUNDS)
    ratio, shape = timings.ratio("sinkattn", "sdpa"), f"{name} {'fp32' if dtype == torch.float32 else 'bf16'}"
    figures = {**timings.figures("sinkattn", "sdpa"), "sinkattn / sdpa": ratio}
    bench.add_row(f"Forward and backward of a chunk of {TOKENS}, W={WINDOW}, one layer", shape, figures)
    if dtype == torch.float32:
        bench.add_target("forward and backward, fp32: sinkattn / sdpa at most 1.00", shape, ratio, ratio <= 1)
