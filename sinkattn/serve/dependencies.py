"""What routes take from a request besides its body."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Header, Request

from sinkattn.serve.requests import SessionId
from sinkattn.serve.server import Server


async def _owner(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    server: Server = request.app.state.server
    return server.keys.owner(authorization)


Owner = Annotated[str, Depends(_owner)]
"""The client; ApiError for none."""


async def _at_work(request: Request, owner: Owner) -> AsyncIterator[None]:
    server: Server = request.app.state.server
    async with server.at_work(owner):
        yield


AT_WORK = Depends(_at_work)
"""For routes each request of which is one at work."""
SessionHeader = Annotated[SessionId | None, Header(alias="X-Session-ID")]
"""The session that a header names."""
