"""Read a stream as it comes, and say in between what comes next."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.learner import OnlineLearner
from sinkattn.hf.stream import keep_last_logits, stream_tokens
from sinkattn.hf.versions import forward_cache

# Tokens of a forward.
CHUNK = 512


class Follower:
    """Reads a stream, and says in between what comes next, without a trace of it in the stream.

    What is said is generated on a fork of the stream, which is dropped. So it is that of a new stream with the same
    tokens, bit for bit, in every model, and what follows in the stream does not depend on it.

    Args:
        model: a model prepared by `sinkattn.enable`.
        learner: learns from what is read, each token after it has been predicted; made for ``model``.

    Attributes:
        cache: the stream.
        num_read: tokens that were read.
        num_said: tokens that were generated.
    """

    def __init__(self, model: PreTrainedModel, learner: OnlineLearner | None = None) -> None:
        self._model, self._learner = model, learner
        self.cache = SinkCache(model) if learner is None else learner.cache
        self.num_read = self.num_said = 0
        self._unfed: list[tuple[int, bool]] = []
        """The last token, which is fed with the next ones (see `stream_tokens`), and whether it is learned from."""
        self._total_loss, self._num_predicted = 0.0, 0

    @property
    def loss(self) -> float:
        """Mean loss in nats of the tokens that were learned from, each from before it was; NaN without any."""
        return self._total_loss / self._num_predicted if self._num_predicted else float("nan")

    def read(self, ids: Sequence[int], *, learn: bool = True) -> None:
        """Read the next tokens; ``learn``: whether the learner, if there is one, learns from them."""
        tokens = [*self._unfed, *((token, learn) for token in ids)]
        self._unfed = tokens[-1:]
        for is_learned, group in groupby(tokens[:-1], key=lambda each: each[1]):
            part = torch.tensor([token for token, _ in group], device=self._model.device)
            for chunk in part.split(CHUNK):
                self._feed(chunk, is_learned)
        self.num_read += len(ids)

    def say(self, ids: Sequence[int] = (), **options: Any) -> Iterator[int]:
        """Generate what comes next after all that was read and ``ids``.

        Args:
            ids: a prompt, which is not part of the stream either.
            options: those of `stream_tokens`.

        Raises:
            ValueError: for an invalid option, or before any token was read, without ``ids``.
        """
        prompt = [*(token for token, _ in self._unfed), *ids]
        return self._counted(stream_tokens(self._model, prompt, copy.deepcopy(self.cache), **options))

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.num_said += 1
            yield token

    def _feed(self, ids: torch.Tensor, is_learned: bool) -> None:
        if self._learner is None:
            options: dict[str, Any] = {forward_cache(self._model): self.cache, **keep_last_logits(self._model)}
            with torch.no_grad():
                self._model(input_ids=ids.unsqueeze(0), use_cache=True, **options)
            return
        num_predicted = len(ids) - (self.cache.tokens_seen == 0)
        loss = self._learner.step(ids, torch.full_like(ids, is_learned, dtype=torch.bool))
        if is_learned and num_predicted:
            self._total_loss += loss * num_predicted
            self._num_predicted += num_predicted
