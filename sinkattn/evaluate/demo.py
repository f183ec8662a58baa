"""The measurements of `sinkattn demo`: four ways to stream a text through a model, compared on the same tokens.

A position is the index in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.perplexity import MIN_ROUNDS, chunks
from sinkattn.evaluate.recorder import Recorder, sample_positions
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.text import TokenStream

MAX_ROUNDS = 1_000
MAX_TURN_SECONDS = 15.0
DENSE_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """Methods and sizes to run; all sizes in tokens."""

    tokens: int = 16_000
    num_sinks: int = 4
    window: int = 124
    dense_tokens: int = 5_000
    """The dense model stops after this many tokens, or after a minute."""
    samples: int = 1_000
    """Positions scored by recomputation before `dense_tokens`, and as many after."""
    seed: int = 0
    """Seed for drawing those positions."""

    @property
    def cache_tokens(self) -> int:
        """Tokens that a query sees: sinks and window."""
        return self.num_sinks + self.window

    @property
    def dense_end(self) -> int:
        """Position at which the dense model is planned to stop."""
        return min(self.tokens, self.dense_tokens)

    @property
    def rounds(self) -> int:
        """Tokens of a new stream that are timed in turns with the long one."""
        return min(MAX_ROUNDS, max(1, self.tokens // 10))

    def seconds(self, speed: Speed) -> float:
        """About how long `run` takes."""
        size, end = self.cache_tokens, self.dense_end
        steps = self.tokens * speed.step + min(DENSE_SECONDS, end * speed.step)
        turns = turns_seconds(speed.step, self.rounds)
        samples = min(self.samples, end - size) + min(self.samples, self.tokens - end)
        return steps + turns + self.tokens * speed.token + samples * speed.forward(size)

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
    """The measurements of one method."""

    method: Method
    recorder: Recorder
    stopped: str | None = None
    """Why it stopped before the end."""

    @property
    def cache_bytes(self) -> int | None:
        """Size of the KV cache at the end; None for a method without one."""
        return self.method.kv_bytes


@dataclass(frozen=True)
class Turns:
    """Time per token of a long stream and of a new one, interleaved so that other load slows both alike."""

    rounds: int
    young_seen: int
    """Tokens that the new stream had seen when the rounds began; its window was full."""
    old_seen: int
    """The same of the long stream."""
    young: float
    """Median, in seconds."""
    old: float
    """Median, in seconds."""
    change: float
    """Median over the rounds of old / young - 1."""


@dataclass
class Result:
    """The measurements of all methods, by name; of those that began, if the run was interrupted."""

    settings: Settings
    methods: dict[str, Measured] = field(default_factory=dict)
    turns: Turns | None = None


OnProgress = Callable[[str, Recorder, int], None]
"""Called now and then while a method runs: name of the method, its recorder, tokens that the method will record."""


def run(
    model: PreTrainedModel,
    stream: TokenStream,
    settings: Settings,
    on_progress: OnProgress,
    resident: Callable[[], int],
) -> Result:
    """Run the four methods one after the other; the model is not changed.

    Args:
        model: a transformers causal language model that `sinkattn.enable` accepts, in evaluation mode.
        stream: the tokens; every method reads them from the beginning.
        settings: sizes.
        on_progress: called now and then.
        resident: returns the resident memory of the process in bytes.

    Raises:
        ValueError: for settings that leave nothing to compare, an empty text, or a model that is refused.
        Interrupted: if it is raised in a forward before sinkattn's window is full. Later it only ends the run early:
            ``settings.tokens`` of the result is then what all methods reached that the result has.
    """
    settings.check()
    sinks = Streamed(model, CacheSize(settings.num_sinks, settings.window))
    if (limit := dense_limit(sinks)) is not None:
        settings = replace(settings, dense_tokens=min(settings.dense_tokens, limit))
        settings.check()
    rng = np.random.default_rng(settings.seed)
    parts = (settings.cache_tokens, settings.dense_end), (settings.dense_end, settings.tokens)
    samples = np.concatenate([sample_positions(low, high, settings.samples, rng) for low, high in parts])
    result = Result(settings)
    try:
        _measure(model, sinks, stream, result, samples, on_progress, resident)
    except Interrupted:
        _end_early(result)
    return result


def _measure(
    model: PreTrainedModel,
    sinks: Streamed,
    stream: TokenStream,
    result: Result,
    samples: np.ndarray,
    on_progress: OnProgress,
    resident: Callable[[], int],
) -> None:
    """Run the methods, each recorded in ``result`` from its beginning on."""
    settings = result.settings
    size, tokens, dense_end = settings.cache_tokens, settings.tokens, settings.dense_end

    def begin(name: str, method: Method, tokens: int) -> tuple[Recorder, Callable[[], None]]:
        recorder = Recorder(tokens, size, samples)
        result.methods[name] = Measured(method, recorder)
        return recorder, lambda: on_progress(name, recorder, tokens)

    # sinkattn runs first, so that its memory is measured before the other methods allocate theirs.
    _feed_single_tokens(sinks, iter(stream), tokens, *begin("sinkattn", sinks, tokens), resident)
    ids = list(islice(stream, size + settings.rounds))
    result.turns = time_in_turns(sinks, Streamed(model, sinks.size), ids, settings.rounds)

    window = Streamed(model, CacheSize(0, size))
    _feed_chunks(window, iter(stream), tokens, *begin("window", window, tokens))

    dense = Dense(model)
    recorder, report_dense = begin("dense", dense, dense_end)
    result.methods["dense"].stopped = "interrupted"
    _feed_single_tokens(dense, iter(stream), dense_end, recorder, report_dense, resident, DENSE_SECONDS)
    if recorder.end < dense_end:
        result.methods["dense"].stopped = f"time budget of {DENSE_SECONDS:.0f} s"
    else:
        result.methods["dense"].stopped = f"budget of {dense_end:,} tokens" if dense_end < tokens else None

    recomputed = Recomputed(model, size, stream.start_token)
    _feed_up_to_samples(recomputed, iter(stream), *begin("recompute", recomputed, int(samples[-1]) + 1))


def _end_early(result: Result) -> None:
    """Keep the methods that got past the first window, and the tokens that all of them reached."""
    size = result.settings.cache_tokens
    ends = {name: measured.recorder.end for name, measured in result.methods.items()}
    if ends["sinkattn"] <= size:
        raise Interrupted
    result.methods = {name: measured for name, measured in result.methods.items() if ends[name] > size}
    # The dense model may stop anywhere.
    reached = min(end for name, end in ends.items() if end > size and name != "dense")
    result.settings = replace(result.settings, tokens=reached)


def _feed_single_tokens(
    method: Streamed | Dense,
    ids: Iterator[int],
    tokens: int,
    recorder: Recorder,
    on_progress: Callable[[], None],
    resident: Callable[[], int],
    max_seconds: float = math.inf,
) -> None:
    """Feed one token per call and record its loss and time; stop after ``max_seconds``."""
    fed, wanted = torch.tensor([next(ids)]), torch.ones(1, dtype=torch.bool)
    end = time.perf_counter() + max_seconds
    for position in range(tokens):
        target = torch.tensor([next(ids)])
        began = time.perf_counter()
        if began > end:
            break
        # The losses come back on the CPU, so the time is that of the whole forward.
        loss = float(method.feed(fed, target, wanted).losses)
        recorder.add(position, loss, time.perf_counter() - began)
        if recorder.memory_is_due():
            recorder.add_memory(resident(), method.kv_bytes)
            on_progress()
        fed = target
    on_progress()


def time_in_turns(old: Streamed, young: Streamed, ids: list[int], rounds: int) -> Turns:
    """Time the next tokens of a long stream, interleaved with those of a new one whose window is just full."""
    size = len(ids) - rounds
    unwanted = torch.zeros(size, dtype=torch.bool)
    young.feed(torch.tensor(ids[:size]), torch.tensor(ids[:size]), unwanted)
    old_seen = old.cache.tokens_seen
    times = np.zeros((rounds, 2))
    taken, end = 0, time.perf_counter() + MAX_TURN_SECONDS
    try:
        while taken < rounds and (taken < MIN_ROUNDS or time.perf_counter() < end):
            for which in (0, 1) if taken % 2 else (1, 0):
                began = time.perf_counter()
                (young, old)[which].step(ids[size + taken])
                times[taken, which] = time.perf_counter() - began
            taken += 1
    except Interrupted:
        if not taken:
            raise
    medians = np.median(times[:taken], axis=0)
    change = float(np.median(times[:taken, 1] / times[:taken, 0])) - 1
    return Turns(taken, size, old_seen, float(medians[0]), float(medians[1]), change)


def turns_seconds(step: float, rounds: int) -> float:
    """About how long `time_in_turns` takes, with ``step`` seconds for a token."""
    return min(MAX_TURN_SECONDS, 2 * rounds * step)


def _feed_chunks(
    method: Method, ids: Iterator[int], tokens: int, recorder: Recorder, on_progress: Callable[[], None]
) -> None:
    """Feed chunks of tokens. A token's output does not depend on the chunking, so neither do the losses."""
    for first, fed, targets in chunks(ids, tokens):
        losses = method.feed(fed, targets, torch.ones(len(fed), dtype=torch.bool)).losses
        for position, loss in enumerate(losses.tolist(), first):
            recorder.add(position, loss)
        on_progress()


def _feed_up_to_samples(
    method: Method, ids: Iterator[int], recorder: Recorder, on_progress: Callable[[], None]
) -> None:
    """Feed the tokens up to each sampled position, and predict only there."""
    last, done = next(ids), 0
    for position in recorder.samples.tolist():
        targets = list(islice(ids, position + 1 - done))
        fed, done = [last, *targets[:-1]], position + 1
        last = targets[-1]
        wanted = torch.tensor([False] * (len(fed) - 1) + [True])
        began = time.perf_counter()
        loss = float(method.feed(torch.tensor(fed), torch.tensor(targets), wanted).losses[-1])
        recorder.add(position, loss, time.perf_counter() - began)
        on_progress()
