"""`Session`: a stream that is kept between requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Generic

from sinkattn.serve.content import Content, Input

# Responses of a session after which a request may go on.
MAX_RESPONSES = 64


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
        self.lock = asyncio.Lock()
        """Held while a request uses it."""
        self.num_reused = 0
        """Tokens in sight that were there before the last request."""
        self.reply = ""
        """Text of the reply to the last request, so far."""
        self.responses: dict[str, int] = {}
        """Tokens of the stream after each of the last responses that can be gone on from."""
        self.is_closed = False
        self.has_lost_turns = False
        """Whether turns that were not saved are lost, and no request was told yet."""

    def note_response(self, id: str) -> None:
        """Note a response that has just ended."""
        self.responses[id] = self.num_tokens
        while len(self.responses) > MAX_RESPONSES:
            del self.responses[next(iter(self.responses))]

    def forget_responses(self) -> None:
        """Forget those after which the stream was changed: it has fewer tokens now."""
        self.responses = {id: length for id, length in self.responses.items() if length <= self.num_tokens}

    @property
    def is_idle(self) -> bool:
        """Whether it can be closed when there is no room, as no request uses or names it."""
        return not self.is_named and not self.lock.locked()

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
            "is_busy": self.lock.locked(),
            "tokens": self.num_tokens,
            "tokens_in_sight": self.num_in_sight,
            "in_sight": [] if self.content is None else self.content.in_sight(),
        }
