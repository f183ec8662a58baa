"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sinkattn.serve.answer import Answer
from sinkattn.serve.dependencies import Owner, SessionHeader
from sinkattn.serve.events import EventStream
from sinkattn.serve.metrics import FirstToken
from sinkattn.serve.requests import ChatRequest
from sinkattn.serve.server import Server, new_id, while_connected

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    request: Request, body: ChatRequest, owner: Owner, session_header: SessionHeader = None
) -> Response:
    """Reply to a chat."""
    server: Server = request.app.state.server
    server.check_model(body.model)
    first = FirstToken(server.metrics)
    id_ = body.named(session_header)
    system, messages = body.parts()
    kind = await server.sessions.kind(owner, id_) if body.append and id_ else None
    opener = await server.chat_opener(system, kind)
    sampling, max_tokens = server.sampling(**body.sampling()), server.num_tokens(body.most_tokens)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.at_work(owner))
        session = server.sessions.of_request(owner, id_, opener, messages)
        replying = server.sessions.replying(session, opener, messages, appends=body.append)
        session = await stack.enter_async_context(replying)
        stop_ids = server.end_ids | opener.encoder.special_ids
        answer = Answer(server, session, first, sampling, max_tokens, stop_ids, body.stops)
        await stack.enter_async_context(answer)
        chat = _Chat(answer, server.name, body)
        if body.stream:
            return EventStream(chat.events(), stack.pop_all(), is_done_told=True)
        return JSONResponse(await while_connected(request, chat.whole()))


class _Chat:
    """An answer as this part of the API writes it."""

    def __init__(self, answer: Answer, model: str, body: ChatRequest) -> None:
        self._answer, self._model, self._body = answer, model, body
        self._id = new_id("chatcmpl-")

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        answer = self._answer
        scores = [score async for piece in answer.pieces() for score in answer.scores(piece)]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": {"content": scores, "refusal": None} if self._body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": answer.usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of events."""
        answer = self._answer
        yield self._chunk({"role": "assistant", "content": ""})
        scores = list[dict[str, Any]]()
        async for piece in answer.pieces():
            scores += answer.scores(piece)
            if piece.text:
                yield self._chunk({"content": piece.text}, scores)
                scores = []
        yield self._chunk({}, scores, answer.finish_reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": answer.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._answer.created,
            "model": self._model,
            "session_id": self._answer.session_id,
        }

    def _chunk(
        self, delta: dict[str, Any], scores: list[dict[str, Any]] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = {"content": scores, "refusal": None} if scores else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}
