"""`RequestLog`: a line of the log for each request, and its figures; never what it says."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkattn.serve.metrics import Metrics

LOGGER = logging.getLogger("sinkattn.serve")


class RequestLog:
    """ASGI middleware that logs requests.

    Args:
        app: what answers them.
        metrics: that count them.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status, begin = 499, time.perf_counter()  # a client that has gone away gets none

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and status == 499:
                status = 403  # it was not accepted
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            # The path of the route, so that a client cannot make up labels.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            LOGGER.info(
                "request",
                extra={
                    "method": scope.get("method", "GET"),  # so a websocket begins
                    "path": path,
                    "status": status,
                    "seconds": round(time.perf_counter() - begin, 4),
                },
            )
