"""`Chooser`: the next tokens of streams, one of each, or as many as were drafted right and one more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sinkattn.hf.cache.id_history import UNKNOWN_ID
from sinkattn.hf.pool.state import Choice, StreamState
from sinkattn.hf.pool.transfer import to_device
from sinkattn.hf.sampling.batch_sampler import BatchSampler


class Drafted(NamedTuple):
    """Tokens that were drafted for a stream, and run."""

    ids: Sequence[int]
    logits: Tensor
    """After each of them: ``[tokens, vocabulary]``."""


class Chooser:
    """Chooses tokens of streams by their samplers, one after the other: what is drafted changes none of them."""

    def __init__(self) -> None:
        self._sampler = BatchSampler()

    def choose(
        self, states: Sequence[StreamState], logits: Tensor, drafted: Mapping[StreamState, Drafted]
    ) -> list[list[Choice]]:
        """Choose the tokens that follow those in memory.

        Args:
            states: the streams.
            logits: after the last token of each: ``[streams, vocabulary]``.
            drafted: what was drafted for some of them.

        Returns:
            For each stream one token, and another one for each drafted token before it that is the one that was chosen.
            None where no token can be chosen; then the stream has the error.
        """
        chosen = dict(zip(states, self._first_choices(states, logits), strict=True))
        going, count = [*states], 0
        while going := [x for x in going if x in drafted and _is_right(x, chosen[x], drafted[x].ids)]:
            logits = torch.stack([drafted[x].logits[count] for x in going])
            try:
                following = self._choose(going, logits, [chosen[x] for x in going])
            except Exception:
                break  # it comes again when the tokens before have been used
            for state, choice in zip(going, following, strict=True):
                chosen[state].append(choice)
            count += 1
        for state, (ids, _) in drafted.items():
            state.note_drafts(len(ids), max(0, len(chosen[state]) - 1))
        return [*chosen.values()]

    def _first_choices(self, states: Sequence[StreamState], logits: Tensor) -> list[list[Choice]]:
        try:
            return [[choice] for choice in self._choose(states, logits, [()] * len(states))]
        except Exception:  # the fault of one of them
            return [self._choose_alone(state, row) for state, row in zip(states, logits.split(1), strict=True)]

    def _choose_alone(self, state: StreamState, logits: Tensor) -> list[Choice]:
        try:
            return self._choose([state], logits, [()])
        except Exception as error:
            state.error = error
            return []

    def _choose(
        self, states: Sequence[StreamState], logits: Tensor, chosen: Sequence[Sequence[Choice]]
    ) -> list[Choice]:
        """Choose a token of each stream, to follow those that were chosen already."""
        samplers, ids = [state.sampler for state in states], None
        if any(sampler.params.needs_ids for sampler in samplers):
            in_sight = [
                state.ids.in_sight(state.window_begin(len(choices) - 1), [choice.token for choice in choices])
                for state, choices in zip(states, chosen, strict=True)
            ]
            ids = to_device(_padded(in_sight), logits.device)
        before = [state.begin_choice() for state in states]
        try:
            tokens = self._sampler.choose(logits, samplers, ids).read()
        except BaseException:
            for state, each in zip(states, before, strict=True):
                state.undo_choice(each)
            raise
        return [Choice(token, each) for token, each in zip(tokens, before, strict=True)]


def _is_right(state: StreamState, choices: Sequence[Choice], drafts: Sequence[int]) -> bool:
    """Whether the last token that was chosen is the one that was drafted, and another one may follow it."""
    grammar = state.sampler.grammar
    if not 0 < len(choices) <= len(drafts) or (grammar is not None and grammar.is_complete):
        return False
    return choices[-1].token == drafts[len(choices) - 1]


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Ids of different number: int64 ``[rows, most]``, `UNKNOWN_ID` where a row has fewer."""
    padded = np.full((len(rows), max(map(len, rows))), UNKNOWN_ID)
    for row, ids in zip(padded, rows, strict=True):
        row[len(row) - len(ids) :] = ids
    return torch.from_numpy(padded)
