"""Attention of one layer on a GPU, on a full window: against what it replaces, and against a copy of memory.

    make bench-gpu

Decode: one step rotates, appends one token per stream and attends over sinks and window. Chunk: the same for thousands
of tokens at once. Append: rotates and appends alone. A CUDA graph runs one step on each of so many layers' caches that
they are eight times what the L2 cache holds; a turn replays it over and over, and what is given is its time divided by
the steps. Rotary tables are made and tokens counted outside of the time on every side, since a model does that once
for all of its layers; so each replay writes the same token to the same slot again.

* ``sdpa flash``, ``sdpa cudnn``: that backend of PyTorch's attention alone, over keys that lie contiguous and rotated
  already, with nothing appended.
* ``sdpa grouped`` (decode): the same, with the query heads that share a key head passed as if they were tokens.
* ``dynamic-cache``: rotation, the DynamicCache of transformers held at this length, and PyTorch's attention.
* ``static-cache``: rotation, the layer of transformers' StaticCache, exactly as long as it must be, and PyTorch's
  attention, without the mask that transformers would pass.
* ``static-sliding``: the same of the layer for sliding windows, which moves all of its tokens in every step. It keeps
  no sinks.
* ``streaming-llm``: as in bench_attention.py; keeps keys unrotated, concatenates, rotates all anew.
* ``flash-attn``, ``flashinfer``: those packages, where they are installed. flash-attn rotates and appends as well,
  FlashInfer attends alone.

A copy reads and writes 1 GiB, in the same rounds. Weights, caches and copies are counted in bytes of 10^9.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, KV_HEADS, NUM_SINKS, SCALE
from bench_attention import rotate as rotate_as_transformers
from gpu import Ways, add_copy, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.models.llama.modeling_llama import repeat_kv

import sinkattn
from sinkattn import ops
from sinkattn.rope import rotate

DTYPE = torch.bfloat16
FREQUENCIES = 5e5 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
DECODE = [(batch, window) for window in (4096, 1024, 16384) for batch in (1, 8, 64)]
APPENDS = [(64, 1, 1024), (1, 4096, 4096)]
CHUNKS = [(4096, 4096), (4096, 1024)]
LAYERS_OF_L2 = 8
# Of the output's root mean square: bfloat16 rounds to 0.2 %, several times. A sink or the new token missing makes more
# than 10 %, because their values are larger than all others.
MOST_ERROR = 2e-2
LOUD = 16
# What the streaming-llm scheme copies, in bytes of the cache, is some twenty times as much.
MOST_FOR_STREAMING_LLM = 2e8


def pytest_generate_tests(metafunc) -> None:
    tiny = metafunc.config.getoption("rehearse")
    shapes = {
        "test_decode": ("batch, window", [(1, 16), (2, 40)] if tiny else DECODE, "B{}-W{}"),
        "test_append": ("batch, tokens, window", [(2, 1, 16), (1, 24, 24)] if tiny else APPENDS, "B{}-T{}-W{}"),
        "test_chunk": ("tokens, window", [(24, 24)] if tiny else CHUNKS, "T{}-W{}"),
    }
    if metafunc.function.__name__ in shapes:
        names, values, form = shapes[metafunc.function.__name__]
        metafunc.parametrize(names, values, ids=[form.format(*x) for x in values])


@dataclass
class Work:
    """What every way is given; nothing is rotated yet.

    past: keys, values ``[batch, KV_HEADS, tokens, HEAD_DIM]``. new: query ``[batch, HEADS, tokens, HEAD_DIM]``, key and
    value. mask: bool ``[new tokens, past and new tokens]``; None when all are visible. layers: caches to go round.
    """

    window: int
    past: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor, Tensor]
    rope: sinkattn.Rope
    layers: int = 1
    mask: Tensor | None = None
    lying: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.new[0].device

    def tables(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, pairs]``."""
        return self.rope.tables(torch.arange(first, first + tokens, device=self.device))

    def new_tables(self) -> tuple[Tensor, Tensor]:
        """Those of the new tokens as transformers has them: ``[tokens, HEAD_DIM]``, in the dtype of the cache."""
        tables = self.tables(self.past[0].shape[2], self.new[0].shape[2])
        return tuple(torch.cat((x, x), dim=-1).to(DTYPE) for x in tables)

    def rotated_query(self) -> Tensor:
        return rotate(self.new[0], *self.tables(self.past[0].shape[2], self.new[0].shape[2]), interleaved=False)

    def rotated_past(self) -> Tensor:
        return rotate(self.past[0], *self.tables(0, self.past[0].shape[2]), interleaved=False)

    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys, and values, of past and new tokens, for each layer; shared by ways that leave them alone."""
        if not self.lying:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.past, self.new[1:], strict=True))
            first = rotate(keys, *self.tables(0, keys.shape[2]), interleaved=False), values
            self.lying = [first, *(tuple(x.clone() for x in first) for _ in range(self.layers - 1))]
        return self.lying


def draw(device: torch.device, batch: int, window: int, past: int, new: int, rope: sinkattn.Rope) -> Work:
    torch.manual_seed(0)
    shapes = [(KV_HEADS, past), (KV_HEADS, past), (HEADS, new), (KV_HEADS, new), (KV_HEADS, new)]
    tensors = [torch.randn(batch, *shape, HEAD_DIM, dtype=DTYPE, device=device) for shape in shapes]
    tensors[1][:, :, :NUM_SINKS] *= LOUD
    tensors[4] *= LOUD
    return Work(window, tuple(tensors[:2]), tuple(tensors[2:]), rope)


def layers_for(device: torch.device, layer_bytes: int) -> int:
    """Layers that the L2 cache cannot hold by far."""
    if device.type == "cpu":
        return 2
    return max(1, math.ceil(LAYERS_OF_L2 * torch.cuda.get_device_properties(device).L2_cache_size / layer_bytes))


class Way:
    """One way to do the work. A step leaves its layer as it found it, or with the same token in the same slot."""

    capture = True

    def __init__(self, work: Work) -> None:
        self.work = work
        self.prepare()
        self.layers = [self.layer(i) for i in range(work.layers)]

    def prepare(self) -> None:
        """What all layers share."""

    def layer(self, i: int) -> Any:
        raise NotImplementedError

    def step(self, layer: Any) -> Tensor:
        """Attention of the new tokens ``[batch, HEADS, tokens, HEAD_DIM]``."""
        raise NotImplementedError

    def first(self) -> Tensor:
        """Output of a step on the first layer."""
        return self.step(self.layers[0])

    def all_layers(self) -> None:
        for layer in self.layers:
            self.step(layer)


class Sinkattn(Way):
    def layer(self, i: int) -> sinkattn.RingKVCache:
        (keys, values), window = self.work.past, self.work.window
        ring = sinkattn.RingKVCache(
            len(keys), KV_HEADS, HEAD_DIM, NUM_SINKS, window, dtype=keys.dtype, device=keys.device
        )
        ring.append(keys, values, rope=self.work.rope)
        if i == 0:
            tokens = self.work.new[0].shape[2]
            self.tables = self.work.rope.stream_tables(ring.seen, tokens, num_sinks=NUM_SINKS, window=window)
        return ring

    def step(self, ring: sinkattn.RingKVCache) -> Tensor:
        options = {"num_sinks": NUM_SINKS, "window": self.work.window, "scale": SCALE, "arrivals": ring.arrivals}
        return ops.sink_attention_(ring.keys, ring.values, *self.work.new, ring.seen, *self.tables, **options)


class Sdpa(Way):
    backend: SDPBackend

    def prepare(self) -> None:
        self.query = self.work.rotated_query()

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return self.work.contiguous()[i]

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(self.query, *layer, scale=SCALE, enable_gqa=True)


class SdpaFlash(Sdpa):
    backend = SDPBackend.FLASH_ATTENTION


class SdpaCudnn(Sdpa):
    backend = SDPBackend.CUDNN_ATTENTION


class SdpaGrouped(Sdpa):
    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        groups = (len(self.query), KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        return F.scaled_dot_product_attention(self.query.view(groups), *layer, scale=SCALE).reshape(self.query.shape)


class Transformers(Way):
    """Rotation, a cache of transformers, and PyTorch's attention."""

    def prepare(self) -> None:
        self.tables = self.work.new_tables()

    def attend(self, update: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        query, key, value = self.work.new
        layer = update(rotate_as_transformers(key, self.tables), value)
        query = rotate_as_transformers(query, self.tables)
        return F.scaled_dot_product_attention(query, *layer, scale=SCALE, enable_gqa=True)


class HeldDynamicCache(Transformers):
    def layer(self, i: int) -> Any:
        cache = DynamicCache()
        cache.update(self.work.rotated_past(), self.work.past[1], layer_idx=0)
        return cache.layers[0]

    def step(self, layer: Any) -> Tensor:
        before = layer.keys, layer.values
        out = self.attend(layer.update)
        layer.keys, layer.values = before
        return out


class StaticCache(Transformers):
    def prepare(self) -> None:
        super().prepare()
        self.past = self.work.past[0].shape[2]
        self.lengths = torch.full((self.work.layers,), self.past, device=self.work.device)

    def layer(self, i: int) -> StaticLayer:
        keys, values = self.work.contiguous()[i]
        layer = StaticLayer(keys.shape[2])
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        layer.keys, layer.values = keys, values
        layer.cumulative_length = self.lengths[i]
        return layer

    def step(self, layer: StaticLayer) -> Tensor:
        return self.attend(layer.update)

    def first(self) -> Tensor:
        self.lengths.fill_(self.past)
        return super().first()

    def all_layers(self) -> None:
        # Before and not after, so that no step that failed half way makes the next one write out of bounds.
        self.lengths.fill_(self.past)
        super().all_layers()


class StaticSliding(Transformers):
    # It makes an index of a Python list in every step, which waits for the device.
    capture = False

    def layer(self, i: int) -> StaticSlidingWindowLayer:
        past, values = self.work.rotated_past(), self.work.past[1]
        tokens = past.shape[2] + 1
        layer = StaticSlidingWindowLayer(max_cache_len=tokens, sliding_window=tokens)
        # Full, with a token before all others, which the first step moves out.
        layer.update(*(torch.cat((x[:, :, :1], x), dim=2) for x in (past, values)))
        return layer

    def step(self, layer: StaticSlidingWindowLayer) -> Tensor:
        return self.attend(layer.update)


class StreamingLLM(Way):
    def prepare(self) -> None:
        if sum(x.nbytes for x in self.work.past) > MOST_FOR_STREAMING_LLM:
            raise ValueError("not tried on caches as large as this")
        past = self.work.past[0].shape[2]
        tables = self.work.tables(0, past + 1)
        self.tables = tuple(torch.cat((x, x), dim=-1).to(DTYPE) for x in tables)
        self.last_tables = tuple(x[-1:] for x in self.tables)

    def layer(self, i: int) -> list[Tensor]:
        # Full, with a token between sinks and window that the step moves out.
        return [torch.cat((x[:, :, : NUM_SINKS + 1], x[:, :, NUM_SINKS:]), dim=2) for x in self.work.past]

    def step(self, layer: list[Tensor]) -> Tensor:
        query, *new = self.work.new
        pairs = zip(layer, new, strict=True)
        keys, values = (torch.cat((x[:, :, :NUM_SINKS], x[:, :, NUM_SINKS + 1 :], y), dim=2) for x, y in pairs)
        keys, values = (repeat_kv(x, HEADS // KV_HEADS) for x in (rotate_as_transformers(keys, self.tables), values))
        scores = rotate_as_transformers(query, self.last_tables) @ keys.transpose(2, 3) * SCALE
        return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values


class FlashAttn(Way):
    def prepare(self) -> None:
        from flash_attn import flash_attn_with_kvcache

        self.run = flash_attn_with_kvcache
        batch, _, self.past, _ = self.work.past[0].shape
        self.tables = tuple(x.to(DTYPE) for x in self.work.tables(0, self.past + 1))
        self.lengths = torch.full((batch,), self.past, dtype=torch.int32, device=self.work.device)
        self.new = [x.transpose(1, 2).contiguous() for x in self.work.new]

    def layer(self, i: int) -> list[Tensor]:
        return [x.transpose(1, 2).contiguous() for x in self.work.contiguous()[i]]

    def step(self, layer: list[Tensor]) -> Tensor:
        query, key, value = self.new
        cos, sin = self.tables
        options = {"rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": self.lengths, "rotary_interleaved": False}
        return self.run(query, *layer, key, value, softmax_scale=SCALE, causal=True, **options).transpose(1, 2)


class FlashInfer(Way):
    PAGE = 16

    def prepare(self) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self.query = self.work.rotated_query()[:, :, 0].contiguous()
        batch, _, past, _ = self.work.past[0].shape
        self.tokens = past + 1
        self.pages = -(-self.tokens // self.PAGE)
        space = torch.zeros(2**28, dtype=torch.uint8, device=self.work.device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
        counts = {"dtype": torch.int32, "device": self.work.device}
        self.wrapper.plan(
            torch.arange(0, (batch + 1) * self.pages, self.pages, **counts),
            torch.arange(batch * self.pages, **counts),
            torch.full((batch,), (self.tokens - 1) % self.PAGE + 1, **counts),
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            self.PAGE,
            q_data_type=DTYPE,
            kv_data_type=DTYPE,
            sm_scale=SCALE,
        )

    def layer(self, i: int) -> Tensor:
        # [batch * pages, keys and values, KV_HEADS, PAGE, HEAD_DIM]
        room = self.pages * self.PAGE - self.tokens
        both = torch.stack([F.pad(x, (0, 0, 0, room)) for x in self.work.contiguous()[i]])
        paged = both.unflatten(3, (self.pages, self.PAGE)).permute(1, 3, 0, 2, 4, 5)
        return paged.flatten(0, 1).contiguous()

    def step(self, layer: Tensor) -> Tensor:
        return self.wrapper.run(self.query, layer).unsqueeze(2)


PEERS: dict[str, type[Way]] = {
    "sdpa flash": SdpaFlash,
    "sdpa cudnn": SdpaCudnn,
    "sdpa grouped": SdpaGrouped,
    "dynamic-cache": HeldDynamicCache,
    "static-cache": StaticCache,
    "static-sliding": StaticSliding,
    "streaming-llm": StreamingLLM,
    "flash-attn": FlashAttn,
    "flashinfer": FlashInfer,
}


def add_peer(ways: Ways, name: str, way: type[Way], work: Work, ours: Tensor) -> None:
    """Add a peer whose first step gives what ours gave."""
    peer = way(work)
    if ways.check(name, relative_error(peer.first(), ours), MOST_ERROR):
        ways.add(name, peer.all_layers, work.layers, capture=peer.capture)


def test_decode(bench, device, batch: int, window: int) -> None:
    decode(bench, device, batch, window, PEERS, rounds=25)


def decode(bench, device, batch: int, window: int, peers: dict[str, type[Way]], rounds: int) -> None:
    rope = sinkattn.Rope(FREQUENCIES.to(device))
    read_bytes = 2 * batch * KV_HEADS * (NUM_SINKS + window) * HEAD_DIM * DTYPE.itemsize
    shape = f"B={batch} W={window}"
    ways = Ways(bench, device, shape)
    try:
        work = draw(device, batch, window, past=NUM_SINKS + window - 1, new=1, rope=rope)
        work.layers = layers_for(device, read_bytes)
        sink = Sinkattn(work)
        ours = sink.first()
    except torch.OutOfMemoryError:
        bench.remark(f"decode, {shape}: does not fit the memory")
        pytest.skip("does not fit the memory")
    ways.add("sinkattn", sink.all_layers, work.layers)
    for name, way in peers.items():
        ways.try_to(name, partial(add_peer, ways, name, way, work, ours))
    copy_bytes = add_copy(ways)
    turns = ways.in_turns(rounds)

    us = ways.time(turns, "sinkattn")
    percent = 100 * turns.ratio("copy", "sinkattn") * read_bytes / copy_bytes
    figures = {
        "sinkattn us": us,
        "MB": read_bytes / 1e6,
        "layers": work.layers,
        "GB/s": read_bytes / us / 1e3,
        "copy GB/s": copy_bytes / ways.time(turns, "copy") / 1e3,
        "% of copy": percent,
        **{f"{name} us": ways.time(turns, name) for name in peers},
    }
    title = ", ".join(("Decode: one token per stream, one layer, bf16", *compiled_only(peers)))
    bench.note(title, shape, figures)
    ratios = {name: turns.ratio("sinkattn", name) for name in peers}
    bench.note(f"{title}: time of sinkattn / time of", shape, {f"sinkattn / {name}": x for name, x in ratios.items()})
    for name, ratio in ratios.items():
        if not math.isnan(ratio):
            bench.target(f"decode: sinkattn / {name} at most 1.00", shape, ratio, ratio <= 1)
    if batch >= 8 and window >= 4096:
        bench.target("decode, B >= 8, W >= 4096: at least 85% of copy", shape, percent, percent >= 85)
    if (batch, window) == (1, 4096):
        bench.target("decode, B=1 W=4096: at most 12 us", shape, us, us <= 12)
    ways.done()


def compiled_only(peers: dict[str, type[Way]]) -> list[str]:
    return [] if peers is PEERS else [f"with {' and '.join(peers)}"]


class Masked(Way):
    """PyTorch's attention with the mask, of its own choice, over a key head for every query head."""

    def prepare(self) -> None:
        self.query = self.work.rotated_query()

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return tuple(repeat_kv(x, HEADS // KV_HEADS) for x in self.work.contiguous()[i])

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        return F.scaled_dot_product_attention(self.query, *layer, attn_mask=self.work.mask, scale=SCALE)


def chunk_mask(device: torch.device, tokens: int, window: int) -> Tensor:
    # Query i sees the sinks, and of window and new tokens those numbered i + 1 to i + window.
    band = torch.ones(tokens, window + tokens, dtype=torch.bool, device=device).tril(window).triu(1)
    return torch.cat((torch.ones(tokens, NUM_SINKS, dtype=torch.bool, device=device), band), dim=1)


def draw_chunk(device: torch.device, tokens: int, window: int) -> Work:
    # Beyond a full window a query sees sinks at one distance, whatever its position, which no other attention can have
    # of keys rotated once. So all ways are given angles of zero, which ours turns by as it does by any other.
    rope = sinkattn.Rope(torch.zeros(HEAD_DIM // 2, device=device))
    work = draw(device, 1, window, past=NUM_SINKS + window, new=tokens, rope=rope)
    work.mask = chunk_mask(device, tokens, window)
    work.layers = 2
    return work


def test_chunk(bench, device, tokens: int, window: int) -> None:
    work = draw_chunk(device, tokens, window)
    shape = f"B=1 W={window} T={tokens}"
    pairs = dict.fromkeys(("sinkattn", "sdpa mask"), tokens * (NUM_SINKS + window))

    ways = Ways(bench, device, shape)
    sink = Sinkattn(work)
    ours = sink.first()
    ways.add("sinkattn", sink.all_layers, work.layers)
    ways.try_to("sdpa mask", partial(add_peer, ways, "sdpa mask", Masked, work, ours))
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        if device.type == "cpu" and name == "cudnn":
            continue
        queries = math.isqrt(2 * pairs["sinkattn"])
        shapes = {"causal": (queries, queries, queries * (queries + 1) // 2)}
        shapes["full"] = (tokens, NUM_SINKS + window, pairs["sinkattn"])
        for kind, (new, keys, pairs[f"{name} {kind}"]) in shapes.items():
            launch = partial(unmasked, device, backend, new, keys, kind == "causal")
            ways.try_to(f"{name} {kind}", lambda name=f"{name} {kind}", launch=launch: ways.add(name, launch()))
    copy_bytes = add_copy(ways)
    turns = ways.in_turns(rounds=15)

    teraflops = {name: 4e-12 * HEADS * HEAD_DIM * x / turns.ms(name) * 1e3 for name, x in pairs.items()}
    figures = {
        "visible pairs, millions": pairs["sinkattn"] / 1e6,
        **{f"{name} us": ways.time(turns, name) for name in pairs},
        **{f"{name} TFLOP/s": x for name, x in teraflops.items()},
        "copy GB/s": copy_bytes / ways.time(turns, "copy") / 1e3,
    }
    title = "Chunk: new tokens at once on a full window, one layer, bf16; TFLOP/s over each one's own visible pairs"
    bench.note(title, shape, figures)
    for kind in ("causal", "full"):
        percent = 100 * turns.ratio(f"flash {kind}", "sinkattn") * pairs["sinkattn"] / pairs[f"flash {kind}"]
        if not math.isnan(percent):
            bench.target(f"chunk: at least 60% of the TFLOP/s of flash, {kind}", shape, percent, percent >= 60)
    if not math.isnan(ratio := turns.ratio("sinkattn", "sdpa mask")):
        bench.target("chunk: sinkattn / sdpa mask at most 1.00", shape, ratio, ratio <= 1)
    ways.done()


def unmasked(device: torch.device, backend: SDPBackend, queries: int, keys: int, causal: bool) -> Callable[[], Tensor]:
    """Attention of another shape with as many visible pairs and no mask to speak of."""
    shapes = [(HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)]
    tensors = [torch.randn(1, *shape, HEAD_DIM, dtype=DTYPE, device=device) for shape in shapes]

    def launch() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, is_causal=causal, scale=SCALE, enable_gqa=True)

    return launch


class Append(Sinkattn):
    def prepare(self) -> None:
        # Of its own for each layer, so that it comes from memory as the ring does.
        self.sources = [[x.clone() for x in self.work.new[1:]] for _ in range(self.work.layers)]

    def layer(self, i: int) -> tuple[sinkattn.RingKVCache, list[Tensor]]:
        return super().layer(i), self.sources[i]

    def step(self, layer: tuple[sinkattn.RingKVCache, list[Tensor]]) -> None:
        ring, new = layer
        cos, sin = (x[0] for x in self.tables)
        ops.append_(ring.keys, ring.values, *new, ring.seen, num_sinks=NUM_SINKS, cos=cos, sin=sin)


def test_append(bench, device, batch: int, tokens: int, window: int) -> None:
    rope = sinkattn.Rope(FREQUENCIES.to(device))
    work = draw(device, batch, window, past=NUM_SINKS + window, new=tokens, rope=rope)
    moved_bytes = 2 * sum(x.nbytes for x in work.new[1:])
    work.layers = min(64, layers_for(device, moved_bytes))
    shape = f"B={batch} T={tokens} W={window}"
    ways = Ways(bench, device, shape)
    append = Append(work)
    append.first()
    ring, _ = append.layers[0]
    ways.check("keys in the ring", relative_error(*last_keys(work, ring)), MOST_ERROR)
    ways.add("sinkattn", append.all_layers, work.layers)
    copy_bytes = add_copy(ways)
    turns = ways.in_turns(rounds=15)
    us = ways.time(turns, "sinkattn")
    figures = {
        "us": us,
        "MB": moved_bytes / 1e6,
        "layers": work.layers,
        "GB/s": moved_bytes / us / 1e3,
        "copy GB/s": copy_bytes / ways.time(turns, "copy") / 1e3,
        "% of copy": 100 * turns.ratio("copy", "sinkattn") * moved_bytes / copy_bytes,
    }
    bench.note("Append alone: keys and values read and written; rotary tables are not counted", shape, figures)
    ways.done()


def last_keys(work: Work, ring: sinkattn.RingKVCache) -> tuple[Tensor, Tensor]:
    """Key of the last new token: as it is in the ring, and as it should be."""
    past, tokens = work.past[0].shape[2], work.new[0].shape[2]
    slot = NUM_SINKS + (past + tokens - 1 - NUM_SINKS) % work.window
    expected = rotate(work.new[1][:, :, -1:], *work.tables(past + tokens - 1, 1), interleaved=False)
    return ring.keys[:, :, slot : slot + 1], expected
