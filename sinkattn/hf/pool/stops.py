"""What ends a generation: `StopStrings` ends a text that comes in pieces where one of several is complete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral

from sinkattn.argument_checks import check_kind


class StopStrings:
    """Passes text on as far as it cannot be the beginning of a stop string.

    Attributes:
        found: whether one is complete; the text ends before it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Add a piece of text; returns the text that is certain."""
        text = self._held + piece
        ends = [index for string in self._strings if (index := text.find(string)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        begun = [n for string in self._strings for n in range(1, len(string)) if text.endswith(string[:n])]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """The text that was held back, at the end."""
        rest, self._held = self._held, ""
        return rest


def each_stop(stop: Collection[int | str]) -> list[int | str]:
    """Ids and texts that end a generation; raises ValueError for anything else, which would never end it."""
    check_kind("stop", stop, Collection, "a collection of ids and texts")
    each: list[int | str] = [stop] if isinstance(stop, str) else [*stop]
    if others := [x for x in each if not isinstance(x, (str, Integral))]:
        raise ValueError(f"stop: expected ids and texts, got {others[0]!r}")
    return each
