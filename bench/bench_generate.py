"""A whole model on an endless stream: time per token once the window is full, early and late in the stream.

    python -m pytest bench/bench_generate.py --benchmark-json=generate.json

A Llama of 116 million random parameters generates greedily, one token at a time, in one stream:

* ``sinkattn``: the model enabled with 4 sinks and a window of 1024, on a SinkCache.
* ``dynamic-cache``: the unpatched model on transformers' DynamicCache. The cache would grow; the token of the previous
  step is cropped, untimed, so that every step sees 1028 tokens, as in sinkattn.
* ``recomputation``: the unpatched model without a cache: a forward over the last 1028 tokens for each new one.

Both models are checked to give the same logits for the first 1028 tokens. The last benchmark compares a token after
2,000 tokens of a stream with one after 100,000; feeding so many takes minutes.
"""

import copy
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import sinkattn
from sinkattn.hf.versions import forward_cache

NUM_SINKS, WINDOW = 4, 1024
CONTEXT = NUM_SINKS + WINDOW
EARLY, LATE, CHUNK = 2_000, 100_000, 1_000
CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 8192,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Absolute, for logits with a standard deviation of 0.5.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


@pytest.fixture(scope="module", params=DTYPES)
def models(request) -> tuple[LlamaForCausalLM, LlamaForCausalLM, str]:
    """An enabled model, an unpatched model with the same weights, and their dtype."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(DTYPES[request.param]).eval()
    enabled = sinkattn.enable(copy.deepcopy(plain), NUM_SINKS, WINDOW)
    ids = random_ids(CONTEXT)
    with torch.inference_mode():
        cache = sinkattn.SinkCache(enabled)
        # One chunk, then single tokens.
        parts = ids.split([CONTEXT - 4, 1, 1, 1, 1], dim=1)
        logits = torch.cat([enabled(input_ids=part, **{forward_cache(enabled): cache}).logits for part in parts], dim=1)
        assert_close(logits, plain(input_ids=ids, use_cache=False).logits, atol=TOLERANCE[request.param], rtol=0)
    return enabled, plain, request.param


def random_ids(tokens: int) -> Tensor:
    return torch.randint(CONFIG["vocab_size"], (1, tokens))


def next_token(model: LlamaForCausalLM, **inputs) -> Tensor:
    """Likeliest next token ``[1, 1]``."""
    return model(**inputs, logits_to_keep=1).logits[:, -1].argmax(dim=-1, keepdim=True)


class Cached:
    """Generation from a cache that has seen ``tokens`` random tokens."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, tokens: int) -> None:
        self.model, self.cache = model, cache
        for ids in random_ids(tokens).split(CHUNK, dim=1):
            self.token = next_token(model, input_ids=ids, **{forward_cache(model): cache})

    def next_step(self) -> Callable[[], None]:
        return self.step

    def step(self) -> None:
        self.token = next_token(self.model, input_ids=self.token, **{forward_cache(self.model): self.cache})


class CachedAtConstantLength(Cached):
    def next_step(self) -> Callable[[], None]:
        self.cache.crop(-1)
        return self.step


class Recomputed:
    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.ids = model, random_ids(CONTEXT)

    def next_step(self) -> Callable[[], None]:
        return self.step

    def step(self) -> None:
        token = next_token(self.model, input_ids=self.ids, use_cache=False)
        self.ids = torch.cat((self.ids[:, 1:], token), dim=1)


def test_dynamic_cache(bench, models) -> None:
    enabled, plain, dtype = models
    ours = Cached(enabled, sinkattn.SinkCache(enabled), CONTEXT)
    baseline = CachedAtConstantLength(plain, DynamicCache(), CONTEXT)
    timings = bench.time_interleaved({"sinkattn": ours.next_step, "dynamic-cache": baseline.next_step}, rounds=60)
    assert baseline.cache.get_seq_length() == CONTEXT
    ratio = timings.ratio("sinkattn", "dynamic-cache")
    figures = {**timings.figures("sinkattn", "dynamic-cache"), "sinkattn / dynamic-cache": ratio}
    bench.add_row("Whole model: a token, with 1028 tokens in sight", dtype, figures)
    bench.add_target("whole model: sinkattn / dynamic-cache at most 1.00", dtype, ratio, ratio <= 1)
    bench.add_remark(other_packages())


def test_recomputation(bench, models) -> None:
    enabled, plain, dtype = models
    ours = Cached(enabled, sinkattn.SinkCache(enabled), CONTEXT)
    methods = {"sinkattn": ours.next_step, "recomputation": Recomputed(plain).next_step}
    timings = bench.time_interleaved(methods, rounds=7)
    ratio = timings.ratio("recomputation", "sinkattn")
    figures = {**timings.figures("sinkattn", "recomputation"), "recomputation / sinkattn": ratio}
    bench.add_row("Whole model: a token, with 1028 tokens in sight, against recomputation", dtype, figures)
    bench.add_target("whole model: recomputation / sinkattn at least 20", dtype, ratio, ratio >= 20)


@pytest.mark.parametrize("models", ["fp32"], indirect=True)
def test_constancy(bench, models) -> None:
    enabled, _, dtype = models
    early, late = (Cached(enabled, sinkattn.SinkCache(enabled), tokens) for tokens in (EARLY, LATE))
    timings = bench.time_interleaved(
        {f"token {LATE:,}": late.next_step, f"token {EARLY:,}": early.next_step}, rounds=100
    )
    ratio = timings.ratio(f"token {LATE:,}", f"token {EARLY:,}")
    figures = {
        **timings.figures(f"token {EARLY:,}", f"token {LATE:,}"),
        f"{LATE:,} / {EARLY:,}": ratio,
        f"cache MB, {EARLY:,}": early.cache.nbytes / 1e6,
        f"cache MB, {LATE:,}": late.cache.nbytes / 1e6,
    }
    bench.add_row("Constancy: a token early and late in a stream", dtype, figures)
    bench.add_target(f"constancy: token {LATE:,} / token {EARLY:,} within 5%", dtype, ratio, abs(ratio - 1) <= 0.05)
    sizes = late.cache.nbytes / early.cache.nbytes
    bench.add_target("constancy: caches of the same size", dtype, sizes, sizes == 1)


def other_packages() -> str:
    try:
        return (
            f"attention_sinks {version('attention_sinks')}: installed, not timed: its models are for transformers 4.34"
        )
    except PackageNotFoundError:
        return "attention_sinks: not installed; it needs transformers 4.34.0"
