"""Mean losses along a stream and their confidence intervals, in memory that does not grow with the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

# More blocks give a better estimate of the spread of their means; longer blocks are less correlated.
NUM_BLOCKS = 32
BLOCK_TOKENS = 32


def perplexity(loss: float) -> float:
    """Exponential of a mean loss in nats; the loss is capped so that the result is finite."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Mean:
    """A mean loss, in nats per token, over ``tokens`` tokens."""

    tokens: int
    loss: float
    margin: float | None
    """Half the width of the 95 % confidence interval; None if there are too few blocks to estimate it."""

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return perplexity(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """As a dictionary of plain types."""
        return {**asdict(self), "perplexity": self.perplexity}


class Sums:
    """Sums of losses over intervals of positions.

    Args:
        edges: first position of each interval, in order, and the end of the last.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, dtype=np.int64)
        self.sums = np.zeros(len(edges) - 1)

    def add(self, first: int, losses: np.ndarray) -> None:
        """Add the losses of positions first, first + 1, ...; NaN where there is no loss."""
        intervals = np.searchsorted(self.edges, first + np.arange(len(losses)), side="right") - 1
        counted = (intervals >= 0) & (intervals < len(self.sums)) & ~np.isnan(losses)
        self.counts += np.bincount(intervals[counted], minlength=len(self.counts))
        self.sums += np.bincount(intervals[counted], losses[counted], minlength=len(self.sums))

    def means(self) -> list[tuple[int, int, int, float]]:
        """First position, end, number of losses and mean loss of every interval that has losses."""
        return [
            (int(self.edges[i]), int(self.edges[i + 1]), int(self.counts[i]), float(self.sums[i] / self.counts[i]))
            for i in np.flatnonzero(self.counts)
        ]


class Blocks(Sums):
    """Sums of losses over up to 32 equal blocks of the positions begin .. end - 1, each of 32 positions or more.

    Confidence intervals are by the method of batch means: losses of neighbouring tokens are correlated, so an interval
    from single losses would be too narrow; means over long blocks are nearly independent.

    Args:
        begin: first position.
        end: the one after the last.
        unit: blocks begin at multiples of so many positions from ``begin`` on, for losses that come as their means.
    """

    def __init__(self, begin: int, end: int, unit: int = 1) -> None:
        blocks = max(1, min(NUM_BLOCKS, (end - begin) // max(BLOCK_TOKENS, unit)))
        edges = np.arange(blocks + 1) * (end - begin) // blocks // unit * unit
        edges[-1] = end - begin
        super().__init__(begin + edges)

    @classmethod
    def join(cls, parts: Sequence[Blocks], most: int = NUM_BLOCKS) -> Blocks:
        """The losses of neighbouring parts of a stream, in at most ``most`` blocks that are made of theirs."""
        counts, sums = (np.concatenate([getattr(part, name) for part in parts]) for name in ("counts", "sums"))
        firsts = np.concatenate([part.edges[:-1] for part in parts])
        starts = np.unique(np.arange(most) * len(sums) // most)
        joined = cls.__new__(cls)
        joined.edges = np.append(firsts[starts], parts[-1].edges[-1])
        joined.counts, joined.sums = np.add.reduceat(counts, starts), np.add.reduceat(sums, starts)
        return joined

    def mean(self) -> Mean | None:
        """Mean over all losses; None if there are none."""
        return _mean(self.counts, self.sums)

    def difference(self, other: Blocks) -> Mean | None:
        """Mean of self - other, paired by block. Raises ValueError if any block has another number of losses."""
        if not np.array_equal(self.counts, other.counts):
            raise ValueError("difference: expected losses at the same positions")
        return _mean(self.counts, self.sums - other.sums)


def _mean(counts: np.ndarray, sums: np.ndarray) -> Mean | None:
    filled = counts > 0
    if not filled.any():
        return None
    total = int(counts.sum())
    mean = float(sums.sum() / total)
    blocks = int(filled.sum())
    margin = None
    if blocks > 7:
        # A ratio estimate: blocks are weighted by their number of tokens, which may differ.
        residuals = sums[filled] - mean * counts[filled]
        error = math.sqrt(float((residuals**2).sum()) * blocks / (blocks - 1)) / total
        margin = float(stats.t.ppf(0.975, blocks - 1)) * error
    return Mean(total, mean, margin)
