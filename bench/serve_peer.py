"""A server with the chats that it is measured by, and how equal its replies are to those of another."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np
from serve_client import Chat, Reply, WrongAnswer
from serve_process import Server


@dataclass(frozen=True)
class Burst:
    """What came of all chats sending at the same time.

    Attributes:
        seconds: until all had their replies.
        replies: of all chats.
    """

    seconds: float
    replies: list[Reply]

    def figures(self) -> dict[str, float | None]:
        """Requests per second, percentiles of milliseconds, and tokens before a reply with the share that was kept."""
        figures: dict[str, float | None] = {"requests_per_second": len(self.replies) / self.seconds}
        for name in ("first", "whole"):
            seconds = [getattr(reply, name) for reply in self.replies]
            figures |= {f"{name}_p{percent}_ms": 1e3 * float(np.percentile(seconds, percent)) for percent in (50, 95)}
        tokens = sum(reply.prompt_tokens for reply in self.replies)
        return {**figures, "prompt_tokens": tokens / len(self.replies), "reused": reused_share(self.replies)}


class Peer:
    """A server with its chats.

    Args:
        server: that runs.
        chats: with the history that it is sent first.

    Attributes:
        bursts: of the first turn and of all rounds.
        error: why there are no more of them.
        resident_bytes: memory of the server after the last burst.
    """

    def __init__(self, server: Server, chats: Sequence[Chat]) -> None:
        self.server, self.chats = server, chats
        self.bursts: list[Burst] = []
        self.error: str | None = None
        self.resident_bytes = 0

    @property
    def rounds(self) -> list[Burst]:
        """Bursts of later turns. To a server that keeps nothing the first turn is one of these."""
        return self.bursts[1:] if self.server.kind.keeps else self.bursts

    async def warm_up(self, chat: Chat) -> None:
        """Let the server reply to another chat; raises WrongAnswer."""
        async with self.server.client() as http:
            await self._checked(chat, http)

    async def burst(self, turns: int, limit: float) -> str:
        """Let all chats take so many turns at the same time, and say how long it took; raises WrongAnswer.

        If it takes more seconds than ``limit``, the server is ended, and is measured no more.
        """
        async with self.server.client() as http:
            begin = time.perf_counter()
            try:
                taken = await asyncio.wait_for(
                    asyncio.gather(*(self._turns(x, turns, http) for x in self.chats)), limit
                )
            except asyncio.TimeoutError:
                self.error = f"took more than {limit:.0f} seconds for {turns * len(self.chats)} requests"
                self.server.close()
                return self.error
            seconds = time.perf_counter() - begin
        self.bursts.append(Burst(seconds, [reply for replies in taken for reply in replies]))
        self.resident_bytes = self.server.resident_bytes()
        return f"{seconds:.1f} s"

    async def _turns(self, chat: Chat, count: int, http: httpx.AsyncClient) -> list[Reply]:
        return [await self._checked(chat, http) for _ in range(count)]

    async def _checked(self, chat: Chat, http: httpx.AsyncClient) -> Reply:
        try:
            return await chat.turn(http)
        except WrongAnswer as error:
            raise WrongAnswer(f"{self.server.kind.name}: {error}") from error


def reused_share(replies: Sequence[Reply]) -> float | None:
    """Share of the tokens before replies that the server had already; None if it does not tell."""
    reused = [reply.reused_tokens for reply in replies if reply.reused_tokens is not None]
    return sum(reused) / sum(reply.prompt_tokens for reply in replies) if reused else None


@dataclass(frozen=True)
class Agreement:
    """How equal the replies of two servers to the same messages are.

    Attributes:
        tokens: of these replies.
        equal: those that both have at the same place.
        lengths: tokens of the same messages as each of them counts, where these numbers differ; None if nowhere.
    """

    tokens: int
    equal: int
    lengths: tuple[int, int] | None

    @property
    def share(self) -> float:
        """Of tokens that are equal."""
        return self.equal / self.tokens if self.tokens else 1.0


def agreement(ours: Sequence[Chat], theirs: Sequence[Chat]) -> Agreement:
    """Compare chats that began with the same messages, each up to its first reply that differs."""
    tokens = equal = 0
    lengths = None
    for our, their in zip(ours, theirs, strict=True):
        for mine, other in zip(our.replies, their.replies, strict=False):
            words, others = mine.text.split(), other.text.split()
            tokens += len(words)
            equal += sum(map(str.__eq__, words, others))
            if mine.prompt_tokens != other.prompt_tokens:
                lengths = lengths or (mine.prompt_tokens, other.prompt_tokens)
            if words != others:
                break  # from here on the messages differ
    return Agreement(tokens, equal, lengths)
