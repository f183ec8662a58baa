"""`SameSite`: refuses what a page of another site lets the browser of a user of this machine send."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sinkattn.serve.errors import ApiError

# Names of which the public domain name system has none.
LOCAL = (".localhost", ".local", ".internal")


class SameSite:
    """ASGI middleware for two requests that browsers allow although they come from another site.

    These are websockets, and all requests to a public name for which its owner gives the address of this machine. The
    second ones matter only without keys.

    Args:
        app: what answers the others.
        has_keys: whether clients need keys.
    """

    def __init__(self, app: ASGIApp, *, has_keys: bool) -> None:
        self._app, self._has_keys = app, has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            is_foreign = scope["type"] == "websocket" and origin is not None and urlsplit(origin).netloc != host
            if is_foreign or not (self._has_keys or _is_local(host)):
                error = ApiError(403, "Host: expected an address, or a local name; Origin: expected none but this host")
                response = JSONResponse(error.body, error.status)
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})  # before it is accepted: as 403
                else:
                    await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name.endswith(LOCAL):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
