"""`Reply`: the tokens of a reply while they are generated, with their text and why it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from sinkattn.hf.pool.stops import StopStrings
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import DECODE_CONTEXT, stream_text
from sinkattn.serve.uninterrupted import uninterrupted

FinishReason = Literal["stop", "length"]


class Piece(NamedTuple):
    """A piece of a reply."""

    text: str
    """May be empty: bytes are held until their character is whole, and text that may begin a stop string."""
    token: int | None
    """The token that it comes with, of `ScoredToken` with log-probabilities; None for what was held at the end."""


class Reply:
    """Generates a reply in a stream.

    Args:
        stream: up to the reply.
        tokenizer: of the pool.
        max_tokens: the most tokens.
        stop_ids: tokens that end it.
        stop: texts that end it, and are left out.
        sampling: how tokens are chosen.

    Attributes:
        num_tokens: so far.
        finish_reason: None until it has ended.
    """

    def __init__(
        self,
        stream: Stream,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        stop_ids: Collection[int],
        stop: Sequence[str],
        sampling: SamplingParams,
    ) -> None:
        self._stream, self._tokenizer, self._stop = stream, tokenizer, StopStrings(stop)
        self._max_tokens = max_tokens
        self._before = stream.in_sight[-DECODE_CONTEXT:]
        self._tokens = stream.generate_async(max_tokens, stop=stop_ids, sampling=sampling)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces, one for each token and one at the end; `close` follows."""
        waiting: list[int] = []
        texts = stream_text(self._tokenizer, _taken(waiting), self._before)
        pieces = list[str]()
        num_sure = 0
        async for token in self._tokens:
            self.num_tokens += 1
            waiting.append(token)
            pieces.append(next(texts))
            sure = self._stop.add(pieces[-1])
            num_sure += len(sure)
            if self._stop.found:
                await self.close()
                await uninterrupted(asyncio.to_thread(self._cut, pieces, num_sure))
                self.finish_reason = "stop"
            yield Piece(sure, token)
            if self._stop.found:
                return
        is_cut = self.num_tokens == self._max_tokens and not self._stream.is_text_complete
        self.finish_reason = "length" if is_cut else "stop"
        yield Piece(self._stop.add(next(texts, "")) + self._stop.rest(), None)

    async def close(self) -> None:
        """End it, if it has not ended by itself; not while a piece is awaited."""
        await self._tokens.aclose()  # type: ignore[attr-defined]  # it is a generator

    def _cut(self, pieces: Sequence[str], count: int) -> None:
        """Let the stream have so many characters of these texts of its last tokens: what the client sees of them."""
        num_kept, end = 0, 0
        for index, piece in enumerate(pieces, 1):
            if end + len(piece) > count:
                break
            if piece:  # or the bytes of this token belong to the piece of a later one
                num_kept, end = index, end + len(piece)
        rest = "".join(pieces)[end:count]
        self._stream.rollback(len(pieces) - num_kept)
        self._stream.feed(self._tokenizer(rest, add_special_tokens=False).input_ids, begins_message=False, wait=False)


def _taken(items: list[int]) -> Iterator[int]:
    """Takes items out of a list until it is empty."""
    while items:
        yield items.pop()
