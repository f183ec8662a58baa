"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sinkattn.serve.answer import Answer
from sinkattn.serve.dependencies import Owner, SessionHeader
from sinkattn.serve.requests import ChatRequest
from sinkattn.serve.respond import answering, respond
from sinkattn.serve.server import Server, new_id
from sinkattn.serve.written import Written

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    request: Request, body: ChatRequest, owner: Owner, session_header: SessionHeader = None
) -> Response:
    """Reply to a chat."""
    server: Server = request.app.state.server
    wanted = server.wanted(body, body.most_tokens)
    id_ = body.named(session_header)
    system, messages = body.parts()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.at_work(owner))
        kind = await server.sessions.kind(owner, id_) if body.append and id_ else None
        opener = await server.chat_opener(system, kind)
        session = server.sessions.of_request(owner, id_, opener, messages)
        answer = await stack.enter_async_context(
            answering(server, session, opener, messages, wanted, appends=body.append)
        )
        return await respond(request, _Chat(answer, server.name, body), stack, is_streamed=body.stream)


class _Chat(Written):
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
