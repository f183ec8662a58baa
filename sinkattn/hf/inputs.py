"""Inputs of an enabled model's forward: the mask and the positions of its new tokens, and the checks of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.sink_cache import SinkCache

# Tensor arguments of a model that carry no content besides the ids.
ID_ARGUMENTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "logits_to_keep",
}


def has_only_ids(kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a model or its `generate` hold only ids, no images or embeddings."""
    # Images are passed as tensors, or encoded as mappings.
    return not any(isinstance(x, (Tensor, Mapping)) and name not in ID_ARGUMENTS for name, x in kwargs.items())


def can_read_on_host(x: Tensor, tokens: int) -> bool:
    """False for a one-token step on a GPU (host sync) or under torch.compile (graph break)."""
    return tokens > 1 or (x.is_cpu and not torch.compiler.is_dynamo_compiling())


def new_token_mask(attention_mask: Tensor | None, cache: SinkCache, tokens: int) -> Tensor | None:
    """Token mask of the new tokens: bool ``[batch, tokens]``; None only if none of them is padding.

    Rows that have ended get padding.

    Args:
        attention_mask: mask of the new tokens, or of the past columns and the new tokens.

    Raises:
        ValueError: the mask of past columns is not the one that they were fed with.
    """
    token_mask = None
    if attention_mask is not None:
        token_mask = attention_mask[:, -tokens:] != 0
        if can_read_on_host(attention_mask, tokens):
            cache.state.check_past_mask(attention_mask[:, :-tokens])
            token_mask = None if token_mask.all() else token_mask
    if tokens == 1 and (ended_rows := cache.ended_rows) is not None:
        not_ended = ~ended_rows.unsqueeze(1)
        token_mask = not_ended if token_mask is None else token_mask & not_ended
    return token_mask


def stream_positions(cache: SinkCache, token_mask: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Stream positions of new tokens, int64 ``[1 or batch, tokens]``; those of padding are arbitrary."""
    seen = cache.seen
    if token_mask is not None:
        ranks = (token_mask.cumsum(dim=1) - 1).clamp(min=0)
        return ranks if seen is None else ranks + seen.unsqueeze(1)
    ranks = torch.arange(tokens, device=device).unsqueeze(0)
    if seen is None:
        return ranks
    return ranks + (seen if cache.has_padding else seen[:1]).unsqueeze(1)


def check_positions(position_ids: Any, positions: Tensor, token_mask: Tensor | None = None) -> None:
    """Raise ValueError unless ``position_ids`` are ``positions``, ``[1 or batch, tokens]``, except at padding."""
    if position_ids is None:
        return
    tokens = positions.shape[1]
    if position_ids.ndim > 2 or position_ids.shape[-1] != tokens:
        raise ValueError(f"position_ids: expected [batch, {tokens}], or None, got {list(position_ids.shape)}")
    if not can_read_on_host(position_ids, tokens):
        return
    wrong = position_ids != positions
    if token_mask is not None:
        wrong = wrong & token_mask
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids: expected consecutive positions from {positions[:, 0].tolist()} on, or None, "
            f"got {int(position_ids.expand_as(wrong)[row, column])} at [{row}, {column}]"
        )
