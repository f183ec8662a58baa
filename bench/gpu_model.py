"""A model of eight billion parameters on a GPU: time per token once the window is full.

    make bench-gpu

A Llama with the shape of Llama 3 8B and random bfloat16 weights generates greedily in one stream, with 4 sinks and a
window of 4092, a context of 4096 tokens:

* ``sinkattn graph``: one step on a SinkCache (forward, argmax, token fed back) captured in a CUDA graph by hand, and
  replayed. Tokens are counted on the device, so one graph is valid for all steps; the count on the host does not
  advance in a replay, and the model does not read it.
* ``sinkattn``: the same step as its users run it: the decoder in a graph that sinkattn captures by itself.
* ``sinkattn eager``, ``dynamic-cache``: the same step without graphs, and the step of the unpatched model on
  transformers' DynamicCache kept at this length, launched from Python.
* ``recomputation``: the unpatched model without a cache: a forward over the last 4096 tokens for each new one.
* ``generate``: these caches, in transformers' own loop.

The bound is the time in which a plain read, the sum of a tensor, reads as many bytes as a step must read: all weights
except the embedding, and the cache.
"""

import copy

import pytest
import torch
from gpu import Comparison, add_read, relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import sinkattn
from sinkattn.hf import decode_steps
from sinkattn.hf.swap.step_graphs import NUM_COMPARED, STEPS_BEFORE
from sinkattn.hf.versions import GENERATE_CACHE, forward_cache

NUM_SINKS, WINDOW, SMALL_WINDOW = 4, 4092, 1020
EARLY, LATE, CHUNK = 2_000, 100_000, 1_024
NEW_TOKENS = 16
CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "bos_token_id": None,
    "eos_token_id": None,
}
TINY_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
TINY_WINDOW = 28
# RMS error relative to the logits.
MAX_ERROR = 8 * torch.finfo(torch.bfloat16).eps


def build(device: torch.device, rehearse: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG | (TINY_CONFIG if rehearse else {}))
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def enabled_twin(model: LlamaForCausalLM, window: int, *, graphs: bool = False) -> LlamaForCausalLM:
    """An enabled model that shares the weights of ``model``, which is not changed.

    graphs: whether it captures its steps, on a device that has graphs.
    """
    weights = {id(parameter): parameter for parameter in model.parameters()}
    return sinkattn.enable(copy.deepcopy(model, weights), NUM_SINKS, window, graphs="auto" if graphs else False)


@pytest.fixture(scope="module")
def plain(request) -> LlamaForCausalLM:
    rehearse = request.config.getoption("rehearse")
    return build(torch.device("cpu" if rehearse else "cuda"), rehearse)


@pytest.fixture(scope="module")
def enabled(plain, request) -> LlamaForCausalLM:
    """Without graphs of its own."""
    return enabled_twin(plain, TINY_WINDOW if request.config.getoption("rehearse") else WINDOW)


@pytest.fixture(scope="module")
def captured(plain, request) -> LlamaForCausalLM:
    """As users get it."""
    return enabled_twin(plain, TINY_WINDOW if request.config.getoption("rehearse") else WINDOW, graphs=True)


def context_length(model: LlamaForCausalLM) -> int:
    """Context length of an enabled model: sinks and window."""
    layout = sinkattn.SinkCache(model).layout
    return layout.num_sinks + layout.window


def random_ids(model: LlamaForCausalLM, tokens: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, tokens), device=model.device)


