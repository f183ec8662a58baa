"""`Places`: places for requests at work, of which a busy client leaves some to others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sinkattn.serve.errors import ApiError

# Seconds after which a client may try again.
RETRY_AFTER = 1


class Places:
    """Places for requests at work.

    Nobody waits for one, so there are no turns to take. Instead, where there are several clients, one may have as many
    as it leaves free: half of them, or a third if another client is as busy. So a client that has none gets one.

    Args:
        count: places.
        is_shared: whether there are several clients.
    """

    def __init__(self, count: int, *, is_shared: bool) -> None:
        self._count, self._is_shared = count, is_shared
        self._taken = Counter[str]()

    @property
    def num_taken(self) -> int:
        """Of all clients."""
        return self._taken.total()

    @contextmanager
    def taken(self, owner: str) -> Iterator[None]:
        """A place of a client while it lasts; raises ApiError if it can have none."""
        num_own, num_free = self._taken[owner], self._count - self.num_taken
        if num_free <= (num_own if self._is_shared else 0):
            message = f"server: {self.num_taken} requests are at work, {num_own} of this client; try again later"
            raise ApiError(429, message, retry_after=RETRY_AFTER)
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
