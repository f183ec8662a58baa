"""Choose the next token of a stream: greedy or sampled, with penalties over the tokens in sight."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinkattn.hf.cache.id_history import UNKNOWN_ID
from sinkattn.hf.cache.sink_cache import SinkCache


class Sampler:
    """Chooses tokens by the logits processors of transformers, in the order of its `generate`.

    Args:
        temperature: divides the logits before sampling; 0 for greedy decoding.
        top_k: sample only from the k most likely tokens; 0 for all.
        top_p: sample only from the most likely tokens that together reach this probability.
        min_p: sample only from tokens with at least this fraction of the probability of the most likely one; 0 for all.
        repetition_penalty: the logits of tokens in sight are divided by it if positive, else multiplied; 1 for none.
        exempt_ids: tokens that `repetition_penalty` leaves as they are.
        seed: for sampling; None uses torch's global generator.
        device: of the logits.

    Raises:
        ValueError: for an invalid argument.
    """

    def __init__(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        exempt_ids: Collection[int],
        seed: int | None,
        device: torch.device,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature: expected 0 or more, got {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {top_k}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {top_p}")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p: expected 0 to 1, got {min_p}")
        if not repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected more than 0, got {repetition_penalty}")
        self._is_greedy = temperature == 0
        self._penalty = None if repetition_penalty == 1 else RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
        self._exempt = torch.tensor(sorted(exempt_ids), dtype=torch.int64, device=device)
        self._warpers = LogitsProcessorList()
        if temperature not in (0, 1):
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            self._warpers.append(MinPLogitsWarper(float(min_p)))
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def choose(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Choose a token: int64 ``[1, 1]``.

        Args:
            logits: ``[1, vocabulary]``.
            ids: int64 ``[1, tokens]``, the tokens in sight, the last one known.
        """
        if self._penalty is not None:
            known_ids = torch.where(ids == UNKNOWN_ID, ids[:, -1:], ids)
            penalized = self._penalty(known_ids, logits.float())  # type: ignore[arg-type]  # LongTensor, a legacy type
            penalized[:, self._exempt] = logits[:, self._exempt].float()
            logits = penalized
        if self._is_greedy:
            return logits.argmax(dim=-1, keepdim=True)
        scores = self._warpers(ids, logits.float())  # type: ignore[arg-type]  # LongTensor, a legacy type
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)


class IdsInSight:
    """Ids of the tokens of one stream that its last token sees, sinks and window, in constant memory.

    Args:
        cache: the stream; the ids that it recorded come first.
        device: of the ids.

    Attributes:
        ids: int64 ``[1, tokens]``, in the order of the stream; `UNKNOWN_ID` where none is recorded.
    """

    def __init__(self, cache: SinkCache, device: torch.device) -> None:
        self._num_sinks, self._window = cache.layout.num_sinks, cache.layout.window
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=device)
        if cache.seen is not None and cache.tokens_seen:
            seen = int(cache.seen[0])
            [(numbers, ids), *_] = cache.state.history.known_tokens([seen])
            evicted = max(0, seen - self._num_sinks - self._window)
            visible = (numbers < self._num_sinks) | (numbers >= self._num_sinks + evicted)
            ranks = numbers - torch.where(numbers < self._num_sinks, 0, evicted)
            in_sight = torch.full((1, seen - evicted), UNKNOWN_ID)
            in_sight[0, ranks[visible]] = ids[visible]
            self.ids = in_sight.to(device)

    def append(self, ids: Tensor) -> None:
        """Append the next tokens of the stream, int64 ``[1, tokens]``."""
        self.ids = torch.cat((self.ids, ids), dim=1)
        if self.ids.shape[1] > self._num_sinks + self._window:
            self.ids = torch.cat((self.ids[:, : self._num_sinks], self.ids[:, -self._window :]), dim=1)
