"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sinkattn.serve.answer import Answer
from sinkattn.serve.dependencies import Owner, SessionHeader
from sinkattn.serve.requests import CompletionRequest
from sinkattn.serve.respond import answering, respond
from sinkattn.serve.server import Server, new_id
from sinkattn.serve.written import Written

router = APIRouter()


@router.post("/v1/completions")
async def completions(
    request: Request, body: CompletionRequest, owner: Owner, session_header: SessionHeader = None
) -> Response:
    """Continue a text."""
    server: Server = request.app.state.server
    wanted = server.wanted(body, body.max_tokens)
    id_ = body.named(session_header)
    ids = await server.ids_of("prompt", body.text, is_first=not body.append)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.at_work(owner))
        session = server.sessions.of_request(owner, id_, server.text_opener, ids)
        answer = await stack.enter_async_context(
            answering(server, session, server.text_opener, ids, wanted, appends=body.append)
        )
        return await respond(request, _Completion(answer, server.name, body), stack, is_streamed=body.stream)


class _Completion(Written):
    """An answer as this part of the API writes it."""

    def __init__(self, answer: Answer, model: str, body: CompletionRequest) -> None:
        self._answer, self._model, self._body = answer, model, body
        self._id = new_id("cmpl-")

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        answer = self._answer
        scores = [score async for piece in answer.pieces() for score in answer.scores(piece)]
        return {**self._chunk(answer.text, scores, answer.finish_reason), "usage": answer.usage()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of events."""
        answer = self._answer
        scores = list[dict[str, Any]]()
        async for piece in answer.pieces():
            scores += answer.scores(piece)
            if piece.text:
                yield self._chunk(piece.text, scores)
                scores = []
        yield self._chunk("", scores, answer.finish_reason)
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": answer.usage()}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._answer.created,
            "model": self._model,
            "session_id": self._answer.session_id,
        }

    def _chunk(self, text: str, scores: list[dict[str, Any]], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = None if self._body.logprobs is None else _logprobs(scores)
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head(), "choices": [choice]}


def _logprobs(scores: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": [score["token"] for score in scores],
        "token_logprobs": [score["logprob"] for score in scores],
        "top_logprobs": [{each["token"]: each["logprob"] for each in score["top_logprobs"]} for score in scores],
    }
