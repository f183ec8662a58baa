"""Classify a mask function of transformers: full causal, sliding window or chunked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# A sliding window or chunk of this many tokens or more counts as full causal attention.
MAX_WINDOW = 1 << 18


MaskKind = Literal["full", "window", "chunk"]


class MaskPattern(NamedTuple):
    """Pattern of a causal mask: a query sees all earlier tokens, the last ``size`` or its chunk of ``size``."""

    kind: MaskKind
    size: int = 0


def classify_mask(mask_function: Callable, device: torch.device | None) -> MaskPattern | None:
    """Pattern of a mask function of transformers; None if it is not full causal, sliding window or chunked."""

    def is_visible(query: Tensor | int, key: Tensor | int) -> Tensor:
        query, key = (torch.as_tensor(x, device=device) for x in (query, key))
        return mask_function(query.new_zeros(()), query.new_zeros(()), query, key).expand_as(query + key)

    distance = torch.arange(MAX_WINDOW, device=device)
    queries = (4 * MAX_WINDOW, 4 * MAX_WINDOW + 54321)  # beyond the first window and chunk, whatever their size
    try:
        if any(is_visible(query, query + 1 + distance).any() for query in queries):
            return None
        size = int(is_visible(distance, 0).sum())  # queries that see the first token
        kinds: tuple[MaskKind, ...] = ("full",) if size == MAX_WINDOW else ("window", "chunk")
        for kind in kinds:
            reach = [MAX_WINDOW if kind == "full" else size if kind == "window" else q % size + 1 for q in queries]
            if all(torch.equal(is_visible(q, q - distance), distance < r) for q, r in zip(queries, reach, strict=True)):
                return MaskPattern(kind, 0 if kind == "full" else size)
    except (IndexError, RuntimeError, TypeError, ZeroDivisionError):
        pass  # the mask depends on more than the two positions, such as the contents of a batch
    return None
