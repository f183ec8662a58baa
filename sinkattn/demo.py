"""The demonstration: one text, one model, four ways to stream it, compared on the same tokens.

A position is the place in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sinkattn.hf import SinkCache, disable, enable
from sinkattn.hf.stream import keep_last_logits
from sinkattn.recorder import Recorder, sample_positions
from sinkattn.text import TokenStream

CHUNK = 256
TURNS = 1_000
DENSE_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What to run; all sizes in tokens."""

    tokens: int = 16_000
    num_sinks: int = 4
    window: int = 124
    dense_tokens: int = 5_000
    """The dense model stops after so many, or after a minute."""
    samples: int = 1_000
    """Positions scored by recomputation before `dense_tokens`, and as many after."""
    seed: int = 0
    """Draws those positions."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that a query sees: sinks and window."""
        return self.num_sinks + self.window

    @property
    def dense_end(self) -> int:
        """Where the part of the stream ends that dense attention is planned to reach."""
        return min(self.tokens, self.dense_tokens)

    def check(self) -> None:
        """Raise ValueError for sizes that leave nothing to compare."""
        for name in ("tokens", "dense_tokens"):
            if getattr(self, name) <= self.cache_tokens:
                raise ValueError(
                    f"{name}: expected more than num_sinks + window ({self.cache_tokens}), got {getattr(self, name)}"
                )
        if self.samples < 1:
            raise ValueError(f"samples: expected 1 or more, got {self.samples}")


@dataclass
class Method:
    """One way to stream, and what was measured of it."""

    recorder: Recorder
    cache_bytes: int | None = None
    """KV cache at the end; None where none is kept."""
    stopped: str | None = None
    """Why it stopped before the end."""


@dataclass(frozen=True)
class Turns:
    """Time per token of a long stream and a young one, in turns, so that other work on the machine slows both."""

    rounds: int
    young_seen: int
    """Tokens that the young stream had seen when the turns began; its window was full."""
    old_seen: int
    young: float
    """Median, in seconds."""
    old: float
    change: float
    """Median over the rounds of old / young - 1."""


@dataclass
class Result:
    """What a demonstration found."""

    settings: Settings
    methods: dict[str, Method] = field(default_factory=dict)
    turns: Turns | None = None


Watch = Callable[[str, Recorder, int], None]
"""Called now and then while a method runs: its name, its recorder, the positions it will record."""


