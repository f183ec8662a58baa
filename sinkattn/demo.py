"""The demonstration: one text, one model, four ways to stream it, compared on the same tokens.

A position is the place in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from sinkattn.evaluate.methods import CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.perplexity import chunks
from sinkattn.recorder import Recorder, sample_positions
from sinkattn.text import TokenStream

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
class Measured:
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
    methods: dict[str, Measured] = field(default_factory=dict)
    turns: Turns | None = None


Watch = Callable[[str, Recorder, int], None]
"""Called now and then while a method runs: its name, its recorder, the positions it will record."""


def run(model: Any, stream: TokenStream, settings: Settings, watch: Watch, resident: Callable[[], int]) -> Result:
    """Run the four methods one after the other; the model is not changed.

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
    sinks = Streamed(model, CacheSize(settings.num_sinks, settings.window))
    if (limit := dense_limit(sinks)) is not None:
        settings = replace(settings, dense_tokens=min(settings.dense_tokens, limit))
        settings.check()
    rng = np.random.default_rng(settings.seed)
    size, tokens, dense_end = settings.cache_tokens, settings.tokens, settings.dense_end
    parts = ((size, dense_end), (dense_end, tokens))
    samples = np.concatenate([sample_positions(low, high, settings.samples, rng) for low, high in parts])
    result = Result(settings)

    def begin(name: str, tokens: int) -> tuple[Recorder, Callable[[], None]]:
        recorder = Recorder(tokens, size, samples)
        result.methods[name] = Measured(recorder)
        return recorder, lambda: watch(name, recorder, tokens)

    # First, while nothing else has taken memory.
    _token_by_token(sinks, iter(stream), tokens, *begin("sinkattn", tokens), resident)
    rounds = min(TURNS, max(1, tokens // 10))
    result.turns = _in_turns(sinks, Streamed(model, sinks.size), list(islice(stream, size + rounds)), rounds)

    window = Streamed(model, CacheSize(0, size))
    _in_chunks(window, iter(stream), tokens, *begin("window", tokens))

    dense = Dense(model)
    recorder, watch_dense = begin("dense", dense_end)
    _token_by_token(dense, iter(stream), dense_end, recorder, watch_dense, resident, DENSE_SECONDS)
    if recorder.end < dense_end:
        result.methods["dense"].stopped = f"time budget of {DENSE_SECONDS:.0f} s"
    elif dense_end < tokens:
        result.methods["dense"].stopped = f"budget of {dense_end:,} tokens"

    recomputed = Recomputed(model, size, stream.start_token)
    _at_samples(recomputed, iter(stream), *begin("recompute", int(samples[-1]) + 1))
    for name, method in {"sinkattn": sinks, "window": window, "dense": dense}.items():
        result.methods[name].cache_bytes = method.kv_bytes
    return result


def _token_by_token(
    method: Method,
    ids: Iterator[int],
    tokens: int,
    recorder: Recorder,
    watch: Callable[[], None],
    resident: Callable[[], int],
    seconds: float = math.inf,
) -> None:
    """Feed one token after the other, for so many seconds at most."""
    fed, wanted = torch.tensor([next(ids)]), torch.ones(1, dtype=torch.bool)
    end = time.perf_counter() + seconds
    for position in range(tokens):
        target = torch.tensor([next(ids)])
        began = time.perf_counter()
        if began > end:
            break
        # The loss comes to the host, so the time is that of the whole forward.
        loss = float(method.feed(fed, target, wanted).losses)
        recorder.add(position, loss, time.perf_counter() - began)
        if recorder.memory_is_due():
            recorder.add_memory(resident(), method.kv_bytes)
            watch()
        fed = target
    watch()


def _in_turns(old: Streamed, young: Streamed, ids: list[int], rounds: int) -> Turns:
    """Time the next tokens of a stream against those of a new one whose window is just full."""
    size = len(ids) - rounds
    nothing = torch.zeros(size, dtype=torch.bool)
    young.feed(torch.tensor(ids[:size]), torch.tensor(ids[:size]), nothing)
    old_seen = old.cache.tokens_seen
    times = np.zeros((rounds, 2))
    for turn, token in enumerate(ids[size:]):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            (young, old)[which].step(token)
            times[turn, which] = time.perf_counter() - began
    medians = np.median(times, axis=0)
    change = float(np.median(times[:, 1] / times[:, 0])) - 1
    return Turns(rounds, size, old_seen, float(medians[0]), float(medians[1]), change)


def _in_chunks(method: Method, ids: Iterator[int], tokens: int, recorder: Recorder, watch: Callable[[], None]) -> None:
    """Feed many tokens at once: the losses are those of feeding them one by one, as the contract promises."""
    for first, fed, targets in chunks(ids, tokens):
        losses = method.feed(fed, targets, torch.ones(len(fed), dtype=torch.bool)).losses
        for position, loss in enumerate(losses.tolist(), first):
            recorder.add(position, loss)
        watch()


def _at_samples(method: Method, ids: Iterator[int], recorder: Recorder, watch: Callable[[], None]) -> None:
    """Feed the tokens up to each sampled position, where alone a prediction is made."""
    last, done = next(ids), 0
    for position in recorder.samples.tolist():
        targets = list(islice(ids, position + 1 - done))
        fed, done = [last, *targets[:-1]], position + 1
        last = targets[-1]
        wanted = torch.tensor([False] * (len(fed) - 1) + [True])
        began = time.perf_counter()
        loss = float(method.feed(torch.tensor(fed), torch.tensor(targets), wanted).losses[-1])
        recorder.add(position, loss, time.perf_counter() - began)
        watch()
