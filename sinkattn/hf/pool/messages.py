"""Eviction by whole messages: where the window of a token begins."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


class Messages:
    """Messages of a stream that may still be in sight.

    A token sees no part of an earlier message without the rest of it: its window begins with the first message of which
    it sees all. The tokens that are fed together at the beginning of a message have one window, that of the last of
    them, so that they need only one forward. Of its own message, if that is longer than the window, a token sees the
    last tokens. What follows the sinks is a message in any case.

    Args:
        num_sinks: tokens that are always in sight.
        window: the most tokens of a window.
        kept: how many tokens more than that a stream may be rolled back.
    """

    def __init__(self, num_sinks: int, window: int, kept: int) -> None:
        self._num_sinks, self._window, self._kept = num_sinks, window, kept
        self._begins = [num_sinks]
        self._ends = [num_sinks]
        """For each message the token after those that were fed together at its beginning."""

    @property
    def begins(self) -> list[int]:
        """Tokens with which messages begin that may still be in sight."""
        return [*self._begins]

    @property
    def ends(self) -> list[int]:
        """For each of them the token after those that were fed together at its beginning."""
        return [*self._ends]

    def restore(self, begins: Sequence[int], ends: Sequence[int]) -> None:
        """Replace `begins` and `ends`."""
        self._begins, self._ends = [*begins], [*ends]

    def emptied(self) -> Messages:
        """The same without messages."""
        return Messages(self._num_sinks, self._window, self._kept)

    def begin(self, token: int, count: int, seen: int) -> None:
        """A message begins with this token, which may still wait.

        Args:
            token: its number.
            count: tokens that are fed together, this one the first.
            seen: tokens in memory.
        """
        if token <= self._num_sinks:
            self._ends[0] = max(self._ends[0], token + count)
            return
        first = bisect_left(self._begins, seen - self._window - self._kept)
        self._begins, self._ends = [*self._begins[first:], token], [*self._ends[first:], token + count]

    def rollback(self, tokens: int) -> None:
        """So many tokens are left."""
        count = bisect_left(self._begins, max(tokens, self._num_sinks + 1))
        self._begins = self._begins[:count]
        self._ends = [min(end, max(tokens, self._num_sinks)) for end in self._ends[:count]]

    def _first_seen(self, token: int) -> int | None:
        """Beginning of the first message of which a token sees all; None if it does not even see all of its own."""
        own = bisect_right(self._begins, token) - 1
        last = token if own < 0 else max(token, self._ends[own] - 1)
        first = bisect_left(self._begins, last - self._window + 1)
        return self._begins[first] if first <= own else None

    def window_begin(self, token: int) -> int:
        """First token that the window of a token may hold; 0 without a limit."""
        first = self._first_seen(token)
        return 0 if first is None or first == self._num_sinks else first

    def _next_change(self, token: int) -> int | None:
        """The next token whose window may begin with another message; None if there is none."""
        own = bisect_right(self._begins, token) - 1
        later = self._begins[own + 1 : own + 2]
        if own >= 0 and token < self._ends[own] - 1:
            later.append(self._ends[own])
        elif (first := self._first_seen(token)) is not None:
            later.append(first + self._window)
        return min(later, default=None)

    def run_length(self, token: int, limit: int) -> int:
        """How many tokens from this one on have windows with the same `window_begin`; at most ``limit``."""
        begin, end = self.window_begin(token), token
        while (change := self._next_change(end)) is not None and change - token < limit:
            if self.window_begin(change) != begin:
                return change - token
            end = change
        return limit