def run(model: Any, stream: TokenStream, settings: Settings, watch: Watch, resident: Callable[[], int]) -> Result:
    """Run the four methods one after the other; the model is given back as it came.

    Args:
        model: a transformers causal language model that `sinkattn.enable` accepts, in evaluation mode.
        stream: the tokens; every method reads them anew.
        settings: sizes.
        watch: is told of progress.
        resident: gives the resident memory of the process in bytes.

    Raises:
        ValueError: for settings that leave nothing to compare, an empty text, or a model that is refused.
    """
    settings.check()
    rng = np.random.default_rng(settings.seed)
    size, tokens, dense_end = settings.cache_tokens, settings.tokens, settings.dense_end
    parts = ((size, dense_end), (dense_end, tokens))
    samples = np.concatenate([sample_positions(low, high, settings.samples, rng) for low, high in parts])
    result = Result(settings)

    def begin(name: str, tokens: int) -> tuple[Recorder, Callable[[], None]]:
        recorder = Recorder(tokens, size, samples)
        result.methods[name] = Method(recorder)
        return recorder, lambda: watch(name, recorder, tokens)

    with torch.inference_mode():
        # First, while nothing else has taken memory.
        with enabled(model, settings.num_sinks, settings.window):
            cache = SinkCache(model)
            _token_by_token(model, cache, iter(stream), tokens, *begin("sinkattn", tokens), resident)
            result.methods["sinkattn"].cache_bytes = kv_bytes(cache)
            rounds = min(TURNS, max(1, tokens // 10))
            result.turns = _in_turns(model, cache, list(islice(stream, size + rounds)), rounds)
        with enabled(model, 0, size):
            cache = SinkCache(model)
            _in_chunks(model, cache, iter(stream), tokens, *begin("window", tokens))
            result.methods["window"].cache_bytes = kv_bytes(cache)

        recorder, watch_dense = begin("dense", dense_end)
        cache = _token_by_token(model, None, iter(stream), dense_end, recorder, watch_dense, resident, DENSE_SECONDS)
        result.methods["dense"].cache_bytes = kv_bytes(cache)
        if recorder.end < dense_end:
            result.methods["dense"].stopped = f"time budget of {DENSE_SECONDS:.0f} s"
        elif dense_end < tokens:
            result.methods["dense"].stopped = f"budget of {dense_end:,} tokens"

        _recompute(model, iter(stream), size, *begin("recompute", int(samples[-1]) + 1))
    return result


@contextmanager
def enabled(model: Any, num_sinks: int, window: int) -> Iterator[None]:
    """`enable` for the time of a block."""
    enable(model, num_sinks, window)
    try:
        yield
    finally:
        disable(model)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values in a transformers cache; 0 for None."""
    layers = [] if cache is None else cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)


def _token_by_token(
    model, cache, ids: Iterator[int], tokens: int, recorder: Recorder, watch, resident, seconds: float = math.inf
):
    """Feed one token after the other; returns the cache. A cache of None becomes transformers' own, which grows."""
    fed = torch.tensor([[next(ids)]], device=model.device)
    end = time.perf_counter() + seconds
    for position in range(tokens):
        target = next(ids)
        began = time.perf_counter()
        if began > end:
            break
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        fed = torch.tensor([[target]], device=model.device)
        # .item() waits for the device, so the time is that of the whole forward.
        loss = F.cross_entropy(out.logits[:, -1].float(), fed[0]).item()
        recorder.add(position, loss, time.perf_counter() - began)
        if recorder.memory_is_due():
            recorder.add_memory(resident(), kv_bytes(cache))
            watch()
    watch()
    return cache


def _in_turns(model, old_cache, ids: list[int], rounds: int) -> Turns:
    """Time the next tokens of a stream against those of a new one whose window is just full."""
    size = len(ids) - rounds
    young_cache = SinkCache(model)
    model(input_ids=torch.tensor([ids[:size]], device=model.device), past_key_values=young_cache, use_cache=True)
    old_seen = old_cache.tokens_seen
    times = np.zeros((rounds, 2))
    for turn, token in enumerate(ids[size:]):
        fed = torch.tensor([[token]], device=model.device)
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            model(input_ids=fed, past_key_values=(young_cache, old_cache)[which], use_cache=True).logits.sum().item()
            times[turn, which] = time.perf_counter() - began
    young, old = np.median(times, axis=0)
    return Turns(rounds, size, old_seen, float(young), float(old), float(np.median(times[:, 1] / times[:, 0])) - 1)


def _in_chunks(model, cache, ids: Iterator[int], tokens: int, recorder: Recorder, watch) -> None:
    """Feed many tokens at once: the losses are those of feeding them one by one, as the contract promises."""
    last = next(ids)
    for begin in range(0, tokens, CHUNK):
        targets = list(islice(ids, min(CHUNK, tokens - begin)))
        fed = torch.tensor([[last, *targets]], device=model.device)
        logits = model(input_ids=fed[:, :-1], past_key_values=cache, use_cache=True).logits
        losses = F.cross_entropy(logits[0].float(), fed[0, 1:], reduction="none")
        for position, loss in enumerate(losses.tolist(), begin):
            recorder.add(position, loss)
        watch()
        last = targets[-1]


def _recompute(model, ids: Iterator[int], size: int, recorder: Recorder, watch) -> None:
    """At the sampled positions, a fresh forward over the first token and the last ``size - 1``."""
    options = {"use_cache": False, **keep_last_logits(model)}
    first = next(ids)
    recent = deque([first], maxlen=size)
    for position in range(recorder.samples[-1] + 1):
        target = next(ids)
        if recorder.is_sample(position):
            began = time.perf_counter()
            fed = torch.tensor([[first, *islice(recent, 1, None)]], device=model.device)
            logits = model(input_ids=fed, **options).logits[:, -1]
            loss = F.cross_entropy(logits.float(), torch.tensor([target], device=model.device)).item()
            recorder.add(position, loss, time.perf_counter() - began)
            watch()
        recent.append(target)
