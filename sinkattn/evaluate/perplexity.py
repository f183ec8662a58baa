"""Mean loss and perplexity along a stream, for all methods over the same tokens, and their time per token.

A position is the index in the stream of the token that is fed; its loss is that of predicting the next token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedModel

from sinkattn.evaluate.eight_bit import EightBit
from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CHUNK_TOKENS, CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.recorder import bucket_edges
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks, Sums
from sinkattn.evaluate.text import TokenStream
from sinkattn.ring_cache import CacheDtype

NUM_TIMED = 200
MAX_TIMED_SECONDS = 30.0
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """Methods and sizes to run; all sizes in tokens."""

    caches: tuple[CacheSize, ...]
    tokens: int = 50_000
    dense_tokens: int = 5_000
    """The dense model stops after this many tokens; 0 leaves it out."""
    recompute_every: int = 16
    """Recomputation is scored at every position that is a multiple of this; 0 leaves it out."""
    cache_dtypes: tuple[CacheDtype, ...] = ()
    """Dtypes of 8 bits: every cache also runs in each of them."""

    @property
    def begin(self) -> int:
        """First position whose loss counts; all caches are full there."""
        return max(cache.total for cache in self.caches)

    @property
    def dense_end(self) -> int:
        """Position at which the dense model stops."""
        return min(self.tokens, self.dense_tokens)

    @property
    def recomputed_sizes(self) -> list[int]:
        """Tokens of a recomputation: one size for each total of sinks and window."""
        return sorted({cache.total for cache in self.caches}) if self.recompute_every else []

    def seconds(self, speed: Speed) -> float:
        """About how long `run` takes."""
        streamed = len(self.caches) * (1 + len(self.cache_dtypes))
        fed = streamed * self.tokens + self.dense_end
        recomputation = sum(map(speed.forward, self.recomputed_sizes))
        sampled = (self.tokens - self.begin) // max(1, self.recompute_every)
        step = (streamed + bool(self.dense_tokens)) * speed.step + recomputation
        return fed * speed.token + sampled * recomputation + timing_seconds(step, NUM_TIMED, MAX_TIMED_SECONDS)

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
    """The measurements of one method."""

    method: Method
    all: Blocks
    """Losses from `Settings.begin` on."""
    early: Blocks
    """The same, up to `Settings.dense_end`."""
    sampled: Blocks
    """Losses at the positions where recomputation is scored."""
    series: Sums
    """Losses by bucket, for a plot along the stream."""
    sampled_series: Sums
    """The same at the positions where recomputation is scored."""
    divergences: Blocks
    """Of an `EightBit`, from `Settings.begin` on: KL divergences from the cache of full precision, in nats."""
    end: int = 0
    """Tokens fed."""
    seconds: float | None = None
    """Median time per token at the end of the stream; None if the run was interrupted before."""
    kv_bytes: int | None = None
    """Bytes of keys and values at the end of the stream; None for a method without a KV cache."""


@dataclass
class Result:
    """The measurements of all methods, in the order of the table."""

    settings: Settings
    tracks: list[Track] = field(default_factory=list)
    rounds: int = 0
    """Tokens of each method that were timed."""

    def recomputed(self, track: Track) -> Track | None:
        """Recomputation over as many tokens as a streamed method sees; None if it was not run."""
        if not isinstance(track.method, Streamed):
            return None
        matches = (
            other
            for other in self.tracks
            if isinstance(other.method, Recomputed) and other.method.size == track.method.size.total
        )
        return next(matches, None)

    def whole(self, track: Track) -> Track | None:
        """The cache of full precision that one of 8 bits is compared with; None for other methods."""
        method = track.method
        return next((x for x in self.tracks if isinstance(method, EightBit) and x.method is method.whole), None)

    def estimates(self, track: Track) -> list[tuple[int, int, int, float]]:
        """Losses of recomputation by bucket: begin, end, number of scored tokens, loss.

        A bucket has too few scored tokens for a mean of their losses. But recomputation and a streamed method differ
        little at each token, so this is the loss of the method over all tokens, plus the mean of the differences.
        """
        references = [other for other in self.tracks if self.recomputed(other) is track]
        if not references:
            return []
        every, sampled = references[-1].series, references[-1].sampled_series
        losses = {begin: loss for begin, _, _, loss in every.means()}
        differences = {begin: loss for begin, _, _, loss in sampled.means()}
        return [
            (begin, end, tokens, losses[begin] + loss - differences[begin])
            for begin, end, tokens, loss in track.series.means()
        ]


OnProgress = Callable[[int, list[Track]], None]
"""Called after every chunk with the tokens done and the tracks so far."""


def run(model: PreTrainedModel, stream: TokenStream, settings: Settings, on_progress: OnProgress) -> Result:
    """Feed the stream to all methods, chunk by chunk; the model is not changed.

    Nothing that is kept grows with the stream, except the dense model's cache. The losses of `sinkattn` do not depend
    on the size of the chunks.

    Args:
        model: a transformers causal language model in evaluation mode.
        stream: the tokens.
        settings: methods and sizes.
        on_progress: called after every chunk.

    Raises:
        ValueError: for settings that leave nothing to compare, an empty text, or a model or window that is refused.
        Interrupted: if it is raised in a forward before any loss counts. Later it only ends the stream early:
            ``settings.tokens`` of the result is then where it ended.
    """
    settings.check()
    streamed = [Streamed(model, cache) for cache in settings.caches]
    if (limit := dense_limit(streamed[0])) is not None and limit <= settings.dense_tokens:
        # The last position is reserved for the token that is timed.
        settings = replace(settings, dense_tokens=limit - 1 if limit - 1 > settings.begin else 0)
    methods: list[Method] = []
    for whole in streamed:
        methods += [whole, *(EightBit(model, whole, dtype) for dtype in settings.cache_dtypes)]
    if settings.recompute_every:
        start = stream.start_token
        methods += [Recomputed(model, total, start) for total in settings.recomputed_sizes]
    if settings.dense_tokens:
        methods.append(Dense(model))
    begin, tokens, dense_end = settings.begin, settings.tokens, settings.dense_end or settings.tokens

    result = Result(settings)
    for method in methods:
        blocks = Blocks(begin, tokens), Blocks(begin, dense_end), Blocks(begin, tokens)
        series = Sums(bucket_edges(tokens)), Sums(bucket_edges(tokens))
        result.tracks.append(Track(method, *blocks, *series, Blocks(begin, tokens)))
    done = 0
    try:
        for first, fed, targets in chunks(iter(stream), tokens):
            positions = np.arange(first, first + len(fed))
            sampled = (positions >= begin) & (positions % max(1, settings.recompute_every) == 0)
            wanted = torch.from_numpy(sampled)
            scores = []
            for track in result.tracks:
                count = settings.dense_end - first if isinstance(track.method, Dense) else len(fed)
                if count > 0:
                    scores.append((track, track.method.feed(fed[:count], targets[:count], wanted[:count])))
            # Only after all forwards: an interrupted chunk counts for no method.
            for track, (each, _) in scores:
                losses = each.numpy()
                track.all.add(first, losses)
                track.early.add(first, losses)
                track.series.add(first, losses)
                at_sampled = np.where(sampled[: len(losses)], losses, np.nan)
                track.sampled.add(first, at_sampled)
                track.sampled_series.add(first, at_sampled)
                if isinstance(track.method, EightBit):
                    track.divergences.add(first, track.method.divergences.numpy())
                track.end, track.kv_bytes = first + len(losses), track.method.kv_bytes
            done = first + len(fed)
            on_progress(done, result.tracks)
        timing = time_interleaved([track.method for track in result.tracks], int(fed[-1]), NUM_TIMED, MAX_TIMED_SECONDS)
    except Interrupted:
        if done <= begin:
            raise
        result.settings = replace(settings, tokens=done)
        return result
    result.rounds = timing.rounds
    for track, seconds in zip(result.tracks, timing.seconds, strict=True):
        track.seconds = seconds
    return result


def chunks(ids: Iterator[int], tokens: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Split the first ``tokens`` tokens: position of the chunk, its tokens, and the token after each of them."""
    return split(next(ids), ids, 0, chunk_sizes(tokens))


