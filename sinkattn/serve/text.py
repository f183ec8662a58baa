"""`TextStream`: a stream of plain text, and whether the ids of a request continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream


class TextStream:
    """A stream of plain text. The ids of a request continue it if they have all that is in sight where it is.

    Args:
        stream: opened with its first tokens as prefix.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    @property
    def kind(self) -> object:
        """See `Content`."""
        return TextOpener.kind

    def num_known(self, ids: Sequence[int]) -> int | None:
        """See `Content`."""
        prefix, count = self.stream.prefix, len(self.stream)
        if len(ids) < count:
            return None
        seen = self.stream.in_sight
        window = seen[len(prefix) :]
        is_continued = [*ids[: len(prefix)]] == prefix and [*ids[count - len(window) : count]] == window
        return count if is_continued else None

    def rewind(self, ids: Sequence[int]) -> int | None:
        """See `Content`; forgets nothing."""
        return self.num_known(ids)

    def add(self, ids: Sequence[int]) -> None:
        """See `Content`."""
        self.stream.feed(ids, wait=False)

    def begin_reply(self) -> None:
        """See `Content`; there is nothing."""

    def end_reply(self, text: str) -> bool:
        """See `Content`; there is nothing."""
        return False

    def fork(self) -> TextStream:
        """See `Content`."""
        return TextStream(self.stream.fork())

    def notes(self) -> dict[str, Any]:
        """See `Content`."""
        return {}

    def in_sight(self) -> list[dict[str, Any]]:
        """See `Content`."""
        return [{"role": "text", "tokens": len(self.stream.in_sight)}]

    def back_to(self, length: int) -> None:
        """See `Content`."""
        self.stream.rollback(len(self.stream) - length)


@dataclass(frozen=True)
class TextOpener:
    """Begins streams of plain text.

    Args:
        num_sinks: the first tokens that stay in sight.
    """

    num_sinks: int
    kind = "text"
    inputs: ClassVar[str] = "prompt"
    stop_ids: ClassVar[frozenset[int]] = frozenset()

    def open(self, pool: StreamPool, ids: Sequence[int]) -> TextStream:
        """See `Opener`."""
        stream = TextStream(pool.open(ids[: self.num_sinks]))
        stream.add(ids[self.num_sinks :])
        return stream
