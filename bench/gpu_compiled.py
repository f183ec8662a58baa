"""Peers on a GPU that torch.compile has to make first, which takes most of the time of this file.

    make bench-gpu

* ``flex``: FlexAttention with the mask of sinks and window, over keys that lie contiguous and rotated already, with
  nothing appended; decoding, and a chunk under the exact mask.
* ``static-cache compiled``: the model of gpu_model.py as it was, on the StaticCache of transformers, a step compiled in
  mode "reduce-overhead", which captures CUDA graphs. It attends, with a mask, over the whole length of its cache, which
  is 128 tokens longer than what sinkattn has in sight.
* ``sinkattn graph fused``: what gpu_model.py captures, with the model's MLP and norms compiled.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu import Ways, add_copy, relative_error
from gpu_attention import HEAD_DIM, HEADS, NUM_SINKS, SCALE, Sdpa, Sinkattn, add_peer, decode, draw_chunk
from gpu_model import MOST_ERROR, TINY_WINDOW, WINDOW, Stream, add_graph, bound_bytes, build, enabled_twin, random_ids
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import sinkattn

DECODE = [(1, 4096), (8, 4096)]
CHUNKS = [(4096, 4096)]
MORE = 128
COMPILING_STEPS = 4


def pytest_generate_tests(metafunc) -> None:
    tiny = metafunc.config.getoption("rehearse")
    if metafunc.function.__name__ == "test_flex_decode":
        shapes = [(2, 40)] if tiny else DECODE
        metafunc.parametrize("batch, window", shapes, ids=["B{}-W{}".format(*shape) for shape in shapes])
    if metafunc.function.__name__ == "test_flex_chunk":
        shapes = [(24, 24)] if tiny else CHUNKS
        metafunc.parametrize("tokens, window", shapes, ids=["T{}-W{}".format(*shape) for shape in shapes])


def compiled(function: Callable[..., Any], device: torch.device, **options) -> Callable[..., Any]:
    """As it is on the CPU, where only the code around it is tried."""
    return function if device.type == "cpu" else torch.compile(function, **options)


class Flex(Sdpa):
    def prepare(self) -> None:
        super().prepare()
        new, window = self.work.new[0].shape[2], self.work.window
        # Of past and new tokens, where the first query is the first new one.
        first, keys = self.work.past[0].shape[2], self.work.past[0].shape[2] + new

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            age = first + query - key
            return (age >= 0) & ((key < NUM_SINKS) | (age < window))

        self.mask = create_block_mask(visible, None, None, new, keys, device=str(self.work.device))
        self.attend = compiled(flex_attention, self.work.device, dynamic=False)

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(self.query, *layer, block_mask=self.mask, scale=SCALE, enable_gqa=True)


def test_flex_decode(bench, device, batch: int, window: int) -> None:
    decode(bench, device, batch, window, {"flex": Flex}, rounds=15)


def test_flex_chunk(bench, device, tokens: int, window: int) -> None:
    work = draw_chunk(device, tokens, window)
    ways = Ways(bench, device, f"B=1 W={window} T={tokens}")
    sink = Sinkattn(work)
    ours = sink.first()
    ways.add("sinkattn", sink.all_layers, work.layers)
    ways.try_to("flex", partial(add_peer, ways, "flex", Flex, work, ours))
    turns = ways.in_turns(rounds=15)
    flops = 4 * HEADS * HEAD_DIM * tokens * (NUM_SINKS + window)
    ratio = turns.ratio("sinkattn", "flex")
    figures = {
        **{f"{name} us": ways.time(turns, name) for name in ("sinkattn", "flex")},
        **{f"{name} TFLOP/s": flops / turns.ms(name) / 1e9 for name in ("sinkattn", "flex")},
        "sinkattn / flex": ratio,
    }
    bench.note("Chunk on a full window, one layer, bf16, with flex", ways.shape, figures)
    if not math.isnan(ratio):
        bench.target("chunk: sinkattn / flex at most 1.00", ways.shape, ratio, ratio <= 1)
    ways.done()


class CompiledStream(Stream):
    """Greedy generation on a StaticCache that is taken back to where it was before every turn."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.tokens = ids.shape[1]
        super().__init__(model, StaticCache(config=model.config, max_cache_len=self.tokens + MORE), ids)
        self.model = compiled(model, ids.device, mode="reduce-overhead", dynamic=False)
        self.steps = 0

    def step(self) -> None:
        if self.steps == MORE:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.tokens)
            self.steps = 0
        self.steps += 1
        torch.compiler.cudagraph_mark_step_begin()
        super().step()


def test_static_cache(bench, device, rehearse) -> None:
    plain = build(device, rehearse)
    window = TINY_WINDOW if rehearse else WINDOW
    enabled = enabled_twin(plain, window)
    # The last of as many tokens as sinkattn sees is the first step of both.
    ids, last = random_ids(plain, NUM_SINKS + window).split([NUM_SINKS + window - 1, 1], dim=1)
    ways = Ways(bench, device, f"{NUM_SINKS + window} tokens in sight")
    ours = Stream(enabled, sinkattn.SinkCache(enabled), ids)
    ours.token.copy_(last)
    first = ours.fork()
    first.step()
    add_graph(ways, "sinkattn graph", ours)
    ways.try_to("sinkattn graph fused", partial(add_fused, ways, plain, window, ids, last, first.logits))
    ways.try_to("static-cache compiled", partial(add_compiled, ways, plain, ids, last, first.logits))
    copy_bytes = add_copy(ways)
    turns = ways.in_turns(rounds=12)
    must_read = bound_bytes(enabled, ours.cache)
    ratio = turns.ratio("sinkattn graph", "static-cache compiled")
    ours_names = ("sinkattn graph", "sinkattn graph fused")
    figures = {
        **{f"{name} ms": turns.ms(name) for name in (*ours_names, "static-cache compiled")},
        **{f"{name} % of bound": 100 * turns.ratio("copy", name) * must_read / copy_bytes for name in ours_names},
        **{f"{name} / static-cache compiled": turns.ratio(name, "static-cache compiled") for name in ours_names},
    }
    bench.note("Whole model, 8 B parameters in bf16, one stream: a token, with torch.compile", ways.shape, figures)
    if not math.isnan(ratio):
        bench.target("whole model: sinkattn graph / static-cache compiled at most 1.00", ways.shape, ratio, ratio <= 1)
    ways.done()


def add_fused(ways: Ways, plain: LlamaForCausalLM, window: int, ids: Tensor, last: Tensor, logits: Tensor) -> None:
    model = enabled_twin(plain, window)
    stream = Stream(model, sinkattn.SinkCache(model), ids)
    stream.token.copy_(last)
    for module in model.modules():
        if isinstance(module, LlamaMLP | LlamaRMSNorm):
            module.forward = compiled(module.forward, ids.device, dynamic=False)
    stream.step()
    if ways.check("sinkattn graph fused", relative_error(stream.logits, logits), MOST_ERROR):
        add_graph(ways, "sinkattn graph fused", stream)


def add_compiled(ways: Ways, model: LlamaForCausalLM, ids: Tensor, last: Tensor, logits: Tensor) -> None:
    stream = CompiledStream(model, ids)
    stream.token.copy_(last)
    stream.step()
    if ways.check("static-cache compiled", relative_error(stream.logits, logits), MOST_ERROR):
        for _ in range(COMPILING_STEPS):
            stream.step()
        ways.add("static-cache compiled", stream.step, capture=False)
