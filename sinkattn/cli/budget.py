"""Default sizes that end within a number of minutes, and the estimate that is told before a measurement starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

from sinkattn.cli.arguments import positive
from sinkattn.cli.formatting import duration_text

# Shares of the usual work, to be tried in this order.
SHARES = tuple(mantissa / 10**power for power in (1, 2, 3) for mantissa in (10, 8, 6, 5, 4, 3, 2, 1.5))
TOLD_SECONDS = 60.0
# Fewer losses give no useful interval.
MIN_COUNTED = 512

Sizes = TypeVar("Sizes")


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """Add the time that sizes which are not given are chosen for."""
    parser.add_argument(
        "--minutes",
        type=positive,
        default=4,
        metavar="N",
        help="a slow model gets smaller default sizes, so that it takes about so long (default: %(default)s)",
    )


def stream_length(usual: int, share: float, full: int) -> int:
    """A share of the usual length of a stream, but enough beyond the ``full`` tokens after which losses count."""
    return max(round(usual * share), full + max(full, MIN_COUNTED))


def choose(candidates: Iterable[Sizes], seconds: Callable[[Sizes], float], minutes: int) -> Sizes:
    """The first of the candidates that ends within ``minutes``, or the last; says how long it takes if that is long.

    Args:
        candidates: sizes, from the usual ones down to the smallest.
        seconds: estimates the time of a candidate.
        minutes: the time that there is.
    """
    sizes = [*candidates]
    chosen = next((each for each in sizes if seconds(each) <= 60 * minutes), sizes[-1])
    if (estimate := seconds(chosen)) >= TOLD_SECONDS:
        fewer = "" if chosen == sizes[0] else ", with smaller sizes than usual so that it ends sooner (see --minutes)"
        print(f"This takes about {duration_text(estimate)}{fewer}. Ctrl-C keeps what was measured.", file=sys.stderr)
    return chosen
