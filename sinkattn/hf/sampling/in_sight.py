"""The ids in sight of a stream, which penalties count."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkattn.hf.cache.id_history import UNKNOWN_ID
from sinkattn.hf.cache.sink_cache import SinkCache


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
