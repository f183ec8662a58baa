"""`create_app`: the server as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import sinkattn
from sinkattn.serve import chat_api, completions_api, live_api, models_api, responses_api, sessions_api
from sinkattn.serve.body_limit import BodyLimit
from sinkattn.serve.dependencies import Owner
from sinkattn.serve.errors import ApiError, ErrorBody
from sinkattn.serve.request_log import RequestLog
from sinkattn.serve.same_site import SameSite
from sinkattn.serve.server import Server

LOGGER = logging.getLogger("sinkattn.serve")
# Seconds between looks at sessions that nobody uses.
IDLE_CHECK = 10.0
# Seconds between looks whether another server wants a session.
HAND_OVER_CHECK = 0.1
# Seconds between looks whether the model can go on.
FAILURE_CHECK = 1.0
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 429, 500, 503, 507)
}
PAGE = Path(__file__).with_name("page.html")


def create_app(server: Server) -> FastAPI:
    """An ASGI application that answers requests with the model of a server."""
    app = FastAPI(
        title="sinkattn",
        version=sinkattn.__version__,
        lifespan=_lifespan,
        docs_url=None,  # pages that load scripts of other hosts
        redoc_url=None,
    )
    app.state.server = server
    app.add_middleware(BodyLimit, most=server.limits.body_bytes)  # with an error as JSON, unlike FastAPI's own
    if not server.keys.are_needed:
        app.add_middleware(SameSite)
    app.add_middleware(RequestLog, metrics=server.metrics)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    for api in (chat_api, completions_api, responses_api, live_api, sessions_api, models_api):
        app.include_router(api.router, responses=ERRORS)
    app.openapi = partial(_described, app)  # type: ignore[method-assign]  # as FastAPI's documentation has it

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """A page to try it."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process is there."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        return JSONResponse({"status": "ending"}, 503) if server.is_ending else JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(owner: Owner) -> PlainTextResponse:
        """Figures in Prometheus' format."""
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    server: Server = app.state.server
    # A thread for each request that may wait for a step.
    executor = ThreadPoolExecutor(server.limits.requests + 8, thread_name_prefix="sinkattn")
    asyncio.get_running_loop().set_default_executor(executor)
    tasks = [asyncio.create_task(work(server)) for work in (_close_idle, _hand_over, _end_if_failed)]
    try:
        yield
    finally:
        server.is_ending = True
        await server.sessions.close()  # meanwhile those that another server wants are handed over first
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(server.pool.close)


async def _close_idle(server: Server) -> None:
    while True:
        await asyncio.sleep(IDLE_CHECK)
        await server.sessions.close_idle()


async def _hand_over(server: Server) -> None:
    while server.folder is not None:
        await asyncio.sleep(HAND_OVER_CHECK)
        await server.sessions.hand_over()


async def _end_if_failed(server: Server) -> None:
    while not server.pool.has_failed:
        await asyncio.sleep(FAILURE_CHECK)
    LOGGER.error("the ranks of the model cannot go on, so the server ends")
    signal.raise_signal(signal.SIGTERM)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "header", "query", "path")]
    param = ".".join(where) or None
    reason = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
    answer = ApiError(400, f"{param or 'body'}: {reason}", param=param)
    return JSONResponse(answer.body, answer.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    # The log has why.
    return JSONResponse(ApiError(500, "server: the request failed").body, 500)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _described(app: FastAPI) -> dict[str, Any]:
    """The description of the API, in which invalid requests get 400 rather than FastAPI's own 422."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
        for methods in app.openapi_schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema
