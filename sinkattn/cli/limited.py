"""Tokens up to a limit, and whether a text of a grammar was cut off there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sinkattn.cli.errors import UserError


class Limited:
    """Passes tokens on, and counts them.

    Args:
        tokens: within a grammar one more than the limit, if the text goes on.
        limit: the most tokens that are passed on; None for no limit.

    Attributes:
        count: tokens that were passed on.
        is_cut_off: whether there were more.
    """

    def __init__(self, tokens: Iterable[int], limit: int | None) -> None:
        self._tokens, self._limit = tokens, limit
        self.count, self.is_cut_off = 0, False

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            if self.count == self._limit:
                self.is_cut_off = True
                return
            self.count += 1
            yield token


def asked(limit: int | None, *, has_grammar: bool) -> int | None:
    """The most tokens to generate for `Limited`."""
    return None if limit is None else limit + has_grammar


def cut_off(what: str, limit: int | None) -> UserError:
    """The error of a text that is not whole JSON."""
    return UserError(f"json-schema: {what} cut off after {limit} tokens; give more --max-new-tokens")
