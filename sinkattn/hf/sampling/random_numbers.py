"""Random numbers by seed and number of the draw, computed in integers on the device: splitmix64.

Number n of a seed is the same in every batch and on every device, and a generator's state is two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the 64 lowest bits of a number: products and sums of int64 tensors wrap around."""
    return (value + 2**63) % 2**64 - 2**63


_STEP = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


class Draws:
    """One generator for each row.

    Args:
        seeds: of each row.
        drawn: numbers of each row that came before.
        device: where numbers are computed.
    """

    def __init__(self, seeds: Sequence[int], drawn: Sequence[int], device: torch.device) -> None:
        states = [_signed(seed + number * _STEP) for seed, number in zip(seeds, drawn, strict=True)]
        self._states = torch.tensor(states, dtype=torch.int64, device=device)

    def integers(self) -> Tensor:
        """The next number of each row: int64 ``[rows]``, all 64 bits random."""
        self._states += _STEP
        mixed = self._states
        for shift, factor in _MIX:
            mixed = (mixed ^ _shift_right(mixed, shift)) * factor
        return mixed ^ _shift_right(mixed, 31)

    def uniform(self) -> Tensor:
        """The next number of each row: float64 ``[rows]``, from 0 to below 1."""
        return _shift_right(self.integers(), 11).double() * 2.0**-53


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift in zeros, not the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
