"""Mean loss and perplexity along a stream, for every method over the same tokens, and what a token costs.

A position is the place in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from sinkattn.evaluate.methods import CHUNK, CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.statistics import Blocks, Sums
from sinkattn.recorder import bucket_edges
from sinkattn.text import TokenStream

TIMED = 200


@dataclass(frozen=True)
class Settings:
    """What to run; all sizes in tokens."""

    caches: tuple[CacheSize, ...]
    tokens: int = 50_000
    dense_tokens: int = 5_000
    """The dense model stops after so many; 0 leaves it out."""
    recompute_every: int = 16
    """Recomputation is scored at every so-manieth position; 0 leaves it out."""

    @property
    def begin(self) -> int:
        """First position that counts: there the widest window is full."""
        return max(cache.total for cache in self.caches)

    @property
    def dense_end(self) -> int:
        """Where the dense model stops."""
        return min(self.tokens, self.dense_tokens)

    def check(self) -> None:
        """Raise ValueError for sizes that leave nothing to compare."""
        if not self.caches:
            raise ValueError("cache: expected at least one")
        for name in ("tokens", "dense_tokens"):
            size = getattr(self, name)
            if size <= self.begin and (size or name == "tokens"):
                raise ValueError(f"{name}: expected more than sinks + window ({self.begin}), got {size}")
        if not 0 <= self.recompute_every <= self.tokens - self.begin:
            most = self.tokens - self.begin
            raise ValueError(f"recompute_every: expected 0 to {most}, or no token is hit, got {self.recompute_every}")


@dataclass
class Track:
    """What was measured of a method."""

    method: Method
    all: Blocks
    """Every loss from where the widest window is full."""
    early: Blocks
    """The same up to where the dense model stopped."""
    sampled: Blocks
    """The losses at the positions that recomputation is scored at."""
    series: Sums
    end: int = 0
    seconds: float | None = None
    """Median time of a token at the end of the stream."""
    kv_bytes: int | None = None


@dataclass
class Result:
    """What an evaluation found; the tracks in the order of the table."""

    settings: Settings
    tracks: list[Track] = field(default_factory=list)

    def recomputed(self, track: Track) -> Track | None:
        """Recomputation of as many tokens as a streamed method sees; None if there is none."""
        if not isinstance(track.method, Streamed):
            return None
        matches = (
            other
            for other in self.tracks
            if isinstance(other.method, Recomputed) and other.method.size == track.method.size.total
        )
        return next(matches, None)


Watch = Callable[[int, list[Track]], bool]
"""Called after every chunk with the tokens done and the tracks so far; says whether to go on."""


def run(model: PreTrainedModel, stream: TokenStream, settings: Settings, watch: Watch) -> Result:
    """Run all methods side by side over one reading of the stream; the model is not changed.

    Memory stays the same however long the stream, but for the dense model's cache. Tokens are fed in chunks, which for
    `sinkattn` gives the losses of single ones.

    Args:
        model: a transformers causal language model in evaluation mode.
        stream: the tokens.
        settings: methods and sizes.
        watch: is told of progress, and may end the stream early; the settings of the result say where it ended.

    Raises:
        ValueError: for settings that leave nothing to compare, an empty text, or a model or window that is refused.
        KeyboardInterrupt: if the stream is ended before any loss counts.
    """
    settings.check()
    streamed = [Streamed(model, cache) for cache in settings.caches]
    if (limit := dense_limit(streamed[0])) is not None and limit <= settings.dense_tokens:
        # One position is kept for the token that is timed.
        settings = replace(settings, dense_tokens=limit - 1 if limit - 1 > settings.begin else 0)
    methods: list[Method] = [*streamed]
    if settings.recompute_every:
        start = stream.start_token
        methods += [Recomputed(model, total, start) for total in sorted({cache.total for cache in settings.caches})]
    if settings.dense_tokens:
        methods.append(Dense(model))
    begin, tokens, dense_end = settings.begin, settings.tokens, settings.dense_end or settings.tokens

    result = Result(settings)
    for method in methods:
        blocks = Blocks(begin, tokens), Blocks(begin, dense_end), Blocks(begin, tokens)
        result.tracks.append(Track(method, *blocks, Sums(bucket_edges(tokens))))
    for first, fed, targets in chunks(iter(stream), tokens):
        positions = np.arange(first, first + len(fed))
        sampled = (positions >= begin) & (positions % max(1, settings.recompute_every) == 0)
        wanted = torch.from_numpy(sampled)
        for track in result.tracks:
            most = settings.dense_end - first if isinstance(track.method, Dense) else len(fed)
            if most <= 0:
                continue
            losses = track.method.feed(fed[:most], targets[:most], wanted[:most]).losses.numpy()
            track.all.add(first, losses)
            track.early.add(first, losses)
            track.series.add(first, losses)
            track.sampled.add(first, np.where(sampled[:most], losses, np.nan))
            track.end = first + len(losses)
        if not watch(first + len(fed), result.tracks):
            result.settings = replace(settings, tokens=first + len(fed))
            break
    if result.settings.tokens <= begin:
        raise KeyboardInterrupt
    for track in result.tracks:
        track.kv_bytes = track.method.kv_bytes
    seconds = time_in_turns([track.method for track in result.tracks], int(fed[-1]), TIMED)
    for track, each in zip(result.tracks, seconds, strict=True):
        track.seconds = each
    return result


def chunks(ids: Iterator[int], tokens: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The first ``tokens`` tokens in chunks: position of the first, the chunk, and the token after each of it."""
    last = next(ids)
    for first in range(0, tokens, CHUNK):
        targets = torch.tensor(list(islice(ids, min(CHUNK, tokens - first))))
        yield first, torch.cat((torch.tensor([last]), targets[:-1])), targets
        last = int(targets[-1])


def time_in_turns(methods: list[Method], token: int, rounds: int) -> list[float]:
    """Median seconds of a step of each method, taken in turns, so that other work on the machine slows all alike.

    Each takes a step before the one that is timed: on a stream of its own, too, it would find in the processor's caches
    what its last token left there, not what another method did.
    """
    times = np.zeros((rounds, len(methods)))
    for turn in range(rounds):
        for which in range(len(methods)) if turn % 2 else reversed(range(len(methods))):
            methods[which].step(token)
            began = time.perf_counter()
            methods[which].step(token)
            times[turn, which] = time.perf_counter() - began
    return np.median(times, axis=0).tolist()
