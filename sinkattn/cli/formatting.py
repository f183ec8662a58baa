"""Numbers and notes as text, and the console that tables are printed to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def size_text(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def count_text(number: int, noun: str) -> str:
    """A number with a noun, in the plural if need be."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def range_text(numbers: Iterable[int], noun: str) -> str:
    """Several numbers with their noun: from the smallest to the largest, or the one that they all are."""
    lowest, highest = min(numbers := [*numbers]), max(numbers)
    return count_text(highest, noun) if lowest == highest else f"{lowest:,} to {count_text(highest, noun)}"


def duration_text(seconds: float) -> str:
    """How long something takes, rounded: in seconds below a minute and a half, then in minutes, then in hours."""
    if seconds < 90:
        return count_text(round(seconds), "second")
    if seconds < 90 * 60:
        return count_text(round(seconds / 60), "minute")
    return count_text(round(seconds / 3600), "hour")


def percent_text(share: float | None) -> str:
    """A fraction in percent; ``none`` for None."""
    return "none" if share is None else f"{share:.1%}"


def restart_lines(text: dict[str, Any]) -> list[str]:
    """A note that the text was started over, if it was; ``text`` is that of a report."""
    restarts = text["started_over"]
    if not restarts:
        return []
    return [f"The text was shorter than the stream: it was started over {count_text(restarts, 'time')}."]


def turns_line(turns: dict[str, Any]) -> str:
    """The times of an old and a new stream; ``turns`` is that of a report."""
    return (
        f"In turns with a new stream, so that other work on the machine slows both ({turns['rounds']:,} tokens each): "
        f"{turns['young'] * 1e3:.3f} ms from token {turns['young_seen']:,} on, {turns['old'] * 1e3:.3f} ms from token "
        f"{turns['old_seen']:,} on; {turns['change']:+.1%}."
    )


def captioned_table() -> Table:
    """An empty rich table whose caption is plain and aligned left."""
    from rich.table import Table

    return Table(header_style="bold", caption_justify="left", caption_style="")


def console(stderr: bool = False) -> Console:
    """A rich console; 150 columns wide where the output is not a terminal, so that tables fit."""
    from rich.console import Console

    out = Console(stderr=stderr, highlight=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=150)
