"""`Reply`: the tokens of a reply while they are generated, with their text and why it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import aclosing
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from sinkattn.hf.pool.stops import StopStrings
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import DECODE_CONTEXT, stream_text

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
        self._tokenizer, self._stop = tokenizer, StopStrings(stop)
        self._max_tokens = max_tokens
        self._before = stream.in_sight[-DECODE_CONTEXT:]
        self._tokens = stream.generate_async(max_tokens, stop=stop_ids, sampling=sampling)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    async def pieces(self) -> AsyncIterator[Piece]:
        """Its pieces, one for each token and one at the end. Closing this ends the reply."""
        waiting: list[int] = []
        texts = stream_text(self._tokenizer, _taken(waiting), self._before)
        async with aclosing(self._tokens) as tokens:  # type: ignore[type-var]  # it is a generator
            async for token in tokens:
                self.num_tokens += 1
                waiting.append(token)
                yield Piece(self._stop.add(next(texts)), token)
                if self._stop.found:
                    self.finish_reason = "stop"
                    return
        self.finish_reason = "length" if self.num_tokens == self._max_tokens else "stop"
        yield Piece(self._stop.add(next(texts, "")) + self._stop.rest(), None)


def _taken(items: list[int]) -> Iterator[int]:
    """Takes items out of a list until it is empty."""
    while items:
        yield items.pop()
