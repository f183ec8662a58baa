"""Means along a stream and how sure they are, in memory that does not grow with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

# Many blocks tell the spread of their means well, long ones depend less on each other.
BLOCKS = 32
BLOCK_TOKENS = 32


def perplexity(loss: float) -> float:
    """Exponential of a mean loss in nats, as far as a float holds it."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class Mean:
    """A mean loss in nats per token over ``tokens`` tokens, and half the width of its 95 % confidence interval."""

    tokens: int
    loss: float
    margin: float | None
    """None where there are too few tokens to tell."""

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return perplexity(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "perplexity": self.perplexity}


class Sums:
    """Sums of losses over stretches of a stream.

    Args:
        edges: first positions of the stretches, in order, and the end of the last.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, dtype=np.int64)
        self.sums = np.zeros(len(edges) - 1)

    def add(self, first: int, losses: np.ndarray) -> None:
        """Add the losses of positions first, first + 1, ...; NaN for those that have none."""
        places = np.searchsorted(self.edges, first + np.arange(len(losses)), side="right") - 1
        counted = (places >= 0) & (places < len(self.sums)) & ~np.isnan(losses)
        self.counts += np.bincount(places[counted], minlength=len(self.counts))
        self.sums += np.bincount(places[counted], losses[counted], minlength=len(self.sums))

    def means(self) -> list[tuple[int, int, int, float]]:
        """First position, end, number of losses and their mean, of every stretch that got any."""
        return [
            (int(self.edges[i]), int(self.edges[i + 1]), int(self.counts[i]), float(self.sums[i] / self.counts[i]))
            for i in np.flatnonzero(self.counts)
        ]


class Blocks(Sums):
    """Sums of losses over up to 32 equal blocks of the positions begin .. end - 1, of 32 or more each.

    Neighbouring losses depend on each other, so the spread of single losses says too little; means over long blocks
    hardly do, and the confidence interval is taken from these (the method of batch means).
    """

    def __init__(self, begin: int, end: int) -> None:
        blocks = max(1, min(BLOCKS, (end - begin) // BLOCK_TOKENS))
        super().__init__(begin + np.arange(blocks + 1) * (end - begin) // blocks)

    def mean(self) -> Mean | None:
        """Mean over all that was added; None if nothing was."""
        return _mean(self.counts, self.sums)

    def difference(self, other: Blocks) -> Mean | None:
        """Mean of self - other, block by block. Raises ValueError if they did not get the same numbers of losses."""
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
        # Blocks weigh as many tokens as they got (a ratio estimate), so that a short last one does no harm.
        residuals = sums[filled] - mean * counts[filled]
        error = math.sqrt(float((residuals**2).sum()) * blocks / (blocks - 1)) / total
        margin = float(stats.t.ppf(0.975, blocks - 1)) * error
    return Mean(total, mean, margin)
