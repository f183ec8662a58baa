"""``POST /v1/responses``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sinkattn.serve.answer import Answer
from sinkattn.serve.dependencies import Owner, SessionHeader
from sinkattn.serve.errors import ApiError
from sinkattn.serve.requests import ResponseRequest
from sinkattn.serve.respond import answering, respond
from sinkattn.serve.server import Server, new_id
from sinkattn.serve.session import response_id
from sinkattn.serve.written import Written

router = APIRouter()


@router.post("/v1/responses")
async def responses(
    request: Request, body: ResponseRequest, owner: Owner, session_header: SessionHeader = None
) -> Response:
    """Respond to a message, after an earlier response if one is named."""
    server: Server = request.app.state.server
    wanted = server.wanted(body, body.max_output_tokens)
    system, messages = body.parts()
    id_, before = body.named(session_header), body.previous_response_id
    if id_ is not None and before is not None:
        raise ApiError(400, "session_id: expected none beside previous_response_id", param="session_id")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server.at_work(owner))
        if before is None:
            opener = await server.chat_opener(system)
            session = server.sessions.of_request(owner, id_, opener, messages)
        else:
            session = await server.sessions.after(owner, before)
            opener = await server.chat_opener(system, None if session.content is None else session.content.kind)
        response, appends = response_id(session.id), before is not None
        answer = await stack.enter_async_context(
            answering(server, session, opener, messages, wanted, appends=appends, response=response)
        )
        return await respond(request, _Response(response, answer, server.name, body), stack, is_streamed=body.stream)


class _Response(Written):
    """An answer as this part of the API writes it."""

    is_done_told = False

    def __init__(self, id_: str, answer: Answer, model: str, body: ResponseRequest) -> None:
        self._id, self._answer, self._model, self._body = id_, answer, model, body
        self._item = new_id("msg_")
        self._scores = list[dict[str, Any]]()
        self._num_events = 0

    async def whole(self) -> dict[str, Any]:
        """The body of the response."""
        async for piece in self._answer.pieces():
            self._scores += self._answer.scores(piece)
        return self._response(self._status)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The bodies of events."""
        answer = self._answer
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield self._part_event("response.content_part.added", part=self._part(""))
        async for piece in answer.pieces():
            self._scores += answer.scores(piece)
            if piece.text:
                scores = answer.scores(piece)
                yield self._part_event("response.output_text.delta", delta=piece.text, logprobs=scores)
        yield self._part_event("response.output_text.done", text=answer.text, logprobs=self._scores)
        yield self._part_event("response.content_part.done", part=self._part(answer.text))
        yield self._event("response.output_item.done", output_index=0, item=self._message(self._status))
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The body of the event that ends them if something goes wrong."""
        return self._event("error", code=error.code or "server_error", message=str(error), param=error.param)

    @property
    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason == "length" else "completed"

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _part_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **fields)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._scores}

    def _message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part(self._answer.text)]
        return {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": content}

    def _response(self, status: str) -> dict[str, Any]:
        answer, body = self._answer, self._body
        has_ended = status != "in_progress"
        usage = {
            "input_tokens": answer.num_prompt,
            "input_tokens_details": {"cached_tokens": answer.num_reused},
            "output_tokens": answer.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.num_prompt + answer.num_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": answer.created,
            "model": self._model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "metadata": body.metadata or {},
            "output": [self._message(status)] if has_ended else [],
            "parallel_tool_calls": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": "none",
            "tools": [],
            "truncation": "auto",
            "usage": usage if has_ended else None,
            "session_id": answer.session_id,
        }
