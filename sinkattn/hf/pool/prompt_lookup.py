"""`LookupDrafter`: what followed the last tokens of a stream when they were there before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sinkattn.hf.pool.drafts import DraftRequest
from sinkattn.hf.pool.state import StreamState


class LookupDrafter:
    """Drafts from the tokens in sight.

    Args:
        num_tokens: the most tokens.
        max_ngram: the most last tokens that are looked for.
    """

    nbytes = 0

    def __init__(self, num_tokens: int, max_ngram: int) -> None:
        self.num_tokens, self._max_ngram = num_tokens, max_ngram

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See `Drafter`."""
        return [following(x.state.ids.in_sight(x.begin, [x.last_id]), x.most, self._max_ngram) for x in requests]

    def drop(self, state: StreamState) -> None:
        """See `Drafter`; nothing is kept."""


def following(ids: np.ndarray, count: int, max_ngram: int) -> list[int]:
    """What followed the last ids where as many of them as possible were there before, the last time.

    What reaches the end goes on with itself, as in a text that repeats itself.

    Args:
        ids: int64 ``[tokens]``.
        count: how many ids.
        max_ngram: the most last ids that are looked for.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    for back in range(1, min(max_ngram, len(ids))):
        longer = ends[ends >= back]
        longer = longer[ids[longer - back] == ids[-1 - back]]
        if not len(longer):
            break
        ends = longer
    if not len(ends):
        return []
    period = ids[ends[-1] + 1 :].tolist()
    return [period[index % len(period)] for index in range(count)]
