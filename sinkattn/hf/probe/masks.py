"""Which mask pattern a model asks for: full causal, sliding window or chunked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# A sliding window as long as this is none.
LONGEST_WINDOW = 1 << 18


class MaskPattern(NamedTuple):
    """Which tokens a mask shows to a query: all before it, the last ``size``, or those of its own chunk of ``size``."""

    kind: Literal["all", "window", "chunk"]
    size: int = 0


def mask_pattern(mask_function: Callable, device: torch.device | None) -> MaskPattern | None:
    """Pattern of a mask function of transformers; None if it is not full causal, sliding window or chunked."""

    def shown(query: Tensor | int, key: Tensor | int) -> Tensor:
        query, key = (torch.as_tensor(x, device=device) for x in (query, key))
        return mask_function(query.new_zeros(()), query.new_zeros(()), query, key).expand_as(query + key)

    distance = torch.arange(LONGEST_WINDOW, device=device)
    queries = (4 * LONGEST_WINDOW, 4 * LONGEST_WINDOW + 54321)  # far enough for any window or chunk to have begun
    try:
        if any(shown(query, query + 1 + distance).any() for query in queries):
            return None
        sees_first = shown(distance, 0)
        size = int(sees_first.sum())
        for kind in ("all",) if size == LONGEST_WINDOW else ("window", "chunk"):
            reach = [LONGEST_WINDOW if kind == "all" else size if kind == "window" else q % size + 1 for q in queries]
            if all(torch.equal(shown(q, q - distance), distance < r) for q, r in zip(queries, reach, strict=True)):
                return MaskPattern(kind, 0 if kind == "all" else size)
    except (IndexError, RuntimeError, TypeError, ZeroDivisionError):
        pass  # it depends on more than how far apart two tokens are
    return None
