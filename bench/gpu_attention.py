"""Attention of one layer on a GPU, on a full window, compared with what it replaces and with plain reads of memory.

    make bench-gpu

Decode: one step rotates, appends one token per stream and attends over sinks and window. Chunk: the same for thousands
of tokens at once. Append: only rotates and appends. A CUDA graph runs one step on each of several layers' caches, eight
times as large together as the L2 cache; the graph is replayed many times, and the time is divided by the number of
steps. Rotary tables and token counts are not timed in any method, since a model computes them once for many layers; so
each replay writes the same token to the same slot again.

The methods are in gpu_attention_methods.py. A plain read is the sum of 1 GiB, a copy reads and writes 1 GiB, both by
kernels and in the same rounds. GB are 10^9 bytes.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, KV_HEADS, NUM_SINKS, SCALE
from gpu import Comparison, add_copy, add_read, relative_error
from gpu_attention_methods import (
    BASELINES,
    DTYPE,
    EIGHT_BIT,
    LLAMA,
    Append,
    Heads,
    Inputs,
    Method,
    SdpaMasked,
    Sinkattn,
    SinkattnSplit,
    num_layers_beyond_l2,
    random_inputs,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sinkattn
from sinkattn.rope import rotate

DECODE = [(batch, window, LLAMA) for window in (4096, 1024, 16384) for batch in (1, 8, 64)]
DECODE += [(1, 4096, heads) for heads in (Heads(kv=32), Heads(dim=64), Heads(query=8, kv=4, dim=256))]
TINY_DECODE = [(1, 16, LLAMA), (2, 40, Heads(8, 8, 64))]
APPENDS = [(64, 1, 1024), (1, 4096, 4096)]
CHUNKS = [(4096, 4096), (4096, 1024), (512, 4096), (64, 4096)]
MAX_SPLIT_TOKENS = 64
# RMS error relative to the output: bfloat16 rounds to 0.2 %, several times. Without a sink or the new token the error
# is more than 10 %, because their values are scaled up.
MAX_ERROR = 2e-2
# Rounding to fp8 alone: 2.6 %.
MAX_EIGHT_BIT_ERROR = 5e-2
# With one stream and up to this window, and with this many streams.
EIGHT_BIT_WINDOW, EIGHT_BIT_BATCH = 4096, 64


def pytest_generate_tests(metafunc) -> None:
    tiny = metafunc.config.getoption("rehearse")
    shapes = {
        "test_decode": ("batch, window, heads", TINY_DECODE if tiny else DECODE, "B{}-W{}-{}"),
        "test_append": ("batch, tokens, window", [(2, 1, 16), (1, 24, 24)] if tiny else APPENDS, "B{}-T{}-W{}"),
        "test_chunk": ("tokens, window", [(24, 24)] if tiny else CHUNKS, "T{}-W{}"),
    }
    if metafunc.function.__name__ in shapes:
        names, values, form = shapes[metafunc.function.__name__]
        metafunc.parametrize(names, values, ids=[form.format(*x) for x in values])


def add_baseline(
    comparison: Comparison,
    name: str,
    method: type[Method],
    inputs: Inputs,
    expected: Tensor,
    max_error: float = MAX_ERROR,
) -> None:
    """Add a baseline if its first step gives the expected output."""
    baseline = method(inputs)
    if comparison.check_output(name, relative_error(baseline.first_output(), expected), max_error):
        comparison.add(name, baseline.run_all_layers, inputs.num_layers, capture=baseline.capture)


def make_rope(device: torch.device, dim: int = HEAD_DIM) -> sinkattn.Rope:
    return sinkattn.Rope(5e5 ** -(torch.arange(0, dim, 2, device=device) / dim))


def test_decode(bench, device, batch: int, window: int, heads: Heads) -> None:
    decides = heads == LLAMA and window <= EIGHT_BIT_WINDOW and batch in (1, EIGHT_BIT_BATCH)
    eight_bit = EIGHT_BIT if decides or device.type == "cpu" else {}
    run_decode(bench, device, batch, window, BASELINES, rounds=25, heads=heads, eight_bit=eight_bit)


def run_decode(
    bench,
    device,
    batch: int,
    window: int,
    baselines: dict[str, type[Method]],
    rounds: int,
    heads: Heads = LLAMA,
    eight_bit: dict[str, type[Method]] | None = None,
) -> None:
    rope = make_rope(device, heads.dim)
    read_bytes = 2 * batch * heads.kv * (NUM_SINKS + window) * heads.dim * DTYPE.itemsize
    shape = f"B={batch} W={window}"
    if heads != LLAMA:
        shape += f" {heads}"
    comparison = Comparison(bench, device, shape)
    try:
        inputs = random_inputs(device, batch, window, past=NUM_SINKS + window - 1, new=1, rope=rope, heads=heads)
        inputs.num_layers = num_layers_beyond_l2(device, read_bytes)
        ours = Sinkattn(inputs)
        expected = ours.first_output()
    except torch.OutOfMemoryError:
        bench.add_remark(f"decode, {shape}: does not fit the memory")
        pytest.skip("does not fit the memory")
    comparison.add("sinkattn", ours.run_all_layers, inputs.num_layers)
    for name, method in baselines.items():
        comparison.try_add(name, partial(add_baseline, comparison, name, method, inputs, expected))
    eight_bit = eight_bit or {}
    for name, method in eight_bit.items():
        add = partial(add_baseline, comparison, name, method, inputs, expected, MAX_EIGHT_BIT_ERROR)
        comparison.try_add(name, add)
    plain_bytes = add_read(comparison)
    timings = comparison.time_interleaved(rounds)

    us = comparison.median_step(timings, "sinkattn")
    percent = 100 * timings.ratio("read", "sinkattn") * read_bytes / plain_bytes
    figures = {
        "sinkattn us": us,
        "MB": read_bytes / 1e6,
        "layers": inputs.num_layers,
        "GB/s": read_bytes / us / 1e3,
        "read GB/s": plain_bytes / comparison.median_step(timings, "read") / 1e3,
        "% of read": percent,
        **{f"{name} us": comparison.median_step(timings, name) for name in (*eight_bit, *baselines)},
    }
    title = ", ".join(("Decode: one token per stream, one layer, bf16", *title_suffix(baselines)))
    bench.add_row(title, shape, figures)
    ratios = {name: timings.ratio("sinkattn", name) for name in baselines}
    bench.add_row(
        f"{title}: time of sinkattn / time of", shape, {f"sinkattn / {name}": x for name, x in ratios.items()}
    )
    for name, ratio in ratios.items():
        if not math.isnan(ratio):
            bench.add_target(f"decode: sinkattn / {name} at most 1.00", shape, ratio, ratio <= 1)
    for name in eight_bit:
        ratio = timings.ratio(name, "sinkattn")
        # Half the bytes, and more work for each: a stream alone waits for memory, not for its bandwidth.
        aim = 0.75 if batch == EIGHT_BIT_BATCH else 1.0
        if not math.isnan(ratio):
            bench.add_target(f"decode: {name} / sinkattn at most {aim:.2f}", shape, ratio, ratio <= aim)
    if batch >= 8 and window >= 4096:
        bench.add_target("decode, B >= 8, W >= 4096: at least 85% of a plain read", shape, percent, percent >= 85)
    if (batch, window, heads) == (1, 4096, LLAMA):
        bench.add_target("decode, B=1 W=4096: at most 12 us", shape, us, us <= 12)
    comparison.assert_outputs_match()


def title_suffix(baselines: dict[str, type[Method]]) -> list[str]:
    return [] if baselines is BASELINES else [f"with {' and '.join(baselines)}"]


def chunk_mask(device: torch.device, tokens: int, window: int) -> Tensor:
    # Query i sees the sinks and, counted from the start of the old window, the tokens i + 1 to i + window.
    band = torch.ones(tokens, window + tokens, dtype=torch.bool, device=device).tril(window).triu(1)
    return torch.cat((torch.ones(tokens, NUM_SINKS, dtype=torch.bool, device=device), band), dim=1)


def random_chunk_inputs(device: torch.device, tokens: int, window: int) -> Inputs:
    # After a full window a query sees a sink at the same distance, whatever its own position. Baselines cannot do this
    # with keys that are rotated once. So all methods get zero angles; sinkattn still computes the rotation.
    rope = sinkattn.Rope(torch.zeros(HEAD_DIM // 2, device=device))
    inputs = random_inputs(device, 1, window, past=NUM_SINKS + window, new=tokens, rope=rope)
    inputs.mask = chunk_mask(device, tokens, window)
    inputs.num_layers = 2
    return inputs


def test_chunk(bench, device, tokens: int, window: int) -> None:
    inputs = random_chunk_inputs(device, tokens, window)
    shape = f"B=1 W={window} T={tokens}"
    pairs = dict.fromkeys(("sinkattn", "sdpa mask"), tokens * (NUM_SINKS + window))

    comparison = Comparison(bench, device, shape)
    ours = Sinkattn(inputs)
    expected = ours.first_output()
    comparison.add("sinkattn", ours.run_all_layers, inputs.num_layers)
    if tokens <= MAX_SPLIT_TOKENS:
        pairs["sinkattn split"] = pairs["sinkattn"]
        add_baseline(comparison, "sinkattn split", SinkattnSplit, inputs, expected)
    comparison.try_add("sdpa mask", partial(add_baseline, comparison, "sdpa mask", SdpaMasked, inputs, expected))
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        if device.type == "cpu" and name == "cudnn":
            continue
        queries = math.isqrt(2 * pairs["sinkattn"])
        shapes = {"causal": (queries, queries, queries * (queries + 1) // 2)}
        shapes["full"] = (tokens, NUM_SINKS + window, pairs["sinkattn"])
        for kind, (new, keys, pairs[f"{name} {kind}"]) in shapes.items():
            launch = partial(unmasked, device, backend, new, keys, kind == "causal")
            comparison.try_add(
                f"{name} {kind}", lambda name=f"{name} {kind}", launch=launch: comparison.add(name, launch())
            )
    timings = comparison.time_interleaved(rounds=15)

    teraflops = {name: 4e-12 * HEADS * HEAD_DIM * x / timings.ms(name) * 1e3 for name, x in pairs.items()}
    figures = {
        "visible pairs, millions": pairs["sinkattn"] / 1e6,
        **{f"{name} us": comparison.median_step(timings, name) for name in pairs},
        **{f"{name} TFLOP/s": x for name, x in teraflops.items()},
    }
    title = "Chunk: new tokens at once on a full window, one layer, bf16; TFLOP/s over each one's own visible pairs"
    bench.add_row(title, shape, figures)
    if tokens <= MAX_SPLIT_TOKENS:
        ratio = timings.ratio("sinkattn split", "sinkattn")
        bench.add_target(
            "chunk: sinkattn split / sinkattn at most 1.00 (then make it the default)", shape, ratio, ratio <= 1
        )
    for kind in ("causal", "full"):
        percent = 100 * timings.ratio(f"flash {kind}", "sinkattn") * pairs["sinkattn"] / pairs[f"flash {kind}"]
        if not math.isnan(percent):
            bench.add_target(f"chunk: at least 60% of the TFLOP/s of flash, {kind}", shape, percent, percent >= 60)
    if not math.isnan(ratio := timings.ratio("sinkattn", "sdpa mask")):
        bench.add_target("chunk: sinkattn / sdpa mask at most 1.00", shape, ratio, ratio <= 1)
    comparison.assert_outputs_match()


def unmasked(device: torch.device, backend: SDPBackend, queries: int, keys: int, causal: bool) -> Callable[[], Tensor]:
    """Attention of another shape with as many visible pairs, causal or without a mask."""
    shapes = [(HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)]
    tensors = [torch.randn(1, *shape, HEAD_DIM, dtype=DTYPE, device=device) for shape in shapes]

    def launch() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, is_causal=causal, scale=SCALE, enable_gqa=True)

    return launch


def test_append(bench, device, batch: int, tokens: int, window: int) -> None:
    rope = make_rope(device)
    inputs = random_inputs(device, batch, window, past=NUM_SINKS + window, new=tokens, rope=rope)
    moved_bytes = 2 * sum(x.nbytes for x in inputs.new[1:])
    inputs.num_layers = min(64, num_layers_beyond_l2(device, moved_bytes))
    shape = f"B={batch} T={tokens} W={window}"
    comparison = Comparison(bench, device, shape)
    append = Append(inputs)
    append.first_output()
    ring, _ = append.layers[0]
    comparison.check_output("keys in the ring", relative_error(*last_keys(inputs, ring)), MAX_ERROR)
    comparison.add("sinkattn", append.run_all_layers, inputs.num_layers)
    copy_bytes = add_copy(comparison)
    timings = comparison.time_interleaved(rounds=15)
    us = comparison.median_step(timings, "sinkattn")
    figures = {
        "us": us,
        "MB": moved_bytes / 1e6,
        "layers": inputs.num_layers,
        "GB/s": moved_bytes / us / 1e3,
        "copy GB/s": copy_bytes / comparison.median_step(timings, "copy") / 1e3,
        "% of copy": 100 * timings.ratio("copy", "sinkattn") * moved_bytes / copy_bytes,
    }
    bench.add_row("Append alone: keys and values read and written; rotary tables are not counted", shape, figures)
    comparison.assert_outputs_match()


def last_keys(inputs: Inputs, ring: sinkattn.RingKVCache) -> tuple[Tensor, Tensor]:
    """Key of the last new token: in the ring, and expected."""
    past, tokens = inputs.past[0].shape[2], inputs.new[0].shape[2]
    slot = NUM_SINKS + (past + tokens - 1 - NUM_SINKS) % inputs.window
    expected = rotate(inputs.new[1][:, :, -1:], *inputs.tables(past + tokens - 1, 1), interleaved=False)
    return ring.keys[:, :, slot : slot + 1], expected
