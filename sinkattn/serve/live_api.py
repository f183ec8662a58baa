"""``/v1/sessions/{id}/live``: a websocket for a text that comes in pieces while the model speaks."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Header, WebSocket
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocketDisconnect

from sinkattn.serve.answer import Answer
from sinkattn.serve.errors import ApiError
from sinkattn.serve.metrics import FirstToken
from sinkattn.serve.requests import SessionId
from sinkattn.serve.server import Server
from sinkattn.serve.session import Session
from sinkattn.serve.wanted import Wanted

router = APIRouter()


class Feed(BaseModel):
    """Text that follows."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["feed"]
    text: Annotated[str, Field(min_length=1)]


class Generate(BaseModel):
    """The model is to speak, until it has ended, or ``stop``, or another one of these."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["generate"]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[], max_length=16)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None


class Stop(BaseModel):
    """The model is to be silent."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["stop"]


LiveMessage: TypeAlias = Feed | Generate | Stop
MESSAGES: TypeAdapter[LiveMessage] = TypeAdapter(Annotated[LiveMessage, Field(discriminator="type")])


@router.websocket("/v1/sessions/{id}/live")
async def live(websocket: WebSocket, id: SessionId, authorization: Annotated[str | None, Header()] = None) -> None:
    """Feed a text while the model speaks.

    The client sends ``feed``, ``generate`` and ``stop``; it gets ``text`` for each piece, ``end`` with the reason, and
    ``error``, after which everything goes on.
    """
    server: Server = websocket.app.state.server
    await websocket.accept()
    try:
        owner = server.keys.owner(authorization)
        first = await _received(server, websocket)
        is_new = await server.sessions.kind(owner, id) is None
        if is_new and not isinstance(first, Feed):
            raise ApiError(400, f"{first.type}: expected feed before it, as the session has no text")
        ids = await server.ids_of("text", first.text, is_first=is_new) if isinstance(first, Feed) else []
        async with server.at_work(owner):
            replying = server.sessions.replying(server.sessions.named(owner, id), server.text_opener, ids, appends=True)
            async with replying as session:
                await _Live(server, session, websocket).run(None if isinstance(first, Feed) else first)
    except ApiError as error:
        await websocket.send_json({"type": "error", **error.body})
        await websocket.close(code=1008)
    except WebSocketDisconnect:
        pass


async def _received(server: Server, websocket: WebSocket) -> LiveMessage:
    """The next message; raises ApiError for one that is none."""
    try:
        text = await asyncio.wait_for(websocket.receive_text(), server.limits.idle_seconds)
    except asyncio.TimeoutError:
        await websocket.close(1001)
        raise WebSocketDisconnect(1001) from None
    except KeyError:
        raise ApiError(400, "message: expected text, got bytes") from None
    except RuntimeError as error:  # a message could not be sent, as the client has gone away
        raise WebSocketDisconnect(1006) from error
    if len(text) > server.limits.body_bytes:
        raise ApiError(413, f"message: expected up to {server.limits.body_bytes} bytes, got more")
    try:
        return MESSAGES.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where or 'message'}: {first['msg']}", param=where or None) from error


class _Live:
    """A text stream with a websocket."""

    def __init__(self, server: Server, session: Session[int], websocket: WebSocket) -> None:
        assert session.content is not None
        self._server, self._session, self._websocket = server, session, websocket
        self._stream = session.content.stream
        self._speaking: asyncio.Task[None] | None = None

    async def run(self, first: Generate | Stop | None) -> None:
        """Do what the client says, beginning with ``first``, until it goes away."""
        message: LiveMessage | None = first
        try:
            while True:
                try:
                    obeyed = await _received(self._server, self._websocket) if message is None else message
                    message = None
                    await self._obey(obeyed)
                except ApiError as error:
                    await self._websocket.send_json({"type": "error", **error.body})
        finally:
            await self._be_silent()

    async def _obey(self, message: LiveMessage) -> None:
        if isinstance(message, Feed):
            self._stream.feed(await self._server.ids_of("text", message.text, is_first=False), wait=False)
            return
        await self._be_silent()
        if isinstance(message, Generate):
            given = {name: getattr(message, name) for name in ("temperature", "top_p", "min_p", "seed")}
            wanted = Wanted(
                FirstToken(self._server.metrics),
                self._server.sampling(**{name: value for name, value in given.items() if value is not None}),
                self._server.num_tokens(message.max_tokens),
                message.stop,
            )
            answer = Answer(self._server, self._session, wanted, self._server.end_ids)
            self._speaking = asyncio.create_task(self._speak(answer))

    async def _speak(self, answer: Answer) -> None:
        try:
            async with answer:
                async for piece in answer.pieces():
                    if piece.text:
                        await self._send("text", text=piece.text)
            await self._send("end", finish_reason=answer.finish_reason, usage=answer.usage())
        except ApiError as error:
            await self._send("error", **error.body)
        except WebSocketDisconnect:
            pass

    async def _be_silent(self) -> None:
        if self._speaking is not None:
            self._speaking.cancel()
            await asyncio.gather(self._speaking, return_exceptions=True)
            self._speaking = None

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._websocket.send_text(json.dumps({"type": kind, **fields}, ensure_ascii=False))