class Stream:
    """Greedy generation from a cache that has seen ``ids``; steps reuse the same tensors, as CUDA graphs require."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, ids: Tensor) -> None:
        self.model, self.cache = model, cache
        for part in ids.split(CHUNK, dim=1):
            self.logits = model(input_ids=part, logits_to_keep=1, **{forward_cache(model): cache}).logits[:, -1].clone()
        self.token = self.logits.argmax(dim=-1, keepdim=True)

    def fork(self) -> "Stream":
        twin = copy.copy(self)
        twin.cache, twin.logits, twin.token = copy.deepcopy(self.cache), self.logits.clone(), self.token.clone()
        return twin

    def step(self) -> None:
        output = self.model(input_ids=self.token, logits_to_keep=1, **{forward_cache(self.model): self.cache})
        self.logits.copy_(output.logits[:, -1])
        self.token.copy_(self.logits.argmax(dim=-1, keepdim=True))

    def step_at_constant_length(self) -> None:
        """A step on a cache that would grow: first crop the token of the previous step."""
        self.cache.crop(-1)
        self.step()


class Recomputed:
    def __init__(self, model: LlamaForCausalLM, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def step(self) -> None:
        self.logits = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        token = self.logits.argmax(dim=-1, keepdim=True)
        self.ids = torch.cat((self.ids[:, 1:], token), dim=1)


def min_bytes_read(model: LlamaForCausalLM, cache: sinkattn.SinkCache) -> int:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights - model.get_input_embeddings().weight.nbytes + cache.nbytes


def add_graph(comparison: Comparison, name: str, stream: Stream) -> None:
    """Add a captured step, and check that a replay gives what a step launched from Python gives."""
    comparison.add(name, stream.step)
    twin = stream.fork()
    twin.step()
    comparison.methods[name].launch()
    comparison.check_output(f"{name} after capture", relative_error(stream.logits, twin.logits), MAX_ERROR)


def test_token(bench, device, plain, enabled, captured) -> None:
    tokens = context_length(enabled)
    ids = random_ids(plain, tokens)
    comparison = Comparison(bench, device, f"{tokens} tokens in sight")
    ours = Stream(enabled, sinkattn.SinkCache(enabled), ids)
    recomputed = Recomputed(plain, ids)
    recomputed.step()
    comparison.check_output("recomputation", relative_error(recomputed.logits, ours.logits), MAX_ERROR)
    add_graph(comparison, "sinkattn graph", ours)
    comparison.add("sinkattn eager", ours.fork().step, capture=False)
    users = Stream(captured, sinkattn.SinkCache(captured), ids)
    for _ in range(STEPS_BEFORE + NUM_COMPARED):
        users.step()
    comparison.add("sinkattn", users.step, capture=False)
    comparison.add("recomputation", recomputed.step, capture=False)
    dense = Stream(plain, DynamicCache(), ids)
    comparison.try_add(
        "dynamic-cache", lambda: comparison.add("dynamic-cache", dense.step_at_constant_length, capture=False)
    )
    plain_bytes = add_read(comparison)
    timings = comparison.time_interleaved(rounds=12)

    bytes_read = min_bytes_read(enabled, ours.cache)
    percent = 100 * timings.ratio("read", "sinkattn graph") * bytes_read / plain_bytes
    speedup = timings.ratio("recomputation", "sinkattn graph")
    figures = {
        **{f"{name} ms": comparison.median_step(timings, name, 1e-3) for name in comparison.methods if name != "read"},
        "GB to read": bytes_read / 1e9,
        "read GB/s": plain_bytes / timings.ms("read") / 1e6,
        "bound ms": timings.ms("read") * bytes_read / plain_bytes,
        "% of bound": percent,
        "recomputation / sinkattn graph": speedup,
        "recomputation / sinkattn": timings.ratio("recomputation", "sinkattn"),
        "sinkattn / sinkattn graph": timings.ratio("sinkattn", "sinkattn graph"),
        "sinkattn / dynamic-cache": timings.ratio("sinkattn", "dynamic-cache"),
        "sinkattn eager / dynamic-cache": timings.ratio("sinkattn eager", "dynamic-cache"),
    }
    bench.add_row("Whole model, 8 B parameters in bf16, one stream: a token", comparison.shape, figures)
    bench.add_remark(f"decode steps of `sinkattn`: {decode_steps(captured, users.cache)}")
    bench.add_target("whole model: a captured step at least 80% of the bound", comparison.shape, percent, percent >= 80)
    bench.add_target(
        "whole model: recomputation / sinkattn graph more than 22.2", comparison.shape, speedup, speedup > 22.2
    )
    overhead = timings.ratio("sinkattn", "sinkattn graph")
    bench.add_target(
        "whole model: a step / one captured by hand at most 1.05", comparison.shape, overhead, overhead <= 1.05
    )
    comparison.assert_outputs_match()


def test_constancy(bench, device, rehearse, plain) -> None:
    window, early, late = (TINY_WINDOW, 60, 1_000) if rehearse else (SMALL_WINDOW, EARLY, LATE)
    model = enabled_twin(plain, window)
    ids = random_ids(plain, early)
    streams = {tokens: Stream(model, sinkattn.SinkCache(model), ids) for tokens in (late, early)}
    streams[late].cache.layers[0].ring.seen.fill_(late)  # the counter that all layers share
    comparison = Comparison(bench, device, f"window {window}")
    for tokens, stream in streams.items():
        comparison.add(f"token {tokens:,}", stream.step)
    timings = comparison.time_interleaved(rounds=12)
    ratio = timings.ratio(f"token {late:,}", f"token {early:,}")
    figures = {
        **{f"{name} ms": comparison.median_step(timings, name, 1e-3) for name in comparison.methods},
        f"{late:,} / {early:,}": ratio,
        "cache MB": streams[late].cache.nbytes / 1e6,
    }
    title = "Constancy: a captured step early and late in a stream (the counter set forward, not all tokens decoded)"
    bench.add_row(title, comparison.shape, figures)
    bench.add_target(
        f"constancy: token {late:,} / token {early:,} within 5%", comparison.shape, ratio, abs(ratio - 1) <= 0.05
    )


class Generation:
    """Continue a stream with transformers' `generate`; a cache that grows is cropped afterwards."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, ids: Tensor) -> None:
        self.stream = Stream(model, cache, ids)
        self.sequence = torch.cat((ids, self.stream.token), dim=1)

    def run(self) -> None:
        options = {GENERATE_CACHE: self.stream.cache, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        output = self.stream.model.generate(self.sequence, **options)
        assert output.shape[1] == self.sequence.shape[1] + NEW_TOKENS
        if isinstance(self.stream.cache, DynamicCache):
            self.stream.cache.crop(-NEW_TOKENS)
        else:
            self.sequence = output


def test_generate(bench, device, plain, enabled, captured) -> None:
    tokens = context_length(enabled)
    ids = random_ids(plain, tokens)
    comparison = Comparison(bench, device, f"{tokens} tokens in sight")
    ours = Generation(captured, sinkattn.SinkCache(captured), ids)
    comparison.add("sinkattn", ours.run, NEW_TOKENS, capture=False)
    eager = Generation(enabled, sinkattn.SinkCache(enabled), ids)
    comparison.add("sinkattn eager", eager.run, NEW_TOKENS, capture=False)
    dense = Generation(plain, DynamicCache(), ids)
    comparison.try_add("dynamic-cache", lambda: comparison.add("dynamic-cache", dense.run, NEW_TOKENS, capture=False))
    timings = comparison.time_interleaved(rounds=5)
    ratio = timings.ratio("sinkattn", "dynamic-cache")
    figures = {
        **{
            f"{name} ms": comparison.median_step(timings, name, 1e-3)
            for name in ("sinkattn", "sinkattn eager", "dynamic-cache")
        },
        "sinkattn / dynamic-cache": ratio,
        "sinkattn eager / dynamic-cache": timings.ratio("sinkattn eager", "dynamic-cache"),
    }
    bench.add_row("Whole model, 8 B parameters in bf16, one stream: a token of generate", comparison.shape, figures)
    bench.add_target("generate: sinkattn / dynamic-cache at most 1.00", comparison.shape, ratio, ratio <= 1)
