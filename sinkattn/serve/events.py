"""`EventStream`: an answer as server-sent events, as clients of OpenAI's API expect them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from sinkattn.serve.errors import ApiError
from sinkattn.serve.written import Written

# Seconds for which a client may leave an event unread; then its request ends.
SEND_TIMEOUT = 60.0
# Seconds for which events go on when the server is asked to end. Then they are cut, and end with an event that says so.
CUT_AFTER = 5.0
# Seconds for which a server should wait for that.
CUT_WITHIN = 10.0


class EventStream(EventSourceResponse):
    """Events. An error ends them with an event that has it, and so does the end of the server.

    Args:
        written: the answer.
        stack: what is closed when the response has ended, in whatever way.
    """

    def __init__(self, written: Written, stack: AsyncExitStack) -> None:
        self._ending = anyio.Event()
        super().__init__(
            self._lines(written),
            send_timeout=SEND_TIMEOUT,
            sep="\n",
            shutdown_event=self._ending,
            shutdown_grace_period=CUT_WITHIN,
        )
        self._stack, self._step, self._is_cut = stack, anyio.CancelScope(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._stack:
            cutting = asyncio.create_task(self._cut())
            try:
                await super().__call__(scope, receive, send)
            finally:
                cutting.cancel()

    async def _cut(self) -> None:
        await self._ending.wait()
        await asyncio.sleep(CUT_AFTER)
        self._is_cut = True
        self._step.cancel()

    async def _lines(self, written: Written) -> AsyncIterator[dict[str, str]]:
        events = written.events()
        try:
            while (event := await self._next(events)) is not None:
                yield _line(event)
        except ApiError as error:
            yield _line(written.failed(error))
        if written.is_done_told:
            yield {"data": "[DONE]"}

    async def _next(self, events: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
        """The next event; None at the end. Raises ApiError when they are cut."""
        with anyio.CancelScope() as self._step:
            if not self._is_cut:
                return await anext(events, None)
        raise ApiError(503, "server: is shutting down", code="shutting_down")


def _line(event: dict[str, Any]) -> dict[str, str]:
    line = {"data": json.dumps(event, ensure_ascii=False)}
    name = event.get("type")
    return {"event": name, **line} if isinstance(name, str) else line
