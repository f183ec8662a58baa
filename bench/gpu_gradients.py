"""Forward and backward of one layer's attention over a full window, on a GPU.

    make bench-gpu ARGS="--only gradients"

``sinkattn`` rotates, appends and attends; its backward is PyTorch's matrix products, that of ``sinkattn triton`` its
Triton kernels. ``sdpa mask``: PyTorch's attention with the exact mask, in the backend that it chooses. ``flex``:
FlexAttention, compiled, with the same mask. Both attend over keys that are rotated already, to which the new ones are
concatenated. Nothing is captured in a graph.
"""

import math
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, KV_HEADS, NUM_SINKS, SCALE
from gpu import Comparison, relative_error
from gpu_attention import chunk_mask, random_chunk_inputs
from gpu_attention_methods import DTYPE
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sinkattn
from sinkattn.ops import gradients

SHAPES = [(512, 1020), (4096, 4096)]
TINY = [(24, 24)]
# RMS error relative to the gradient: bfloat16 weights and their derivatives are rounded to 0.2 %, several times.
MAX_ERROR = 3e-2


def pytest_generate_tests(metafunc) -> None:
    shapes = TINY if metafunc.config.getoption("rehearse") else SHAPES
    metafunc.parametrize("tokens, window", shapes, ids=["T{}-W{}".format(*shape) for shape in shapes])


def test_backward(bench, device, tokens: int, window: int) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        run(bench, device, tokens, window)


def run(bench, device: torch.device, tokens: int, window: int) -> None:
    inputs = random_chunk_inputs(device, tokens, window)
    ring = sinkattn.RingKVCache(1, KV_HEADS, HEAD_DIM, NUM_SINKS, window, headroom=tokens, dtype=DTYPE, device=device)
    ring.append(*inputs.past, rope=inputs.rope)
    gradient = torch.randn(1, HEADS, tokens, HEAD_DIM, dtype=DTYPE, device=device)
    leaves = [x.detach().requires_grad_() for x in inputs.new]

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ring.seen.fill_(inputs.past[0].shape[2])
        return sinkattn.sink_attention(query, key, value, ring, rope=inputs.rope, scale=SCALE)

    def both(key: Tensor, value: Tensor) -> list[Tensor]:
        return [torch.cat(pair, dim=2) for pair in zip(inputs.past, (key, value), strict=True)]

    mask = chunk_mask(device, tokens, window)

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, *both(key, value), attn_mask=mask, scale=SCALE, enable_gqa=True)

    def step(attend: Callable[..., Tensor], triton: bool) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), patch.object(gradients, "TRITON_BACKWARD", triton):
            return torch.autograd.grad(attend(*leaves), leaves, gradient)

    comparison = Comparison(bench, device, f"B=1 W={window} T={tokens}")
    expected = step(ours, False)
    comparison.add("sinkattn", partial(step, ours, False), capture=False)

    def add(name: str, attend: Callable[..., Tensor], triton: bool = False) -> None:
        error = max(map(relative_error, step(attend, triton), expected))
        if comparison.check_output(name, error, MAX_ERROR):
            comparison.add(name, partial(step, attend, triton), capture=False)

    names = ["sinkattn triton", "sdpa mask", "flex"]
    comparison.try_add(names[0], partial(add, names[0], ours, True))
    comparison.try_add(names[1], partial(add, names[1], sdpa))
    comparison.try_add(names[2], lambda: add(names[2], flex(device, tokens, window, both)))
    timings = comparison.time_interleaved(rounds=9)
    names = ["sinkattn", *names]
    figures = {f"{name} us": comparison.median_step(timings, name) for name in names}
    bench.add_row("Forward and backward of a chunk on a full window, one layer, bf16", comparison.shape, figures)
    ratio = timings.ratio("sinkattn triton", "sinkattn")
    if not math.isnan(ratio):
        title = "backward: sinkattn triton / sinkattn at most 1.00 (then make it the default)"
        bench.add_target(title, comparison.shape, ratio, ratio <= 1)
    best = min(timings.ratio(name, "flex") for name in names[:2] if name in timings.seconds)
    if not math.isnan(best):
        bench.add_target("backward: the faster one / flex at most 1.00", comparison.shape, best, best <= 1)
    comparison.assert_outputs_match()


def flex(device: torch.device, tokens: int, window: int, both: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    if device.type == "cpu":
        raise NotImplementedError("FlexAttention has no backward on a CPU")
    first, keys = NUM_SINKS + window, NUM_SINKS + window + tokens

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = first + query - key
        return (age >= 0) & ((key < NUM_SINKS) | (age < window))

    mask = create_block_mask(visible, None, None, tokens, keys, device=str(device))
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: attend(query, *both(key, value), block_mask=mask, scale=SCALE, enable_gqa=True)
