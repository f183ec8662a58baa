"""Attention of one layer on a full window, compared with what it replaces and with the memory bandwidth.

    python -m pytest bench/bench_attention.py --benchmark-json=attention.json

Decode: one step rotates, appends one token per stream and attends over sinks and window. 8 bits: the same over rings of
int8 and fp8, beside bf16. Several tokens: the same for four tokens at once, as speculation has it, beside one. Chunk:
the same for 512 tokens at once. Rotary tables are not timed in any method, since a model computes them once for many
layers. Each method cycles through the caches of several layers, so that none of them stays in the processor's cache.

* ``sdpa``: only PyTorch's attention, over contiguous keys that are rotated already, with nothing appended.
* ``sdpa grouped`` (decode): the same, with the query heads of a group passed as if they were tokens, so that PyTorch
  reads each KV head once, not once per query head.
* ``dynamic-cache``: rotation, transformers' DynamicCache kept at this length, and PyTorch's attention.
* ``streaming-llm`` (decode, one stream): the method of the StreamingLLM paper's code, written from the paper's
  description: keys are cached unrotated, eviction concatenates slices, all keys are rotated again for every token, keys
  and values are repeated for each query head. Its chunks are not comparable: they see the whole cache, then evict.

The bandwidth ceiling is the fastest of several plain reads, in the same rounds, of the same amount of memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

import sinkattn
from sinkattn import ops
from sinkattn.ring_cache import CacheDtype

HEADS, KV_HEADS, HEAD_DIM, NUM_SINKS = 32, 8, 128, 4
SCALE = 1 / math.sqrt(HEAD_DIM)
ROPE = sinkattn.Rope(1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
NO_ROTATION = sinkattn.Rope(torch.zeros(HEAD_DIM // 2))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A missing key changes outputs by 0.01 or more: fp32 shows it for sure, 16-bit dtypes within their rounding.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-2, "fp16": 2e-3}

# Plain reads of memory: dtype and function. Which one is fastest depends on the machine.
READS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "dot of fp32": (torch.float32, lambda x: x.dot(x)),
    "sum of fp32": (torch.float32, torch.sum),
    "sum of int64": (torch.int64, torch.sum),
    "max of uint8": (torch.uint8, torch.amax),
}


@dataclass
class Inputs:
    """Inputs of every method, not rotated yet.

    past: keys, values ``[batch, KV_HEADS, tokens, HEAD_DIM]``. new: query ``[batch, HEADS, tokens, HEAD_DIM]``, key
    and value. mask: bool ``[new tokens, past and new tokens]``; None if all are visible. headroom: of the ring.
    """

    window: int
    past: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor, Tensor]
    mask: Tensor | None = None
    rope: sinkattn.Rope = ROPE
    headroom: int = 0

    def tables(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, HEAD_DIM]`` as transformers has them, in the dtype of the cache."""
        cos, sin = self.rope.tables(torch.arange(first, first + tokens))
        return tuple(torch.cat((x, x), dim=-1).to(self.past[0].dtype) for x in (cos, sin))

    def new_tables(self) -> tuple[Tensor, Tensor]:
        """The same for the new tokens."""
        return self.tables(self.past[0].shape[2], self.new[0].shape[2])

    def rotated_keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of past and new tokens, as a copy."""
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.past, self.new[1:], strict=True))
        return rotate(keys, self.tables(0, keys.shape[2])), values


def random_inputs(batch: int, window: int, past: int, new: int, dtype: str, heads: int = HEADS) -> Inputs:
    torch.manual_seed(0)
    shapes = [(KV_HEADS, past), (KV_HEADS, past), (heads, new), (KV_HEADS, new), (KV_HEADS, new)]
    tensors = [torch.randn(batch, *shape, HEAD_DIM).to(DTYPES[dtype]) for shape in shapes]
    return Inputs(window, tuple(tensors[:2]), tuple(tensors[2:]))


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    return x * cos + rotate_half(x) * sin


class Method:
    """A method of attention. `next_step` prepares the next layer, untimed, and returns the step that is timed."""

    def __init__(self, inputs: Inputs, layers: int) -> None:
        self.inputs = inputs
        self.layers = itertools.cycle([self.make_layer() for _ in range(layers)])


class Sinkattn(Method):
    backend: ops.Backend = "auto"
    cache_dtype: CacheDtype | None = None

    def make_layer(self) -> sinkattn.RingKVCache:
        keys, values = self.inputs.past
        layout = (NUM_SINKS, self.inputs.window, self.inputs.headroom)
        dtypes = {"dtype": keys.dtype, "cache_dtype": self.cache_dtype}
        ring = sinkattn.RingKVCache(len(keys), KV_HEADS, HEAD_DIM, *layout, **dtypes)
        ring.append(keys, values, rope=self.inputs.rope)
        return ring

    def next_step(self) -> Callable[[], Tensor]:
        ring, tokens = next(self.layers), self.inputs.new[0].shape[2]
        layout = {"num_sinks": NUM_SINKS, "window": self.inputs.window}
        tables = self.inputs.rope.stream_tables(ring.seen, tokens, **layout)
        options = {**layout, "scale": SCALE, "backend": self.backend, **ring.eight_bit}

        def step() -> Tensor:
            out = ops.sink_attention_(ring.keys, ring.values, *self.inputs.new, ring.seen, *tables, **options)
            ring.advance(tokens)
            return out

        return step


class Reference(Sinkattn):
    backend = "reference"


class Int8(Sinkattn):
    cache_dtype = "int8"


class Fp8(Sinkattn):
    cache_dtype = "fp8"


class Sdpa(Method):
    def make_layer(self) -> tuple[Tensor, Tensor]:
        return self.inputs.rotated_keys_and_values()

    def next_step(self) -> Callable[[], Tensor]:
        query, layer = rotate(self.inputs.new[0], self.inputs.new_tables()), next(self.layers)
        options = {"attn_mask": self.inputs.mask, "scale": SCALE, "enable_gqa": True}
        return lambda: F.scaled_dot_product_attention(query, *layer, **options)


class SdpaGrouped(Sdpa):
    def next_step(self) -> Callable[[], Tensor]:
        query, layer = rotate(self.inputs.new[0], self.inputs.new_tables()), next(self.layers)
        groups = (len(query), KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        return lambda: F.scaled_dot_product_attention(query.view(groups), *layer, scale=SCALE).reshape(query.shape)


class ConstantLengthDynamicCache(Method):
    def make_layer(self) -> DynamicCache:
        cache = DynamicCache()
        cache.update(*self.inputs.rotated_keys_and_values(), layer_idx=0)
        return cache

    def next_step(self) -> Callable[[], Tensor]:
        cache, tables, (query, key, value) = next(self.layers), self.inputs.new_tables(), self.inputs.new
        options = {"attn_mask": self.inputs.mask, "scale": SCALE, "enable_gqa": True}
        cache.crop(-key.shape[2])  # the tokens of the previous step, so that the length is constant

        def step() -> Tensor:
            layer = cache.update(rotate(key, tables), value, layer_idx=0)
            return F.scaled_dot_product_attention(rotate(query, tables), *layer, **options)

        return step


class StreamingLLM(Method):
    def __init__(self, inputs: Inputs, layers: int) -> None:
        super().__init__(inputs, layers)
        self.tables = inputs.tables(0, NUM_SINKS + inputs.window)
        self.last_tables = inputs.tables(NUM_SINKS + inputs.window - 1, 1)

    def make_layer(self) -> list[Tensor]:
        return [x.clone() for x in self.inputs.past]

    def next_step(self) -> Callable[[], Tensor]:
        layer, (query, *new) = next(self.layers), self.inputs.new

        def step() -> Tensor:
            for i, x in enumerate(new):
                sinks, recent = layer[i][:, :, :NUM_SINKS], layer[i][:, :, NUM_SINKS:]
                layer[i] = torch.cat((sinks, recent[:, :, 1 - self.inputs.window :], x), dim=2)
            keys, values = (repeat_kv(x, HEADS // KV_HEADS) for x in (rotate(layer[0], self.tables), layer[1]))
            scores = rotate(query, self.last_tables) @ keys.transpose(2, 3) * SCALE
            return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values

        return step


def next_read(layers: Iterator[Tensor], kind: str) -> Callable[[], Tensor]:
    dtype, read = READS[kind]
    return partial(read, next(layers).view(dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [1024, 4096], ids="W{}".format)
@pytest.mark.parametrize("batch", [1, 8], ids="B{}".format)
def test_decode(bench, batch: int, window: int, dtype: str) -> None:
    inputs = random_inputs(batch, window, past=NUM_SINKS + window - 1, new=1, dtype=dtype)
    baselines = {"sdpa": Sdpa, "sdpa grouped": SdpaGrouped, "dynamic-cache": ConstantLengthDynamicCache}
    if batch == 1:  # with eight streams a step takes seconds
        baselines["streaming-llm"] = StreamingLLM
        check_outputs_while_evicting(inputs, TOLERANCE[dtype])
    check_outputs(inputs, baselines, TOLERANCE[dtype])

    read_bytes = 2 * batch * KV_HEADS * (NUM_SINKS + window) * HEAD_DIM * DTYPES[dtype].itemsize
    layers = max(4, 2**27 // read_bytes)
    methods = {name: method(inputs, layers).next_step for name, method in {"sinkattn": Sinkattn, **baselines}.items()}
    # All reads share one cycle of layers: two reads of a layer in a row would hit the processor's cache.
    memory = itertools.cycle([torch.stack(inputs.rotated_keys_and_values()).flatten() for _ in range(layers)])
    methods |= {kind: partial(next_read, memory, kind) for kind in READS}
    timings = bench.time_interleaved(methods, rounds=40)
    read = min(READS, key=timings.ms)

    shape = f"B={batch} W={window} {dtype}"
    over_sdpa = timings.ratio("sinkattn", "sdpa")
    percent = 100 * timings.ratio(read, "sinkattn")
    figures = {
        **timings.figures("sinkattn", "sdpa", "sdpa grouped", "dynamic-cache", "streaming-llm"),
        "MB read": read_bytes / 1e6,
        "GB/s": read_bytes / timings.ms("sinkattn") / 1e6,
        "ceiling GB/s": read_bytes / timings.ms(read) / 1e6,
        "% of ceiling": percent,
        "sinkattn / sdpa": over_sdpa,
        "sinkattn / sdpa grouped": timings.ratio("sinkattn", "sdpa grouped"),
        "sinkattn / dynamic-cache": timings.ratio("sinkattn", "dynamic-cache"),
        "streaming-llm / sinkattn": timings.ratio("streaming-llm", "sinkattn"),
    }
    bench.add_row("Decode: one token per stream, one layer", shape, figures)
    bench.add_target("decode: sinkattn / sdpa at most 1.00", shape, over_sdpa, over_sdpa <= 1)
    if window == 4096:
        min_percent = {"fp32": 85, "bf16": 75}[dtype]
        target = f"decode, W=4096 {dtype}: at least {min_percent}% of the ceiling"
        bench.add_target(target, shape, percent, percent >= min_percent)
    if batch == 1:
        speedup = figures["streaming-llm / sinkattn"]
        bench.add_target("decode: streaming-llm / sinkattn at least 10", shape, speedup, speedup >= 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4], ids="G{}".format)
def test_several_tokens(bench, group: int, dtype: str) -> None:
    """All tokens of a call use keys and values while they are in the processor's cache: the ring is read once."""
    window, heads = 4096, group * KV_HEADS
    one, four = (random_inputs(1, window, NUM_SINKS + window, new, dtype, heads) for new in (1, 4))
    one.headroom = four.headroom = 3  # a call of so many tokens and one is not a chunk
    check_outputs(four, {"reference": Reference}, TOLERANCE[dtype])

    read_bytes = 2 * KV_HEADS * (NUM_SINKS + window) * HEAD_DIM * DTYPES[dtype].itemsize
    layers = max(4, 2**29 // read_bytes)
    methods = {"4 tokens": Sinkattn(four, layers).next_step, "1 token": Sinkattn(one, layers).next_step}
    timings = bench.time_interleaved(methods, rounds=40)
    over_one = timings.ratio("4 tokens", "1 token")
    shape = f"B=1 W={window} {group} query heads per KV head {dtype}"
    figures = {
        **timings.figures(*methods),
        "GB/s 1 token": read_bytes / timings.ms("1 token") / 1e6,
        "4 tokens / 1 token": over_one,
    }
    bench.add_row("Decode: several tokens of a stream at once, one layer", shape, figures)
    bench.add_target("decode: 4 tokens / 1 token at most 1.30", shape, over_one, over_one <= 1.3)


@pytest.mark.parametrize("group", [1, 4], ids="G{}".format)
@pytest.mark.parametrize("batch", [1, 8], ids="B{}".format)
def test_eight_bit(bench, batch: int, group: int) -> None:
    """A ring of 8 bits, of half of the memory, beside bfloat16."""
    window = 4096
    inputs = random_inputs(batch, window, NUM_SINKS + window, new=1, dtype="bf16", heads=group * KV_HEADS)
    check_outputs(inputs, {"int8": Int8, "fp8": Fp8}, 0.03)
    read_bytes = 4 * batch * KV_HEADS * (NUM_SINKS + window) * HEAD_DIM
    layers = max(2, 2**29 // read_bytes)
    methods = {"bf16": Sinkattn, "int8": Int8, "fp8": Fp8}
    timings = bench.time_interleaved(
        {name: method(inputs, layers).next_step for name, method in methods.items()}, rounds=40
    )
    shape = f"B={batch} W={window} {group} query heads per KV head"
    ratio = timings.ratio("int8", "bf16")
    figures = {**timings.figures(*methods), "int8 / bf16": ratio, "fp8 / bf16": timings.ratio("fp8", "bf16")}
    bench.add_row("Decode: a ring of 8 bits, one layer", shape, figures)
    most = {1: 0.7, 8: 0.65}[batch]
    bench.add_target(f"decode, B={batch}: int8 / bf16 at most {most:.2f}", shape, ratio, ratio <= most)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk(bench, dtype: str) -> None:
    window, tokens = 1020, 512
    inputs = random_inputs(1, window, past=NUM_SINKS + window, new=tokens, dtype=dtype)
    # Query i sees the sinks and, counted from the start of the old window, the tokens i + 1 to i + window.
    band = torch.ones(tokens, window + tokens, dtype=torch.bool).tril(window).triu(1)
    inputs.mask = torch.cat((torch.ones(tokens, NUM_SINKS, dtype=torch.bool), band), dim=1)
    baselines = {"sdpa": Sdpa, "dynamic-cache": ConstantLengthDynamicCache}
    # After a full window a query sees a sink at the same distance, whatever its own position. Baselines cannot do this
    # with keys that are rotated once. So they are compared without rotation, and the reference with it.
    check_outputs(replace(inputs, rope=NO_ROTATION), baselines, TOLERANCE[dtype])
    check_outputs(inputs, {"reference": Reference}, TOLERANCE[dtype])

    methods = {"sinkattn": Sinkattn, **baselines}
    timings = bench.time_interleaved(
        {name: method(inputs, layers=8).next_step for name, method in methods.items()}, rounds=10
    )
    flops = 4 * HEADS * HEAD_DIM * int(inputs.mask.sum())
    over_sdpa = timings.ratio("sinkattn", "sdpa")
    figures = {
        **timings.figures(*methods),
        **{f"{name} TFLOP/s": flops / timings.ms(name) / 1e9 for name in methods},
        "sinkattn / sdpa": over_sdpa,
        "sinkattn / dynamic-cache": timings.ratio("sinkattn", "dynamic-cache"),
    }
    shape = f"B=1 W={window} T={tokens} {dtype}"
    bench.add_row("Chunk: 512 tokens at once, one layer; TFLOP/s over visible pairs", shape, figures)
    bench.add_target("chunk: sinkattn / sdpa at most 1.00", shape, over_sdpa, over_sdpa <= 1)


def check_outputs(inputs: Inputs, baselines: dict[str, type[Method]], tolerance: float) -> None:
    """Check that the first step of each baseline gives what sinkattn gives."""
    ours = Sinkattn(inputs, 1).next_step()()
    for name, method in baselines.items():
        assert_close(
            method(inputs, 1).next_step()(), ours, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_outputs_while_evicting(inputs: Inputs, tolerance: float) -> None:
    """Check steps that evict, with the baseline that evicts too."""
    ours, baseline = Sinkattn(inputs, 1), StreamingLLM(inputs, 1)
    for _ in range(3):
        assert_close(baseline.next_step()(), ours.next_step()(), atol=tolerance, rtol=0)
