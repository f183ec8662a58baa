"""Rotary embedding: tables of cosines and sines that stay exact at any stream length, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from sinkattn.argument_checks import check_tensors

Style = Literal["half", "interleaved"]
STYLES: tuple[Style, ...] = ("half", "interleaved")


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the rotary tables for tensors of ``dtype``: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Rope:
    """How a model rotates its queries and keys (RoPE, arXiv 2104.09864). Compared and hashed by value.

    Args:
        inv_freq: ``[pairs]`` angle per position of each pair, in radians; negative for the opposite direction.
        scaling: factor on cosines and sines (the attention factor of YaRN and longrope).
        style: which elements form a pair: ``"half"`` pairs i with i + pairs, ``"interleaved"`` pairs 2i with 2i + 1.
        rotary_dim: rotated leading elements of the head, always ``2 * pairs``; if given, it is checked.

    Raises:
        TypeError, ValueError: an argument; the message names it.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    style: Style = "half"
    rotary_dim: int | None = None
    # Not a cached property: up to Python 3.11 it takes a lock, which Dynamo cannot trace.
    _copies: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the arguments; keep the frequencies in fp64."""
        check_tensors(inv_freq=self.inv_freq)
        if not isinstance(self.scaling, Real) or not math.isfinite(self.scaling):
            raise ValueError(f"scaling: expected a finite number, got {self.scaling!r}")
        if self.inv_freq.ndim != 1 or not self.inv_freq.is_floating_point() or not len(self.inv_freq):
            raise ValueError(
                f"inv_freq: expected a float tensor [pairs], got {self.inv_freq.dtype} {list(self.inv_freq.shape)}"
            )
        if self.style not in STYLES:
            raise ValueError(f"style: expected one of {STYLES}, got {self.style!r}")
        width = 2 * len(self.inv_freq)
        if self.rotary_dim not in (None, width):
            raise ValueError(f"rotary_dim: expected twice the length of inv_freq ({width}), got {self.rotary_dim}")
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().to(torch.float64))
        object.__setattr__(self, "rotary_dim", width)

    @cached_property
    def _value(self) -> tuple:
        return (*self.inv_freq.tolist(), self.scaling, self.style)

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Rope) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)

    @classmethod
    def from_module(cls, module: torch.nn.Module, style: Style = "half") -> Rope:
        """Read the current ``inv_freq`` and ``attention_scaling`` of a transformers rotary module.

        Raises:
            ValueError: if the module has no ``inv_freq``.
        """
        inv_freq = getattr(module, "inv_freq", None)
        if not isinstance(inv_freq, Tensor):
            raise ValueError(f"module: expected a rotary module with an inv_freq tensor, got {type(module).__name__}")
        return cls(inv_freq, scaling=float(getattr(module, "attention_scaling", 1.0)), style=style)

    @property
    def interleaved(self) -> bool:
        """Whether the two elements of a pair are neighbours."""
        return self.style == "interleaved"

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[*positions.shape, pairs]`` for int64 ``positions``.

        Angles are fp64: the product of a position below 2**29 and an fp32 frequency is exact there, and at position
        10**9 its error is at most 6.0e-8 rad, twice the rounding of an fp32 cosine. In fp32 the error would reach
        0.031 rad at position 10**6.
        """
        angles = positions.to(torch.float64).unsqueeze(-1) * self._inv_freq_on(positions.device)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def _inv_freq_on(self, device: torch.device) -> Tensor:
        # Copied once per device: a copy to a GPU synchronises, and cannot be captured in a CUDA graph.
        if self.inv_freq.device == device:
            return self.inv_freq
        if device not in self._copies:
            self._copies[device] = self.inv_freq.to(device)
        return self._copies[device]

    def stream_tables(
        self,
        seen: Tensor,
        tokens: int,
        *,
        num_sinks: int,
        window: int,
        dtype: torch.dtype = torch.float32,
        row_sinks: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tables for the next ``tokens`` tokens of every stream: cos, sin ``[2, batch, tokens, pairs]``.

        Index 0 is for the stream position t of each token: it rotates the key, once, and the query for its scores with
        window keys. Index 1 is for the number of tokens that t sees before itself, ``min(t, num_sinks + window - 1)``:
        it rotates the query for its scores with sinks.
        ``seen``: int64 ``[batch]`` tokens appended before. ``row_sinks``, ``begins``: as for `ops.sink_attention_`.
        """
        stream = seen.unsqueeze(-1) + torch.arange(tokens, device=seen.device)
        cache = cache_positions(stream, num_sinks if row_sinks is None else row_sinks, window, begins)
        return self.tables(torch.stack((stream, cache)), dtype)


def cache_positions(positions: Tensor, num_sinks: int | Tensor, window: int, begins: Tensor | None = None) -> Tensor:
    """Number of tokens that each token sees before itself, which is its position relative to the cache.

    Args:
        positions: int64 ``[1 or batch, tokens]`` in the stream.
        num_sinks: of all rows, or int64 ``[batch]``.
        window: of all rows.
        begins: int64 ``[batch]``, the first token that the window of a row may hold.
    """
    sinks = num_sinks.unsqueeze(-1) if isinstance(num_sinks, Tensor) else num_sinks
    cache = positions.clamp(max=sinks + window - 1)
    return cache if begins is None else torch.minimum(cache, positions - begins.unsqueeze(-1) + sinks)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the first ``2 * pairs`` elements of ``x`` ``[..., tokens, head_dim]``; the others stay as they are.

    cos, sin: ``[..., tokens, pairs]``, broadcast against ``x``. Computed in the dtype of the tables, rounded once.
    """
    pairs = cos.shape[-1]
    rotary, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
    else:
        a, b = rotary[..., :pairs], rotary[..., pairs:]
    halves = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
