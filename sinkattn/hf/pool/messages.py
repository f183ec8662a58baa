"""Eviction by whole messages: where the window of a token begins."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Messages:
    """Beginnings of the messages of a stream that may still be in sight.

    A token sees no part of a message without the rest of it: its window begins with the first message of which it sees
    all. Only of the message that it belongs to, if that is longer than the window, it sees the last tokens. What
    follows the sinks is a message in any case.

    Args:
        num_sinks: tokens that are always in sight.
        window: the most tokens of a window.
        kept: how many tokens more than that a stream may be rolled back.
    """

    def __init__(self, num_sinks: int, window: int, kept: int) -> None:
        self._num_sinks, self._window, self._kept = num_sinks, window, kept
        self._begins = [num_sinks]

    @property
    def begins(self) -> list[int]:
        """Tokens with which messages begin that may still be in sight."""
        return [*self._begins]

    def restore(self, begins: Sequence[int]) -> None:
        """Replace `begins`."""
        self._begins = [*begins]

    def emptied(self) -> Messages:
        """The same without messages."""
        return Messages(self._num_sinks, self._window, self._kept)

    def begin(self, token: int, seen: int) -> None:
        """A message begins with this token, which may still wait; ``seen`` tokens are in memory."""
        if token > self._num_sinks:
            self._begins = [*self._begins[bisect_left(self._begins, seen - self._window - self._kept) :], token]

    def rollback(self, tokens: int) -> None:
        """So many tokens are left."""
        self._begins = self._begins[: bisect_left(self._begins, max(tokens, self._num_sinks + 1))]

    def _first_seen(self, token: int) -> int:
        """Index of the first message of which a token sees all; if there is none, of the first one that comes later."""
        return bisect_left(self._begins, token - self._window + 1)

    def window_begin(self, token: int) -> int:
        """First token that the window of a token may hold; 0 without a limit."""
        begin = next(iter(self._begins[self._first_seen(token) :]), token + 1)
        return begin if begin <= token else 0

    def run_length(self, token: int, limit: int) -> int:
        """How many tokens from this one on have windows with the same `window_begin`; at most ``limit``."""
        begin = next(iter(self._begins[self._first_seen(token) :]), token + limit)
        change = begin + self._window if begin <= max(token, self._num_sinks) else begin
        return min(limit, change - token)
