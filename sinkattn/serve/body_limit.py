"""`BodyLimit`: refuses requests with a large body before it is parsed."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkattn.serve.errors import ApiError


class BodyLimit:
    """ASGI middleware that reads the bodies of requests; those with more bytes get an error.

    Args:
        app: what answers the others.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        body: bytearray | None = bytearray() if not (length.isdecimal() and int(length) > self._most) else None
        more = body is not None
        while more and body is not None:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            body = body if len(body) <= self._most else None
        if body is None:
            error = ApiError(413, f"body: expected up to {self._most} bytes, got more", code="body_too_large")
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, read, send)
