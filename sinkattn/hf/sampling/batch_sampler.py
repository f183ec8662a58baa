"""`BatchSampler`: chooses the next tokens of many streams in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sinkattn.hf.sampling.random_numbers import Draws
from sinkattn.hf.sampling.stages import STAGES, Apply, weights
from sinkattn.hf.sampling.stream_sampler import StreamSampler

_Rows: TypeAlias = Tensor | None
"""Numbers of rows, int64; None for all rows of the batch."""
_Logprobs: TypeAlias = tuple[Sequence[int], Tensor, Tensor, Tensor]
"""Numbers of rows, the log-probability of each token, ``[rows]``, and ids and values of the largest, ``[rows, n]``."""


class ScoredToken(int):
    """A token id with the log-probabilities that `SamplingParams.logprobs` asks for.

    Attributes:
        logprob: that of the token.
        top_logprobs: those of the most likely tokens, by id, the most likely first.
    """

    logprob: float
    top_logprobs: dict[int, float]


@dataclass(frozen=True)
class Chosen:
    """Tokens of a batch, still on the device.

    Attributes:
        ids: int64 ``[batch]``; the size of the vocabulary for a row of which no token can be sampled.
    """

    ids: Tensor
    _vocabulary: int
    _streams: Sequence[StreamSampler]
    _logprobs: _Logprobs | None

    def read(self) -> list[int]:
        """Bring the tokens to the host, and let grammars go on by them: to be called once.

        A stream that asks for log-probabilities gets a `ScoredToken`.

        Raises:
            RuntimeError: if none can be chosen: all of them forbidden, or logits with NaN or, to sample from, infinity.
                With nothing but greedy streams whose logits nothing changes, logits are not looked at so closely.
        """
        tokens = self.ids.tolist()
        for row, (token, stream) in enumerate(zip(tokens, self._streams, strict=True)):
            if token == self._vocabulary:
                raise RuntimeError(
                    f"logits: expected finite ones, and a token that is not forbidden, in every row, got row {row}"
                )
            if stream.grammar is not None:
                stream.grammar.accept(token)
        if self._logprobs is not None:
            rows, *values = self._logprobs
            for row, logprob, ids, logprobs in zip(rows, *(value.tolist() for value in values), strict=True):
                tokens[row] = ScoredToken(tokens[row])
                tokens[row].logprob = logprob
                number = self._streams[row].params.logprobs
                tokens[row].top_logprobs = dict(zip(ids[:number], logprobs[:number], strict=True))
        return tokens


class BatchSampler:
    """Chooses tokens for the streams of a batch, on the device of their logits.

    What a stream gets depends on its logits, its ids in sight and its `StreamSampler` alone, not on the batch. A batch
    of greedy streams costs an argmax.
    """

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def choose(self, logits: Tensor, streams: Sequence[StreamSampler], ids: Tensor | None = None) -> Chosen:
        """Choose the next token of each stream, without waiting for the device.

        Only processors make it wait, for the number of known ids. With a grammar, the last token must have been read.

        Args:
            logits: ``[batch, vocabulary]``.
            streams: one for each row. The number of their draws is raised.
            ids: int64 ``[batch, tokens]``, the tokens in sight in the order of the stream; negative where none is known
                or the row has fewer. May be None if no stream's ``params.needs_ids``.
        """
        plan = self._plan
        if plan is None or not plan.is_for(streams, logits.device):
            plan = self._plan = _Plan(streams, logits.device)
        chosen = plan.sample(logits, ids)
        return Chosen(chosen, logits.shape[1], plan.streams, plan.logprobs(logits, chosen))


class _Plan:
    """What a batch needs on the device, prepared once for all steps of the same streams."""

    def __init__(self, streams: Sequence[StreamSampler], device: torch.device) -> None:
        self.streams = tuple(streams)
        self._device = device
        self._stages: list[tuple[_Rows, Apply]] = []
        for stage in STAGES:
            if rows := [row for row, stream in enumerate(streams) if stage.wanted(stream.params)]:
                self._stages.append((self._rows(rows), stage.prepare([streams[row] for row in rows], device)))
        rows = [row for row, stream in enumerate(streams) if not stream.params.is_greedy]
        self._sampled, self._sampled_rows = [streams[row] for row in rows], self._rows(rows)
        self._drawn = [stream.draws for stream in self._sampled]
        self._draws = Draws([stream.seed for stream in self._sampled], self._drawn, device)
        self._scored = [row for row, stream in enumerate(streams) if stream.params.logprobs is not None]
        self._scored_rows = self._rows(self._scored)
        self._most_logprobs = max((streams[row].params.logprobs or 0 for row in self._scored), default=0)

    def _rows(self, rows: list[int]) -> _Rows:
        return None if len(rows) == len(self.streams) else torch.tensor(rows, dtype=torch.int64, device=self._device)

    def is_for(self, streams: Sequence[StreamSampler], device: torch.device) -> bool:
        """Whether it was prepared for these streams, and they are where it left them."""
        return (
            self.streams == tuple(streams)
            and self._device == device
            and self._drawn == [stream.draws for stream in self._sampled]
        )

    def sample(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        """Choose a token for each row: int64 ``[batch]``."""
        if not self._stages and not self._sampled:
            return logits.argmax(dim=1)
        scores = logits.to(torch.float32, copy=bool(self._stages))
        for rows, apply in self._stages:
            changed = apply(_of_rows(scores, rows), None if ids is None else _of_rows(ids, rows))
            scores = changed if rows is None else scores.index_copy_(0, rows, changed)
        if not self._sampled:
            return _likeliest(scores)
        cumulative = weights(_of_rows(scores, self._sampled_rows)).cumsum_(dim=1)
        # The first token at which the sum is above the target has a weight above zero.
        target = self._draws.uniform().unsqueeze(1) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        for row, stream in enumerate(self._sampled):
            stream.draws = self._drawn[row] = stream.draws + 1
        if self._sampled_rows is None:
            return drawn
        return _likeliest(scores).index_copy(0, self._sampled_rows, drawn)

    def logprobs(self, logits: Tensor, chosen: Tensor) -> _Logprobs | None:
        """Log-probabilities for the rows that ask for them; None if no row does."""
        if not self._scored:
            return None
        logprobs = _of_rows(logits, self._scored_rows).float().log_softmax(dim=1)
        own = logprobs.gather(1, _of_rows(chosen, self._scored_rows).clamp(max=logits.shape[1] - 1).unsqueeze(1))
        largest = logprobs.topk(min(self._most_logprobs, logits.shape[1]), dim=1)
        return self._scored, own.squeeze(1), largest.indices, largest.values


def _likeliest(scores: Tensor) -> Tensor:
    """The first token with the highest score in each row; if there is none, the size of the vocabulary."""
    highest, tokens = scores.max(dim=1)
    return tokens.masked_fill_(~(highest > -torch.inf), scores.shape[1])


def _of_rows(values: Tensor, rows: _Rows) -> Tensor:
    return values if rows is None else values.index_select(0, rows)
