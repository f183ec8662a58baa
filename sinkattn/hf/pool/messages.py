"""Eviction by whole messages: where the window of a token begins."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


class Messages:
    """Messages of a stream that may still be in sight.

    A token sees no part of an earlier message without the rest of it: its window begins with the first message of which
    it sees all. The tokens that are fed together at the beginning of a message, and those for which it makes room, have
    one window, that of the last of them, so that they need only one forward. Of its own message, if that is longer than
    the window, a token sees the last tokens. What follows the sinks is a message in any case.

    Args:
        num_sinks: tokens that are always in sight.
        window: the most tokens of a window.
        kept: how many tokens more than that a stream may be rolled back.
    """

    def __init__(self, num_sinks: int, window: int, kept: int) -> None:
        self._num_sinks, self._window, self._kept = num_sinks, window, kept
        self._begins = [num_sinks]
        self._ends = [num_sinks]
        """For each message the token after those that have one window at its beginning; they never decrease."""

    @property
    def begins(self) -> list[int]:
        """Tokens with which messages begin that may still be in sight."""
        return [*self._begins]

    @property
    def ends(self) -> list[int]:
        """For each of them the token after those that have one window at its beginning; some may still have to come."""
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
            count: tokens that have one window, this one the first.
            seen: tokens in memory.
        """
        if token <= self._num_sinks:
            self._ends[0] = max(self._ends[0], token + count)
            return
        # What an earlier message has made room for has that window, also if it is a message of its own.
        end = max([token + count, *self._ends[-1:]])
        first = bisect_left(self._begins, seen - self._window - self._kept)
        self._begins, self._ends = [*self._begins[first:], token], [*self._ends[first:], end]

    def rollback(self, tokens: int) -> None:
        """So many tokens are left."""
        count = bisect_left(self._begins, max(tokens, self._num_sinks + 1))
        self._begins = self._begins[:count]
        self._ends = [min(end, max(tokens, self._num_sinks)) for end in self._ends[:count]]

    def _own(self, token: int) -> int:
        """Index of the message of a token; -1 if it is in none."""
        return bisect_right(self._begins, token) - 1

    def _first_seen(self, token: int, own: int) -> int:
        """Index of the first message of which a token of message ``own`` sees all; ``own`` if there is none."""
        last = max(token, self._ends[own] - 1)
        return min(bisect_left(self._begins, last - self._window + 1), own)

    def window_begin(self, token: int) -> int:
        """First token that the window of a token may hold; 0 without a limit."""
        own = self._own(token)
        begin = self._begins[self._first_seen(token, own)] if own >= 0 else self._num_sinks
        return 0 if begin == self._num_sinks else begin

    def _next_change(self, token: int) -> int | None:
        """The next token whose window may begin with another message; None if there is none."""
        own = self._own(token)
        later = self._begins[own + 1 : own + 2]
        if own >= 0 and token < self._ends[own] - 1:
            later.append(self._ends[own])
        elif own >= 0 and (first := self._first_seen(token, own)) < own:
            later.append(self._begins[first] + self._window)
        return min(later, default=None)

    def run_length(self, token: int, limit: int) -> int:
        """How many tokens from this one on have windows with the same `window_begin`; at most ``limit``."""
        begin, end = self.window_begin(token), token
        while (change := self._next_change(end)) is not None and change - token < limit:
            if self.window_begin(change) != begin:
                return change - token
            end = change
        return limit
