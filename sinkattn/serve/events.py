"""`EventStream`: a response of server-sent events, as clients of OpenAI's API expect them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from sinkattn.serve.errors import ApiError

# Seconds for which a client may leave an event unread; then its request ends.
SEND_TIMEOUT = 60.0


class EventStream(EventSourceResponse):
    """Events. An error ends them with an event that has it.

    Args:
        events: their bodies.
        stack: what is closed when the response has ended, in whatever way.
        is_done_told: whether they end with ``[DONE]``.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], stack: AsyncExitStack, *, is_done_told: bool) -> None:
        super().__init__(_lines(events, is_done_told), send_timeout=SEND_TIMEOUT, sep="\n")
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._stack:
            await super().__call__(scope, receive, send)


async def _lines(events: AsyncIterator[dict[str, Any]], is_done_told: bool) -> AsyncIterator[dict[str, str]]:
    try:
        async for event in events:
            name = event.get("type")
            line = {"data": json.dumps(event, ensure_ascii=False)}
            yield {"event": name, **line} if isinstance(name, str) else line
    except ApiError as error:
        yield {"data": json.dumps(error.body)}
    if is_done_told:
        yield {"data": "[DONE]"}
