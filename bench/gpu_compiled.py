"""Baselines on a GPU that torch.compile compiles first, which takes most of the time of this file.

    make bench-gpu

* ``flex``: FlexAttention with the mask of sinks and window, over contiguous keys that are rotated already, with nothing
  appended; decoding, and a chunk under the exact mask.
* ``static-cache compiled``: the unpatched model of gpu_model.py on transformers' StaticCache, with a step compiled in
  mode "reduce-overhead", which captures CUDA graphs. It attends, with a mask, over the whole length of its cache, which
  is 128 tokens longer than the context of sinkattn.
* ``sinkattn graph fused``: the graph of gpu_model.py, with the model's MLP and norms compiled.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_attention import HEAD_DIM, HEADS, NUM_SINKS
from gpu import Comparison, add_read, relative_error
from gpu_attention import add_baseline, random_chunk_inputs, run_decode
from gpu_attention_methods import Sdpa, Sinkattn
from gpu_model import MAX_ERROR, TINY_WINDOW, WINDOW, Stream, add_graph, build, enabled_twin, min_bytes_read, random_ids
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import sinkattn

DECODE = [(1, 4096), (8, 4096)]
CHUNKS = [(4096, 4096)]
EXTRA_TOKENS = 128  # length of the StaticCache beyond the context
WARMUP_STEPS = 4


def pytest_generate_tests(metafunc) -> None:
    tiny = metafunc.config.getoption("rehearse")
    if metafunc.function.__name__ == "test_flex_decode":
        shapes = [(2, 40)] if tiny else DECODE
        metafunc.parametrize("batch, window", shapes, ids=["B{}-W{}".format(*shape) for shape in shapes])
    if metafunc.function.__name__ == "test_flex_chunk":
        shapes = [(24, 24)] if tiny else CHUNKS
        metafunc.parametrize("tokens, window", shapes, ids=["T{}-W{}".format(*shape) for shape in shapes])


def maybe_compile(function: Callable[..., Any], device: torch.device, **options) -> Callable[..., Any]:
    """Compile a function; on the CPU return it uncompiled, since a rehearsal only tries the code around it."""
    return function if device.type == "cpu" else torch.compile(function, **options)


class Flex(Sdpa):
    def prepare(self) -> None:
        super().prepare()
        new, window = self.inputs.new[0].shape[2], self.inputs.window
        # Positions among past and new tokens; the first query is the first new token.
        first, keys = self.inputs.past[0].shape[2], self.inputs.past[0].shape[2] + new

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            age = first + query - key
            return (age >= 0) & ((key < NUM_SINKS) | (age < window))

        self.mask = create_block_mask(visible, None, None, new, keys, device=str(self.inputs.device))
        self.attend = maybe_compile(flex_attention, self.inputs.device, dynamic=False)

    def step(self, layer: tuple[Tensor, Tensor]) -> Tensor:
        return self.attend(self.query, *layer, block_mask=self.mask, scale=self.inputs.heads.scale, enable_gqa=True)


def test_flex_decode(bench, device, batch: int, window: int) -> None:
    run_decode(bench, device, batch, window, {"flex": Flex}, rounds=15)


def test_flex_chunk(bench, device, tokens: int, window: int) -> None:
    inputs = random_chunk_inputs(device, tokens, window)
    comparison = Comparison(bench, device, f"B=1 W={window} T={tokens}")
    ours = Sinkattn(inputs)
    expected = ours.first_output()
    comparison.add("sinkattn", ours.run_all_layers, inputs.num_layers)
    comparison.try_add("flex", partial(add_baseline, comparison, "flex", Flex, inputs, expected))
    timings = comparison.time_interleaved(rounds=15)
    flops = 4 * HEADS * HEAD_DIM * tokens * (NUM_SINKS + window)
    ratio = timings.ratio("sinkattn", "flex")
    figures = {
        **{f"{name} us": comparison.median_step(timings, name) for name in ("sinkattn", "flex")},
        **{f"{name} TFLOP/s": flops / timings.ms(name) / 1e9 for name in ("sinkattn", "flex")},
        "sinkattn / flex": ratio,
    }
    bench.add_row("Chunk on a full window, one layer, bf16, with flex", comparison.shape, figures)
    if not math.isnan(ratio):
        bench.add_target("chunk: sinkattn / flex at most 1.00", comparison.shape, ratio, ratio <= 1)
    comparison.assert_outputs_match()


class CompiledStream(Stream):
    """Greedy generation on a StaticCache; when the cache is full, it goes back to its first length."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.tokens = ids.shape[1]
        super().__init__(model, StaticCache(config=model.config, max_cache_len=self.tokens + EXTRA_TOKENS), ids)
        self.model = maybe_compile(model, ids.device, mode="reduce-overhead", dynamic=False)
        self.steps = 0

    def step(self) -> None:
        if self.steps == EXTRA_TOKENS:
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
    # The last token of the context is the first step of both.
    ids, last = random_ids(plain, NUM_SINKS + window).split([NUM_SINKS + window - 1, 1], dim=1)
    comparison = Comparison(bench, device, f"{NUM_SINKS + window} tokens in sight")
    ours = Stream(enabled, sinkattn.SinkCache(enabled), ids)
    ours.token.copy_(last)
    first = ours.fork()
    first.step()
    add_graph(comparison, "sinkattn graph", ours)
    comparison.try_add("sinkattn graph fused", partial(add_fused, comparison, plain, window, ids, last, first.logits))
    comparison.try_add("static-cache compiled", partial(add_compiled, comparison, plain, ids, last, first.logits))
    plain_bytes = add_read(comparison)
    timings = comparison.time_interleaved(rounds=12)
    bytes_read = min_bytes_read(enabled, ours.cache)
    ratio = timings.ratio("sinkattn graph", "static-cache compiled")
    ours_names = ("sinkattn graph", "sinkattn graph fused")
    figures = {
        **{f"{name} ms": timings.ms(name) for name in (*ours_names, "static-cache compiled")},
        **{f"{name} % of bound": 100 * timings.ratio("read", name) * bytes_read / plain_bytes for name in ours_names},
        **{f"{name} / static-cache compiled": timings.ratio(name, "static-cache compiled") for name in ours_names},
    }
    bench.add_row(
        "Whole model, 8 B parameters in bf16, one stream: a token, with torch.compile", comparison.shape, figures
    )
    if not math.isnan(ratio):
        bench.add_target(
            "whole model: sinkattn graph / static-cache compiled at most 1.00", comparison.shape, ratio, ratio <= 1
        )
    comparison.assert_outputs_match()


def add_fused(
    comparison: Comparison, plain: LlamaForCausalLM, window: int, ids: Tensor, last: Tensor, logits: Tensor
) -> None:
    model = enabled_twin(plain, window)
    stream = Stream(model, sinkattn.SinkCache(model), ids)
    stream.token.copy_(last)
    for module in model.modules():
        if isinstance(module, LlamaMLP | LlamaRMSNorm):
            module.forward = maybe_compile(module.forward, ids.device, dynamic=False)
    stream.step()
    if comparison.check_output("sinkattn graph fused", relative_error(stream.logits, logits), MAX_ERROR):
        add_graph(comparison, "sinkattn graph fused", stream)


def add_compiled(comparison: Comparison, model: LlamaForCausalLM, ids: Tensor, last: Tensor, logits: Tensor) -> None:
    stream = CompiledStream(model, ids)
    stream.token.copy_(last)
    stream.step()
    if comparison.check_output("static-cache compiled", relative_error(stream.logits, logits), MAX_ERROR):
        for _ in range(WARMUP_STEPS):
            stream.step()
        comparison.add("static-cache compiled", stream.step, capture=False)
