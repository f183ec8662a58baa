"""What requests for text have in common, whichever part of the API they are of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from sinkattn.serve.answer import Answer
from sinkattn.serve.content import Input, Opener
from sinkattn.serve.errors import ApiError
from sinkattn.serve.events import EventStream
from sinkattn.serve.server import Server, while_connected
from sinkattn.serve.session import Session
from sinkattn.serve.wanted import Wanted
from sinkattn.serve.written import Written

# Seconds after which a client may ask again, when there may be another server.
RETRY_AFTER = 10


@asynccontextmanager
async def answering(
    server: Server,
    session: Session[Input],
    opener: Opener[Input],
    inputs: Sequence[Input],
    wanted: Wanted,
    *,
    appends: bool,
    response: str | None = None,
) -> AsyncIterator[Answer]:
    """The answer of a session to inputs, which are as those of `Sessions.replying`."""
    replying = server.sessions.replying(session, opener, inputs, appends=appends, response=response)
    stop_ids = server.end_ids | opener.stop_ids
    async with replying as held, Answer(server, held, wanted, stop_ids) as answer:
        yield answer


async def respond(request: Request, written: Written, stack: AsyncExitStack, *, is_streamed: bool) -> Response:
    """The response to a request: events, with which ``stack`` is closed, or the whole answer.

    Raises ApiError if the whole answer takes longer than a server that ends waits for it.
    """
    if is_streamed:
        return EventStream(written, stack.pop_all())
    try:
        return JSONResponse(await while_connected(request, written.whole()))
    except asyncio.CancelledError:  # uvicorn does so then, and would answer without a reason
        raise ApiError(503, "server: is shutting down", code="shutting_down", retry_after=RETRY_AFTER) from None
