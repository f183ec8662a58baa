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
    """ASGI middleware for a server without keys, which whoever uses this machine may use.

    A browser sends it requests of pages of other sites, too: simple ones and websockets, with their origin, and any for
    which the owner of a public name gives it the address of this machine.

    Args:
        app: what answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else None
        if headers is None or _is_same(headers.get("host", ""), headers.get("origin")):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # it is not accepted: the client gets 403
        else:
            error = ApiError(403, "Host: expected an address or a local name, and none but it in Origin")
            await JSONResponse(error.body, error.status)(scope, receive, send)


def _is_same(host: str, origin: str | None) -> bool:
    try:
        site = urlsplit(origin or f"http://{host}")
        # Other schemes are those of programs and extensions of a browser.
        return _is_local(host) and (site.scheme not in ("", "http", "https") or site.netloc == host)
    except ValueError:
        return False


def _is_local(host: str) -> bool:
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    if name == "localhost" or name.endswith(LOCAL):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
