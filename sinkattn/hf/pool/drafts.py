"""`Drafter`: guesses the next tokens of streams, for a forward that checks several of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from sinkattn.hf.pool.state import StreamState


class DraftRequest(NamedTuple):
    """Whose tokens are wanted."""

    state: StreamState
    last_id: int
    """The token that they follow, which is not in memory yet."""
    begin: int
    """The first token that its window may hold."""
    most: int
    """The most tokens."""


class Drafter(Protocol):
    """Guesses the next tokens of streams. What is guessed changes no token that they get."""

    num_tokens: int
    """The most tokens at once."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """Ids for each stream; fewer than it wants, or none, where nothing suggests itself."""

    def drop(self, state: StreamState) -> None:
        """Forget a stream, which is closed, begins anew or goes to disk."""
