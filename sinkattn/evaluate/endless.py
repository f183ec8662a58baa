"""One stream through one cache, without a break: loss, memory and time of a token, stretch by stretch.

A position is the index in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from sinkattn.evaluate.demo import Turns, time_in_turns, turns_seconds
from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CacheSize, Streamed
from sinkattn.evaluate.perplexity import chunk_sizes, split
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks, Mean
from sinkattn.evaluate.text import TokenStream

# Tokens of a stretch that are fed one by one: one in 20, but not more than these.
TIMED_ONE_IN = 20
MAX_TIMED = 500


@dataclass(frozen=True)
class Settings:
    """Sizes, in tokens."""

    cache: CacheSize
    tokens: int
    """Length of the stream."""
    stretch: int
    """Length of a stretch; the last one may be shorter."""
    compile: bool = False
    """Whether decode steps are compiled."""

    @property
    def timed(self) -> int:
        """Tokens of a stretch that are fed one by one and timed; the others are fed in chunks."""
        return max(1, min(MAX_TIMED, self.stretch // TIMED_ONE_IN))

    def seconds(self, speed: Speed) -> float:
        """About how long `run` takes."""
        steps = math.ceil(self.tokens / self.stretch) * self.timed * speed.step
        fed = (self.tokens + self.cache.total) * speed.token
        return steps + fed + turns_seconds(speed.step, self.timed)

    def check(self) -> None:
        """Raise ValueError for stretches that have no tokens with a full window to time."""
        for name in ("tokens", "stretch"):
            if (size := getattr(self, name)) < 2 * self.cache.total:
                least = f"twice sinks + window ({2 * self.cache.total})"
                raise ValueError(f"{name}: expected at least {least}, got {size}")


@dataclass(frozen=True)
class Stretch:
    """The measurements of one stretch: positions begin .. end - 1."""

    begin: int
    end: int
    mean: Mean
    """Mean loss of all its tokens."""
    timed: int
    """Tokens that were timed: the first ones with a full window."""
    seconds: float | None
    """Their median time; None if there were none."""
    kv_bytes: int
    """Bytes of keys and values at the end of the stretch."""
    resident_bytes: int
    """Resident memory of the process there."""


@dataclass
class Result:
    """The measurements so far."""

    settings: Settings
    all: Blocks
    """Losses of the whole stream."""
    stretches: list[Stretch] = field(default_factory=list)
    turns: Turns | None = None
    """The old stream against a new one; None if the run was interrupted before."""


OnProgress = Callable[[int, float], None]
"""Called after every call of the model with the tokens done and the mean loss so far."""


def run(
    model: PreTrainedModel,
    stream: TokenStream,
    settings: Settings,
    on_progress: OnProgress,
    on_stretch: Callable[[Result], None],
    resident: Callable[[], int],
) -> Result:
    """Feed a stream through one cache, then time it against a new stream; the model is not changed.

    All that is kept of the tokens that have left the window is one entry for each stretch. The losses do not depend on
    how the stream is divided into calls.

    Args:
        model: a transformers causal language model that `sinkattn.enable` accepts, in evaluation mode.
        stream: the tokens.
        settings: sizes.
        on_progress: called after every call of the model.
        on_stretch: called after every stretch.
        resident: returns the resident memory of the process in bytes.

    Raises:
        ValueError: for sizes that leave nothing to time, an empty text, or a model or window that is refused.
        Interrupted: if it is raised in the first forward. Later it only ends the run early: the last stretch of the
            result is then what there was of it.
    """
    settings.check()
    method = Streamed(model, settings.cache, compile=settings.compile)
    result = Result(settings, Blocks(0, settings.tokens))
    ids = iter(stream)
    last, begin, done = next(ids), 0, 0
    try:
        while begin < settings.tokens:
            end = min(settings.tokens, begin + settings.stretch)
            timed_from = max(begin, settings.cache.total)
            timed = range(timed_from, min(end, timed_from + settings.timed))
            sizes = [*chunk_sizes(timed_from - begin), *[1] * len(timed), *chunk_sizes(end - timed.stop)]
            blocks, times = Blocks(begin, end), []
            try:
                for first, fed, targets in split(last, ids, begin, sizes):
                    began = time.perf_counter()
                    # The losses come back on the CPU, so the time is that of the whole forward.
                    losses = method.feed(fed, targets, torch.ones(len(fed), dtype=torch.bool)).losses.numpy()
                    if first in timed:
                        times.append(time.perf_counter() - began)
                    blocks.add(first, losses)
                    result.all.add(first, losses)
                    last, done = int(targets[-1]), first + len(fed)
                    on_progress(done, float(result.all.sums.sum()) / done)
            finally:
                if mean := blocks.mean():
                    seconds = float(np.median(times)) if times else None
                    result.stretches.append(
                        Stretch(begin, done, mean, len(times), seconds, method.kv_bytes, resident())
                    )
                    on_stretch(result)
            begin = end
        new = list(islice(stream, settings.cache.total + settings.timed))
        result.turns = time_in_turns(
            method, Streamed(model, settings.cache, compile=settings.compile), new, settings.timed
        )
    except Interrupted:
        if not done:
            raise
    return result
