"""`Answer`: a reply to a request, however it is written to the client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from typing import Any

from sinkattn.hf.sampling.batch_sampler import ScoredToken
from sinkattn.serve.errors import ApiError
from sinkattn.serve.reply import FinishReason, Piece, Reply
from sinkattn.serve.server import Server
from sinkattn.serve.session import Session
from sinkattn.serve.wanted import Wanted

LOGGER = logging.getLogger("sinkattn.serve")


class Answer:
    """A reply in the stream of a session that is up to it; a context manager, at whose end the reply ends.

    Args:
        server: of the request.
        session: for this request alone.
        wanted: what the request wants of it.
        stop_ids: tokens that end it.

    Attributes:
        created: when, in seconds since 1970.
    """

    def __init__(self, server: Server, session: Session[Any], wanted: Wanted, stop_ids: Collection[int]) -> None:
        assert session.content is not None
        self._server, self._session, self._first = server, session, wanted.first
        self.created = int(time.time())
        self._num_prompt, self._num_reused = session.num_in_sight, min(session.num_reused, session.num_in_sight)
        self._num_before = session.num_tokens
        self._make_reply: Callable[[], Reply] = partial(
            Reply, session.content.stream, server.tokenizer, wanted.max_tokens, stop_ids, wanted.stop, wanted.sampling
        )

    async def __aenter__(self) -> Answer:
        """Begin; raises ApiError for a grammar that cannot be used."""
        try:
            self._reply = await asyncio.to_thread(self._make_reply)  # a grammar takes a while
        except (ValueError, ImportError) as error:
            raise ApiError(400, str(error), param="response_format") from error
        metrics = self._server.metrics
        metrics.prompt_tokens.inc(self._num_prompt - self._num_reused)
        metrics.reused_tokens.inc(self._num_reused)
        return self

    async def __aexit__(self, *exception: object) -> None:
        """End the reply."""
        await self._reply.close()
        metrics, session = self._server.metrics, self._session
        metrics.tokens.inc(self.num_tokens)
        in_sight = self._num_prompt + session.num_tokens - self._num_before
        metrics.evicted_tokens.inc(max(0, in_sight - session.num_in_sight))

    @property
    def session_id(self) -> str:
        """Of the session."""
        return self._session.id

    @property
    def text(self) -> str:
        """So far."""
        return self._session.reply

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until it has ended."""
        return self._reply.finish_reason

    @property
    def num_prompt(self) -> int:
        """Tokens that its first token sees."""
        return self._num_prompt

    @property
    def num_reused(self) -> int:
        """Those of them that were in the stream before the request."""
        return self._num_reused

    @property
    def num_tokens(self) -> int:
        """Tokens of the reply so far."""
        return self._reply.num_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces as they come; raises ApiError if the model fails."""
        try:
            async for piece in self._reply.pieces():
                self._first.note()
                self._session.reply += piece.text
                yield piece
        except Exception as error:
            LOGGER.exception("a reply failed")
            raise ApiError(500, "server: the reply failed") from error

    def scores(self, piece: Piece) -> list[dict[str, Any]]:
        """The log-probabilities of a piece as the API has them: of its token, if there is one."""
        token = piece.token
        if not isinstance(token, ScoredToken):
            return []
        likely = [self._scored(each, logprob) for each, logprob in token.top_logprobs.items()]
        return [{**self._scored(token, token.logprob), "top_logprobs": likely}]

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self._server.tokenizer.decode([token]))
        # Of a part of a character the tokenizer does not tell the bytes.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else [*text.encode()]}

    def usage(self) -> dict[str, Any]:
        """Tokens of the request, as `chat.completions` has them."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": self._num_prompt + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_reused},
        }
