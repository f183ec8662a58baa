"""``/v1/sessions``."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from sinkattn.serve.dependencies import AT_WORK, Owner
from sinkattn.serve.requests import SessionId
from sinkattn.serve.server import Server

router = APIRouter(dependencies=[AT_WORK])


@router.get("/v1/sessions")
async def sessions(request: Request, owner: Owner) -> dict[str, Any]:
    """The sessions of a client: those that are live, and those that are only saved."""
    server: Server = request.app.state.server
    return {"object": "list", "data": await server.sessions.described(owner)}


@router.get("/v1/sessions/{id}")
async def session(request: Request, id: SessionId, owner: Owner) -> dict[str, Any]:
    """A session, when no request uses it any more."""
    server: Server = request.app.state.server
    async with server.sessions.held(owner, id) as session:
        pass
    return session.described()  # and does not count this request, which would make it busy


@router.post("/v1/sessions/{id}/save")
async def save(request: Request, id: SessionId, owner: Owner) -> dict[str, Any]:
    """Save a session, when no request uses it any more; it is there again when the server has started anew."""
    server: Server = request.app.state.server
    async with server.sessions.held(owner, id) as session:
        await server.sessions.save(session)
    return session.described()


@router.post("/v1/sessions/{id}/restore")
async def restore(request: Request, id: SessionId, owner: Owner) -> dict[str, Any]:
    """Let a session be as it was saved, when no request uses it any more."""
    server: Server = request.app.state.server
    return (await server.sessions.restore(owner, id)).described()


class Fork(BaseModel):
    """Body of a request for a copy."""

    model_config = ConfigDict(extra="forbid")
    session_id: SessionId | None = None


@router.post("/v1/sessions/{id}/fork")
async def fork(request: Request, id: SessionId, body: Fork, owner: Owner) -> dict[str, Any]:
    """Copy a session, when no request uses it any more. Both go on from here."""
    server: Server = request.app.state.server
    copy = await server.sessions.fork(owner, id, body.session_id or uuid.uuid4().hex)
    copy.is_named = True
    return copy.described()


@router.delete("/v1/sessions/{id}")
async def delete(request: Request, id: SessionId, owner: Owner) -> dict[str, Any]:
    """Forget a session and what was saved of it, when no request uses it any more."""
    server: Server = request.app.state.server
    await server.sessions.delete(owner, id)
    return {"id": id, "object": "session", "deleted": True}
