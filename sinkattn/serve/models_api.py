"""``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from sinkattn.serve.dependencies import Owner
from sinkattn.serve.server import Server

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request, owner: Owner) -> dict[str, Any]:
    """The model that is served."""
    server: Server = request.app.state.server
    return {"object": "list", "data": [_model(server)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str, owner: Owner) -> dict[str, Any]:
    """The model that is served."""
    server: Server = request.app.state.server
    server.check_model(name)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    return {
        "id": server.name,
        "object": "model",
        "created": server.created,
        "owned_by": "local",
        "window": server.window,
    }
