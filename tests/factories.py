"""Inputs that several test modules share."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkattn import Rope


def strided(x: Tensor) -> Tensor:
    """A copy as a view of a larger tensor: the last stride is 2, and no two dimensions are contiguous."""
    larger = x.new_full([*(size + 2 for size in x.shape[:-1]), 2 * x.shape[-1] + 3], torch.nan)
    view = larger[tuple(slice(1, size + 1) for size in x.shape[:-1])][..., 1 : 2 * x.shape[-1] + 1 : 2]
    return view.copy_(x)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers, in a tensor that is not contiguous."""
    return strided(torch.randn(*shape, dtype=torch.float64).to(dtype))


def make_qkv(
    tokens: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of ``batch`` streams, before the rotary embedding."""
    return (
        randn(batch, heads, tokens, head_dim, dtype=dtype),
        randn(batch, kv_heads, tokens, head_dim, dtype=dtype),
        randn(batch, kv_heads, tokens, value_dim or head_dim, dtype=dtype),
    )


def make_rope(rotary_dim: int = 16, style: str = "half", base: float = 10000.0) -> Rope:
    """Rotary embedding with the usual geometric frequencies, in fp32 as in models."""
    return Rope(base ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim), style=style)


def run(attend, ring, query: Tensor, key: Tensor, value: Tensor, calls, **options) -> Tensor:
    """Feed whole streams to ``attend`` in several calls, and return the outputs of all tokens.

    Each item of ``calls`` is the number of new tokens: an int for all rows alike, a list for each row, whose rows are
    padded on the right. Outputs of tokens that no call feeds stay zero.
    """
    batch, heads, tokens, _ = query.shape
    out = query.new_zeros(batch, heads, tokens, value.shape[-1])
    done = [0] * batch
    for call in calls:
        counts = [call] * batch if isinstance(call, int) else call
        if isinstance(call, int) and len(set(done)) == 1:
            part = slice(done[0], done[0] + call)
            out[:, :, part] = attend(query[:, :, part], key[:, :, part], value[:, :, part], ring, **options)
        else:
            index = [torch.arange(start, start + max(counts) + 1) % tokens for start in done]
            chunk = [strided(torch.stack([x[row][:, i] for row, i in enumerate(index)])) for x in (query, key, value)]
            part = attend(*chunk, ring, lengths=torch.tensor(counts), **options)
            for row, (start, count) in enumerate(zip(done, counts, strict=True)):
                out[row, :, start : start + count] = part[row, :, :count]
                assert not part[row, :, count:].any(), "outputs of padding are zero"
        done = [start + count for start, count in zip(done, counts, strict=True)]
    return out


def max_error(out: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinity."""
    return (out.double() - oracle).abs().nan_to_num(nan=torch.inf).max().item()
