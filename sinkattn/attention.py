"""Attention over the ring in storage order, in PyTorch operations: one pass, no copy of the cache, any device.

Softmax does not care for the order of keys, so slots are read as they lie; a slot's age says whether it is visible.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkattn.rope import table_dtype


class Section(NamedTuple):
    """Some keys that the queries of one call may see.

    query ``[batch, heads, tokens, head_dim]`` rotated for these keys; keys, values ``[batch, kv_heads, n, head_dim]``;
    distance ``[batch, tokens, n]`` int64 cache-relative distance from query to key, in tokens, negative where the key
    is not visible; None if every key is visible, for scores that do not go by distance.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    distance: Tensor | None = None


def sink_distances(token: Tensor, num_sinks: int, window: int) -> Tensor:
    """Distances ``[batch, tokens, num_sinks]`` from queries of ``token`` ``[batch, tokens]`` to the sink slots."""
    return token.clamp(max=num_sinks + window - 1).unsqueeze(-1) - torch.arange(num_sinks, device=token.device)


def ring_distances(token: Tensor, newest: Tensor, slots: int, *, num_sinks: int, window: int, ring: int) -> Tensor:
    """Distances ``[batch, tokens, slots]`` from queries of ``token`` ``[batch, tokens]`` to the first ring slots.

    newest ``[batch, 1]`` or ``[batch, tokens]``: the last token that counts as written. Where the ring holds later
    ones, they must not have overwritten what the query sees.
    """
    latest = newest - num_sinks
    age = (latest.unsqueeze(-1) - torch.arange(slots, device=token.device)) % ring
    occupant = newest.unsqueeze(-1) - age
    distance = token.unsqueeze(-1) - occupant
    return distance.masked_fill((occupant < num_sinks) | (distance >= window), -1)


def chunk_distances(token: Tensor, *, num_sinks: int, window: int) -> Tensor:
    """Distances ``[batch, tokens, tokens]`` between the tokens of one call; sink tokens are seen elsewhere."""
    distance = token.unsqueeze(-1) - token.unsqueeze(-2)
    hidden = (distance < 0) | (distance >= window) | (token < num_sinks).unsqueeze(-2)
    return distance.masked_fill(hidden, -1)


def attend(
    sections: list[Section],
    *,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Softmax attention ``[batch, heads, tokens, value_dim]`` over all sections together.

    Every query must see at least one key, else its output is not a number.
    """
    batch, heads, tokens, _ = sections[0].query.shape
    kv_heads = sections[0].keys.shape[1]
    groups = heads // kv_heads
    compute = table_dtype(sections[0].query.dtype)

    def by_head(x: Tensor) -> Tensor:  # [heads] -> [1, kv_heads, groups, 1, 1]
        return x.to(compute).view(1, kv_heads, groups, 1, 1)

    # A power of two goes into the query, exactly, before the product: fp16 scores would overflow without it.
    mantissa, exponent = math.frexp(scale)
    scores = []
    for query, keys, _, distance in sections:
        # All heads of a group in one product, so that keys are read once and never repeated; keys on the left, where
        # a low-precision product takes them as they lie.
        query = query.reshape(batch, kv_heads, groups * tokens, query.shape[-1]) * 2.0**exponent
        score = (keys @ query.mT).mT
        score = score.to(compute).view(batch, kv_heads, groups, tokens, keys.shape[2]) * mantissa
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if distance is not None:
            distance = distance[:, None, None]
            if alibi_slopes is not None:
                score = score - by_head(alibi_slopes) * distance
            score = score.masked_fill(distance < 0, -torch.inf)
        scores.append(score)
    if sink_logits is not None:
        scores.append(by_head(sink_logits).expand(batch, -1, -1, tokens, 1))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(sections[0].values.dtype)

    sizes = [section.keys.shape[2] for section in sections] + ([1] if sink_logits is not None else [])
    parts = list(zip(weights.split(sizes, dim=-1), sections, strict=False))
    out = sum(part.flatten(2, 3) @ section.values for part, section in parts)
    out = out.view(batch, kv_heads, groups, tokens, sections[0].values.shape[3])
    if not out.isfinite().all() and all(section.distance is not None for section in sections):
        # A hidden value that is no number got weight 0, and 0 times NaN is NaN: leave hidden values out, one query
        # at a time, since each hides others.
        for i in range(tokens):
            out[:, :, :, i] = sum(
                part[:, :, :, i] @ section.values.masked_fill((section.distance[:, i] < 0)[:, None, :, None], 0)
                for part, section in parts
            )
    return out.view(batch, heads, tokens, out.shape[-1])