def chunk_sizes(tokens: int) -> Iterator[int]:
    """Sizes of the chunks in which ``tokens`` tokens are fed."""
    return (min(CHUNK_TOKENS, tokens - first) for first in range(0, tokens, CHUNK_TOKENS))


def split(
    last: int, ids: Iterator[int], first: int, sizes: Iterable[int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Split a stream from position ``first`` on, whose token is ``last``, into parts of these sizes, as `chunks`."""
    for size in sizes:
        targets = torch.tensor(list(islice(ids, size)))
        yield first, torch.cat((torch.tensor([last]), targets[:-1])), targets
        first, last = first + size, int(targets[-1])


@dataclass(frozen=True)
class Timing:
    """Times of the steps of several methods, in the order of the methods."""

    seconds: list[float]
    """Median of each method."""
    rounds: int
    """Steps of each method that were timed."""


def time_interleaved(methods: list[Method], token: int, rounds: int, max_seconds: float = math.inf) -> Timing:
    """Time steps of each method. Steps are interleaved, so that other load slows all methods alike.

    Each timed step follows an untimed one of the same method, which refills the processor's caches as in a stream of
    that method alone.

    Args:
        methods: the methods.
        token: the token that is fed.
        rounds: steps of each method to time.
        max_seconds: take no further rounds after so long, but three at least.

    Raises:
        Interrupted: if it is raised in the first round. Later it only ends the rounds.
    """
    times = np.zeros((rounds, len(methods)))
    taken, end = 0, time.perf_counter() + max_seconds
    try:
        while taken < rounds and (taken < MIN_ROUNDS or time.perf_counter() < end):
            for which in range(len(methods)) if taken % 2 else reversed(range(len(methods))):
                methods[which].step(token)
                began = time.perf_counter()
                methods[which].step(token)
                times[taken, which] = time.perf_counter() - began
            taken += 1
    except Interrupted:
        if not taken:
            raise
    return Timing(np.median(times[:taken], axis=0).tolist(), taken)


def timing_seconds(step: float, rounds: int, max_seconds: float) -> float:
    """About how long `time_interleaved` takes, with ``step`` seconds for a step of all methods together."""
    return min(2 * step * rounds, max(max_seconds, 2 * step * MIN_ROUNDS))
