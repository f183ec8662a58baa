"""`Server`: what the routes of the API share."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.pool.model import PoolModel
from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import end_ids
from sinkattn.serve.access import Keys
from sinkattn.serve.content import Content
from sinkattn.serve.conversation import ChatOpener, Conversation
from sinkattn.serve.errors import ApiError
from sinkattn.serve.limits import Limits
from sinkattn.serve.metrics import FirstToken, Metrics
from sinkattn.serve.places import Places
from sinkattn.serve.requests import Generated
from sinkattn.serve.sessions import Sessions
from sinkattn.serve.store import Store
from sinkattn.serve.text import TextOpener, TextStream
from sinkattn.serve.wanted import Wanted

T = TypeVar("T")

# First tokens of a plain text that stay in sight.
NUM_SINKS = 4


@dataclass
class Server:
    """A model with its streams, and who may use them.

    Args:
        pool: with a tokenizer that has a chat template.
        name: of the model.
        window: of the streams, in tokens.
        defaults: fields of `SamplingParams` that a request may change.
        keys: of clients.
        limits: of clients.
        folder: where sessions are saved; None for nowhere.
    """

    pool: StreamPool
    name: str
    window: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Keys = field(default_factory=lambda: Keys({}))
    limits: Limits = field(default_factory=Limits)
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.metrics = Metrics(
            {
                "sinkattn_sessions": ("Sessions", lambda: len(self.sessions)),
                "sinkattn_streams": ("Streams that are open", lambda: len(self.pool)),
                "sinkattn_cache_bytes": ("Bytes of keys and values on the device", lambda: self.pool.nbytes),
                "sinkattn_rows": ("Rows for streams on the device", lambda: self.pool.num_rows),
                "sinkattn_rows_in_use": ("Rows of streams that run", lambda: self.pool.num_rows_in_use),
                "sinkattn_requests_at_work": ("Requests at work", lambda: self.num_at_work),
            }
        )
        store = None if self.folder is None else Store(self.folder, self.pool)
        self.sessions = Sessions(self.pool, self.limits, self._restored, store)
        self.text_opener = TextOpener(NUM_SINKS)
        self._encoder = lru_cache(maxsize=256)(self._new_encoder)
        self.end_ids = frozenset(end_ids(self.pool.model))
        self._model = PoolModel(self.pool.model, self.tokenizer)
        self.is_ending = False
        """Whether it takes no more requests."""
        is_shared, count = len(self.keys) > 1, self.limits.requests
        if is_shared:  # whoever has all streams leaves none to others, however many requests there may be
            count = min(count, self.pool.max_open)
        self._places = Places(count, is_shared=is_shared)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        assert self.pool.tokenizer is not None
        return self.pool.tokenizer

    async def chat_opener(self, system: str | None, kind: object = None) -> ChatOpener:
        """What begins a chat with a system prompt, or if there is none, a chat of a kind.

        Raises ApiError for a model that cannot chat, or not with this system prompt.
        """
        if system is None and isinstance(kind, tuple):
            _, system = kind
        try:
            return await asyncio.to_thread(self._opener, system)  # a long text takes a while
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error

    def _opener(self, system: str | None) -> ChatOpener:
        return ChatOpener(system, self._encoder(system), self.window)

    def _new_encoder(self, system: str | None) -> MessageEncoder:
        encoder = MessageEncoder(self.tokenizer, system)
        if (count := len(encoder.prefix)) > self.pool.max_prefix:  # or those of long texts would be kept
            raise ValueError(f"system prompt: expected up to {self.pool.max_prefix} tokens, got {count}")
        return encoder

    def _restored(self, stream: Stream, notes: dict[str, Any]) -> Content[Any]:
        if "turns" not in notes:
            return TextStream(stream)
        return Conversation.restored(stream, self._opener(notes["system"]), notes)

    async def ids_of(self, name: str, text: str | list[int], *, is_first: bool) -> list[int]:
        """Ids of a text; raises ApiError for ids that the model does not have."""
        try:
            return await asyncio.to_thread(self._model.ids_of, name, text, is_first=is_first)
        except ValueError as error:
            raise ApiError(400, str(error), param=name) from error

    def check_model(self, name: str) -> None:
        """Raise ApiError for a model that is not served."""
        if name != self.name:
            message = f"model: there is no model {name!r} here, but {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def num_tokens(self, wanted: int | None) -> int:
        """Tokens of a reply for which a request asks, or the default; raises ApiError for too many."""
        if wanted is not None and wanted > self.limits.max_tokens:
            raise ApiError(
                400, f"max_tokens: expected up to {self.limits.max_tokens}, got {wanted}", param="max_tokens"
            )
        return min(self.limits.max_tokens, max(1, self.window // 2)) if wanted is None else wanted

    def wanted(self, body: Generated, max_tokens: int | None) -> Wanted:
        """What a request that has come wants; raises ApiError for another model, and for what is not possible."""
        self.check_model(body.model)
        first = FirstToken(self.metrics)
        return Wanted(first, self.sampling(**body.sampling()), self.num_tokens(max_tokens), body.stops)

    def sampling(self, **given: Any) -> SamplingParams:
        """How tokens are chosen; raises ApiError for an invalid value."""
        try:
            return SamplingParams(**{**self.defaults, **given})
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition(":")[0]) from error

    @property
    def num_at_work(self) -> int:
        """Requests at work."""
        return self._places.num_taken

    @asynccontextmanager
    async def at_work(self, owner: str) -> AsyncIterator[None]:
        """While a request is at work; raises ApiError if there are too many already, or if the server ends."""
        if self.is_ending:
            raise ApiError(503, "server: is shutting down", retry_after=10)
        with self._places.taken(owner):
            yield


def new_id(prefix: str) -> str:
    """An id as OpenAI's API has them."""
    return f"{prefix}{uuid.uuid4().hex}"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away; raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
