"""`Written`: an answer as a part of the API writes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from sinkattn.serve.errors import ApiError


class Written(ABC):
    """An answer as a part of the API writes it: as a whole, or as events."""

    is_done_told: ClassVar[bool] = True
    """Whether its events end with ``[DONE]``."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The body of the response."""

    @abstractmethod
    def events(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of events."""

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The body of the event that ends them if something goes wrong."""
        return error.body
