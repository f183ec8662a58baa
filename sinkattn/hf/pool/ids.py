"""Ids of one stream on the host: those in sight of its last token and as many before them as it may be rolled back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sinkattn.ops import RingLayout


class StreamIds:
    """Ids by token number, in constant memory: in the slots that the tokens have in a ring.

    Args:
        layout: of the stream.
    """

    def __init__(self, layout: RingLayout) -> None:
        self.layout = layout
        self._slots = np.zeros(layout.slots, dtype=np.int64)
        self._count = self._peak = 0

    def __len__(self) -> int:
        return self._count

    def append(self, ids: Sequence[int]) -> None:
        """Append the next ids."""
        self.write(self._count, ids)

    def write(self, begin: int, ids: Sequence[int]) -> None:
        """Let the ids from token ``begin`` on, which has to be there or the next one, be these."""
        num_sinks, ring = self.layout.num_sinks, self.layout.ring
        for token, id_ in enumerate(ids, begin):
            self._slots[token if token < num_sinks else num_sinks + (token - num_sinks) % ring] = id_
        self._count = begin + len(ids)
        self._peak = max(self._peak, self._count)

    def rollback(self, count: int) -> None:
        """Forget the last ids."""
        self._count -= count

    def in_sight(self, begin: int = 0, next_ids: Sequence[int] = ()) -> np.ndarray:
        """Ids of the tokens that the last one sees, int64, in order.

        Args:
            begin: the first that its window may hold.
            next_ids: ids that follow those that are here; the last token is the last of these.
        """
        layout, last = self.layout, self._count + len(next_ids) - 1
        begin = max(layout.num_sinks, last - layout.window + 1, begin)
        sinks = self._slots[: min(layout.num_sinks, self._count)]
        seen = [id_ for token, id_ in enumerate(next_ids, self._count) if token < layout.num_sinks or token >= begin]
        return np.concatenate((sinks, self._recent(begin), np.array(seen, dtype=np.int64)))

    def last(self, count: int) -> list[int]:
        """The last ids, fewer if there are not as many."""
        num_recent = max(0, min(count, self._count - self.layout.num_sinks))
        sinks = self._slots[max(0, self._count - count) : min(self.layout.num_sinks, self._count)]
        return [*sinks.tolist(), *self._recent(self._count - num_recent).tolist()]

    def known(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and ids of all tokens that are recorded, in order."""
        layout = self.layout
        begin = min(max(layout.num_sinks, self._peak - layout.ring), self._count)
        num_sinks = min(layout.num_sinks, self._count)
        numbers = np.concatenate((np.arange(num_sinks), np.arange(begin, self._count)))
        return numbers, np.concatenate((self._slots[:num_sinks], self._recent(begin)))

    @property
    def peak(self) -> int:
        """The most tokens that there ever were; ids that later ones have replaced are not recorded any more."""
        return self._peak

    def restore(self, count: int, peak: int, numbers: np.ndarray, ids: np.ndarray) -> None:
        """Become a stream of ``count`` tokens of which these are recorded."""
        layout, self._count, self._peak = self.layout, count, peak
        in_ring = layout.num_sinks + (numbers - layout.num_sinks) % layout.ring
        self._slots[np.where(numbers < layout.num_sinks, numbers, in_ring)] = ids

    def _recent(self, begin: int) -> np.ndarray:
        layout = self.layout
        numbers = np.arange(begin, self._count) - layout.num_sinks
        return self._slots[layout.num_sinks + numbers % layout.ring]
