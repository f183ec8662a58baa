"""Measurements along one stream, in memory that does not grow with it: per bucket, per sampled position, and times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_BUCKETS = 64
FIRST_BUCKET = 16
TIMES_PER_BUCKET = 64
MAX_TIMES = 10_000
MEMORY_INTERVAL = 32


def bucket_edges(tokens: int) -> np.ndarray:
    """First position of each bucket, and the end of the last: 0, then a geometric series from 16 on."""
    if tokens <= FIRST_BUCKET:
        return np.array([0, tokens])
    return np.concatenate(([0], np.unique(np.geomspace(FIRST_BUCKET, tokens, NUM_BUCKETS).round().astype(np.int64))))


def sample_positions(low: int, high: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to ``count`` positions in low .. high - 1: one random position from each of ``count`` equal intervals."""
    count = min(count, max(0, high - low))
    edges = low + np.arange(count + 1) * (high - low) // max(1, count)
    return rng.integers(edges[:-1], edges[1:]) if count else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Span:
    """Median time per token, in seconds, over ``tokens`` tokens from position ``begin`` on, if none was skipped."""

    begin: int
    tokens: int
    median: float


class Recorder:
    """Losses, times and memory of one stream, recorded token by token.

    All arrays are allocated and filled at the start, so that recording does not add to the resident memory.

    Args:
        tokens: recorded positions are in 0 .. tokens - 1; they come in order and may be skipped.
        full_at: position of the first token that finds the window full.
        samples: sorted positions whose losses are kept individually.
    """

    def __init__(self, tokens: int, full_at: int, samples: np.ndarray) -> None:
        self.full_at = full_at
        self.edges = bucket_edges(tokens)
        buckets = len(self.edges) - 1
        self.counts = np.full(buckets, 0, dtype=np.int64)
        self.loss_sums = np.full(buckets, 0.0)
        self.bucket_times = np.full((buckets, TIMES_PER_BUCKET), math.nan)
        self.resident = np.full(buckets, 0, dtype=np.int64)
        self.cache_bytes = np.full(buckets, 0, dtype=np.int64)
        self.samples = samples
        self.sample_losses = np.full(len(samples), math.nan)
        num_times = max(1, min(MAX_TIMES, (tokens - full_at) // 2))
        self.first_times = np.full(num_times, math.nan)
        self.last_times = np.full(num_times, math.nan)
        self.resident_when_full = self.max_resident = 0
        self.end = 0
        self.running_loss = math.nan
        self._bucket = 0
        self._sample = 0
        self._timed = 0

    def add(self, position: int, loss: float, seconds: float | None = None) -> None:
        """Record the loss, in nats, of the prediction made at ``position``, and the time it took."""
        while position >= self.edges[self._bucket + 1]:
            self._bucket += 1
        bucket = self._bucket
        if seconds is not None:
            self.bucket_times[bucket, self.counts[bucket] % TIMES_PER_BUCKET] = seconds
            if position >= self.full_at:
                if self._timed < len(self.first_times):
                    self.first_times[self._timed] = seconds
                self.last_times[self._timed % len(self.last_times)] = seconds
                self._timed += 1
        self.counts[bucket] += 1
        self.loss_sums[bucket] += loss
        self.running_loss = loss if math.isnan(self.running_loss) else 0.998 * self.running_loss + 0.002 * loss
        if self.is_sample(position):
            self.sample_losses[self._sample] = loss
            self._sample += 1
        self.end = position + 1

    @property
    def recorded(self) -> int:
        """Tokens recorded so far."""
        return int(self.counts.sum())

    def is_sample(self, position: int) -> bool:
        """Whether ``position``, not before the last one recorded, is the next of the samples."""
        return self._sample < len(self.samples) and bool(position == self.samples[self._sample])

    def memory_is_due(self) -> bool:
        """Whether to read the memory now: every 32 tokens, and when the window has just become full."""
        position = self.end - 1
        return position % MEMORY_INTERVAL == 0 or position == self.full_at

    def add_memory(self, resident: int, cache_bytes: int) -> None:
        """Record the resident memory of the process and the size of the KV cache, in bytes, after the last token."""
        position = self.end - 1
        self.resident[self._bucket], self.cache_bytes[self._bucket] = resident, cache_bytes
        if position == self.full_at:
            self.resident_when_full = self.max_resident = resident
        elif position > self.full_at:
            self.max_resident = max(self.max_resident, resident)

    @property
    def resident_growth(self) -> int:
        """Maximum resident memory since the window was full, minus that when it became full, in bytes."""
        return self.max_resident - self.resident_when_full

    def first_span(self) -> Span | None:
        """Times of the first tokens with a full window; None if there were none."""
        return self._span(self.first_times, self.full_at)

    def last_span(self) -> Span | None:
        """Times of the last tokens with a full window; None if there were none."""
        return self._span(self.last_times, self.end - min(self._timed, len(self.last_times)))

    def _span(self, times: np.ndarray, begin: int) -> Span | None:
        times = times[: self._timed]
        return Span(begin, len(times), float(np.median(times))) if len(times) else None

    def mean_loss(self, low: int, high: int) -> tuple[float, int] | None:
        """Mean loss and number of the recorded samples at positions low .. high - 1; None if there are none."""
        losses = self.sample_losses[(self.samples >= low) & (self.samples < high)]
        losses = losses[~np.isnan(losses)]
        return (float(losses.mean()), len(losses)) if len(losses) else None

    def series(self) -> list[dict[str, Any]]:
        """One entry for each bucket with tokens: mean loss, median of its last 64 times, last reading of the memory."""
        return [
            {
                "begin": int(self.edges[i]),
                "end": int(min(self.edges[i + 1], self.end)),
                "tokens": int(self.counts[i]),
                "loss": float(self.loss_sums[i] / self.counts[i]),
                "seconds": None if np.isnan(self.bucket_times[i]).all() else float(np.nanmedian(self.bucket_times[i])),
                "resident_bytes": int(self.resident[i]) or None,
                "kv_cache_bytes": int(self.cache_bytes[i]) or None,
            }
            for i in np.flatnonzero(self.counts)
        ]
