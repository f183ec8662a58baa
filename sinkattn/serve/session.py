"""`Session`: a stream that is kept between requests."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic

from sinkattn.serve.content import Content, Input

# Responses of a session after which a request may go on.
MAX_RESPONSES = 64


def response_id(session: str) -> str:
    """A new id for a response, which has that of its session, so that it is found where that is saved."""
    return f"resp_{uuid.uuid4().hex}.{session}"


def session_of(response: str) -> str:
    """Id of the session that the id of a response has, or anything."""
    return response.partition(".")[2]


class Session(Generic[Input]):
    """A stream that is kept between requests.

    Args:
        owner: of whose requests it is.
        id: by which requests name it.
    """

    def __init__(self, owner: str, id: str) -> None:
        self.owner, self.id = owner, id
        self.is_named = False
        """Whether a request has named it, so that it stays until it is deleted or idle for long."""
        self.content: Content[Input] | None = None
        self.created = time.time()
        self.used_at = time.monotonic()
        self._lock, self._num_users = asyncio.Lock(), 0
        self.num_reused = 0
        """Tokens in sight that were there before the last request."""
        self.reply = ""
        """Text of the reply to the last request, so far."""
        self.responses: dict[str, int] = {}
        """Tokens of the stream after each of the last responses that can be gone on from."""
        self.is_closed = False
        self.has_lost_turns = False
        """Whether turns that were not saved are lost, and no request was told yet."""

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While it lasts, no other request uses it."""
        self._num_users += 1
        try:
            async with self._lock:
                yield
        finally:
            self._num_users -= 1

    @property
    def is_used(self) -> bool:
        """Whether a request uses it, or waits for it."""
        return self._num_users > 0

    def note_response(self, id: str | None) -> None:
        """Note a response that has just ended; None for one that cannot be gone on from."""
        if id is not None:
            self.responses[id] = self.num_tokens
        while len(self.responses) > MAX_RESPONSES:
            del self.responses[next(iter(self.responses))]

    def forget_responses(self) -> None:
        """Forget those after which the stream was changed: it has fewer tokens now."""
        self.responses = {id: length for id, length in self.responses.items() if length <= self.num_tokens}

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream so far."""
        return 0 if self.content is None else len(self.content.stream)

    @property
    def num_in_sight(self) -> int:
        """Tokens that the model sees."""
        return 0 if self.content is None else len(self.content.stream.in_sight)

    def described(self) -> dict[str, Any]:
        """The session as the API has it."""
        return {
            "id": self.id,
            "object": "session",
            "status": "live",
            "created": int(self.created),
            "idle_seconds": round(time.monotonic() - self.used_at, 3),
            "is_busy": self.is_used,
            "tokens": self.num_tokens,
            "tokens_in_sight": self.num_in_sight,
            "in_sight": [] if self.content is None else self.content.in_sight(),
        }
