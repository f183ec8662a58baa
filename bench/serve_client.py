"""Chats with a server that has OpenAI's API, and the times of its replies."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

SYSTEM = "Answer in words."
# Words of a question, and of a reply that was given before the measurement.
QUESTION, REPLY = 16, 16


class WrongAnswer(Exception):
    """A server has not answered as it should; the message is one line."""


@dataclass(frozen=True)
class Reply:
    """A reply, and its times in seconds since the request was sent.

    Attributes:
        text: of it.
        first: to the first text.
        whole: to the end.
        prompt_tokens: tokens before the reply.
        reused_tokens: those of them that the server had already; None if it does not tell.
    """

    text: str
    first: float
    whole: float
    prompt_tokens: int
    reused_tokens: int | None


class Chat:
    """A chat as its client knows it. All messages are sent with each request.

    Args:
        model: by which requests name it.
        words: of which messages are made, each with the space before it.
        seed: of the questions. Chats with the same seed and replies are the same.
        new_tokens: of a reply, each of them a word.

    Attributes:
        messages: so far.
        replies: of the server so far.
    """

    sends = "the whole history"

    def __init__(self, model: str, words: Sequence[str], seed: int, new_tokens: int) -> None:
        self._model, self._words, self._random, self._new_tokens = model, words, random.Random(seed), new_tokens
        self.messages = [{"role": "system", "content": SYSTEM}]
        self.replies: list[Reply] = []

    def grow(self, length: int, count: Callable[[list[dict[str, str]]], int]) -> None:
        """Make up messages until the chat has so many tokens; ``count`` counts those of messages."""
        while count(self.messages) < length:
            self.messages += [self.question(), {"role": "assistant", "content": self._text(REPLY)}]

    def question(self) -> dict[str, str]:
        """The next message of the user."""
        return {"role": "user", "content": self._text(QUESTION).strip()}

    async def turn(self, http: httpx.AsyncClient) -> Reply:
        """A question and the reply to it; raises WrongAnswer."""
        self.messages.append(self.question())
        reply = await ask(http, self.body())
        if len(reply.text.split()) != self._new_tokens:
            raise WrongAnswer(f"expected {self._new_tokens} words, got {reply.text!r}")
        self.messages.append({"role": "assistant", "content": reply.text})
        self.replies.append(reply)
        return reply

    async def forget(self, http: httpx.AsyncClient) -> None:
        """Let the server forget it, if it would not by itself."""

    def body(self) -> dict[str, Any]:
        """Of the request for a reply to the last message."""
        return {
            "model": self._model,
            "messages": self.messages,
            "max_tokens": self._new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def _text(self, count: int) -> str:
        return "".join(self._random.choices(self._words, k=count))


class SessionChat(Chat):
    """A chat that names a session of sinkattn's server, and sends only what is new."""

    sends = "the new message, in a session"

    def __init__(self, model: str, words: Sequence[str], seed: int, new_tokens: int) -> None:
        super().__init__(model, words, seed, new_tokens)
        self._session_id = f"bench-{seed}"

    async def forget(self, http: httpx.AsyncClient) -> None:
        """Let the server forget it."""
        (await http.delete(f"/v1/sessions/{self._session_id}")).raise_for_status()

    def body(self) -> dict[str, Any]:
        """Of the request for a reply to the last message."""
        new = self.messages if len(self.messages) == 2 else self.messages[-1:]
        return {**super().body(), "messages": new, "session_id": self._session_id, "append": True}


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    """The reply to a request for a stream of events; raises WrongAnswer if it is not whole."""
    text, finish_reason, usage = "", None, None
    first: float | None = None
    begin = time.perf_counter()
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise WrongAnswer(f"status {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise WrongAnswer(f"an error: {event['error']}")
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter()
                        text += piece
                    finish_reason = choice.get("finish_reason") or finish_reason
    except httpx.HTTPError as error:
        raise WrongAnswer(f"{type(error).__name__}: {error}") from error
    end = time.perf_counter()
    if first is None or finish_reason != "length" or usage is None or usage["completion_tokens"] != body["max_tokens"]:
        raise WrongAnswer(f"expected {body['max_tokens']} tokens, got {text!r}, {finish_reason}, {usage}")
    reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return Reply(text, first - begin, end - begin, usage["prompt_tokens"], reused)
