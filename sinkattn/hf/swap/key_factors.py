"""Factors between the elements of a layer's keys and queries, which leave less to round in a ring of 8 bits.

Rounding a vector of b elements to 8 bits, after `sinkattn.reference.hadamard`, makes about the same error in each
element, in proportion to the size of the whole vector; so the error of a score has a variance in proportion to |k|^2
|q|^2. With keys k / c and queries q c, of factors c for each element, scores are the same, and c^2 = rms(k) / rms(q)
makes that smallest, by the inequality of Cauchy and Schwarz (SmoothQuant, arXiv 2211.10438, has the like for weights
and activations). This helps where keys have large elements that meet small ones of the queries, as in models with large
biases. Both elements of a rotated pair have one factor, so that it does not matter when they are rotated; and factors
are powers of two, which multiply exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkattn.hf.probe.result import Rotation

MIN_GAIN = 2.0
"""Fall of the variance below which a layer gets no factors: they cost two products in each step."""

MAX_EXPONENT = 8
"""Of a factor, so that it suits float16."""

MAX_SCALED = 2.0**12
"""About how large factors make elements of the text measured at most: those of other texts may be 16 times as
large before they overflow in float16."""


def key_factors(query: Tensor, key: Tensor, rotation: Rotation | None) -> Tensor | None:
    """Factors ``[kv_heads, head_dim]`` for a layer; None if they would gain too little.

    query ``[batch, heads, tokens, head_dim]``, key ``[batch, kv_heads, tokens, head_dim]``: of some tokens, before the
    rotation.
    """
    kv_heads = key.shape[1]
    squares = [x.float().square().unflatten(1, (kv_heads, -1)) for x in (query, key)]
    q, k = (_of_pairs(x.mean(dim=(0, 2, 3)), rotation) for x in squares)
    query_room, key_room = (_room(_of_pairs(x.amax(dim=(0, 2, 3)), rotation)) for x in squares)
    exponents = (k / q).log2() / 4
    exponents = (exponents - exponents.median(dim=1, keepdim=True).values).nan_to_num().round()
    factors = exponents.clamp(-key_room, query_room).exp2()
    scaled = (k / factors.square()).sum(dim=1) * (q * factors.square()).sum(dim=1)
    gain = k.sum(dim=1) * q.sum(dim=1) / scaled
    return factors if (gain >= MIN_GAIN).any() else None


def _room(squares: Tensor) -> Tensor:
    """The largest exponent of a power of two, 0 or more, by which elements of these squares may be multiplied."""
    return (math.log2(MAX_SCALED) - squares.log2() / 2).floor().nan_to_num().clamp(0, MAX_EXPONENT)


def _of_pairs(squares: Tensor, rotation: Rotation | None) -> Tensor:
    """Squares of elements ``[kv_heads, head_dim]``, those of a rotated pair replaced by their mean."""
    if rotation is None:
        return squares
    rope, offset = rotation
    pairs = len(rope.inv_freq)
    rotated = squares[:, offset : offset + 2 * pairs]
    shape, axis = ((pairs, 2), 2) if rope.interleaved else ((2, pairs), 1)
    means = rotated.unflatten(1, shape).mean(dim=axis, keepdim=True).expand(-1, *shape).flatten(1)
    return torch.cat((squares[:, :offset], means, squares[:, offset + 2 * pairs :]), dim=1)


def apply_factors(query: Tensor, key: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Query times and key divided by factors ``[batch, kv_heads, head_dim]``; scores are the same, bit for bit."""
    factors = factors.to(key.dtype).unsqueeze(2)
    return (query.unflatten(1, (factors.shape[1], -1)) * factors.unsqueeze(2)).flatten(1, 2), key / factors
