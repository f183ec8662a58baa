"""What a forward of an enabled model is given: which of its tokens are padding, and whether positions are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.sink_cache import SinkCache

# Tensors among the arguments of a model that say nothing which is not in the ids.
OF_IDS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "logits_to_keep",
}


def only_ids(kwargs: dict[str, Any]) -> bool:
    """Whether a model or its `generate` is given ids alone, as opposed to pictures or embeddings, too."""
    # Pictures come as tensors, or encoded, by name.
    return not any(isinstance(x, (Tensor, Mapping)) and name not in OF_IDS for name, x in kwargs.items())


def can_read_on_host(x: Tensor, tokens: int) -> bool:
    """Whether to read a tensor: that would stop a GPU at every step, and end a graph that is traced."""
    return tokens > 1 or (x.is_cpu and not torch.compiler.is_dynamo_compiling())


def present_tokens(attention_mask: Tensor | None, cache: SinkCache, tokens: int) -> Tensor | None:
    """Which of the new tokens are no padding, anywhere in their rows: bool ``[batch, tokens]``; None if all are.

    Args:
        attention_mask: ``[batch, tokens]``, or for past tokens, too.

    Raises:
        ValueError: a mask that leaves out past tokens which a row has seen, or has others.
    """
    present = None
    if attention_mask is not None:
        present = attention_mask[:, -tokens:] != 0
        if can_read_on_host(attention_mask, tokens):
            cache.state.check_past_mask(attention_mask[:, :-tokens])
            present = None if present.all() else present
    if cache.ended_rows is not None and tokens == 1:
        going_on = ~cache.ended_rows.unsqueeze(1)
        present = going_on if present is None else present & going_on
    return present


def stream_positions(cache: SinkCache, present: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Stream positions of new tokens, int64 ``[1 or batch, tokens]``; those that are not ``present`` have any."""
    seen = cache.seen
    if present is not None:
        ranks = (present.cumsum(dim=1) - 1).clamp(min=0)
        return ranks if seen is None else ranks + seen.unsqueeze(1)
    ranks = torch.arange(tokens, device=device).unsqueeze(0)
    if seen is None:
        return ranks
    return ranks + (seen if cache.has_padding else seen[:1]).unsqueeze(1)


def check_positions(position_ids: Any, positions: Tensor, present: Tensor | None = None) -> None:
    """Refuse positions that are not ``positions``, ``[1 or batch, tokens]``, where tokens are ``present``."""
    if position_ids is None:
        return
    tokens = positions.shape[1]
    if position_ids.ndim > 2 or position_ids.shape[-1] != tokens:
        raise ValueError(f"position_ids: expected [batch, {tokens}], or None, got {list(position_ids.shape)}")
    if not can_read_on_host(position_ids, tokens):
        return
    wrong = position_ids != positions
    if present is not None:
        wrong = wrong & present
    if wrong.any():
        raise ValueError(
            f"position_ids: expected those of the stream, from {positions[:, 0].tolist()} on, or None; a stream has no "
            "gaps"
        )
