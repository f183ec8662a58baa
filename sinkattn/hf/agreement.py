"""Whether two runs of a model agree: each layer's attention on the same inputs, and what the model makes of it.

Rounding adds up over the layers of a pretrained model: its last outputs in bfloat16 can differ by half of their spread
from those in float32. So runs are compared layer by layer. The first one is recorded; in every later one what a layer
gets and gives is compared with the record, which then takes its place, so that nothing adds up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sinkattn.hf.probe import UnsupportedModelError

# Attention of the same inputs in fp32: rounding stays below 1e-4, even with scores of several hundred.
BOUND = 1e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, as a fraction of that of ``want``; a NaN counts as infinite."""
    got, want = got.double(), want.double()
    if torch.equal(got, want):
        return 0.0
    return float(((got - want).norm() / want.norm()).nan_to_num(nan=torch.inf, posinf=torch.inf))


def check_agreement(name: str, where: str, error: float, noise: float, bound: float = BOUND) -> None:
    """Refuse a model that is off by ``error``, if it differs from itself by no more than ``noise``."""
    allowed = max(bound, 2 * noise)
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name}: on a short input the swapped model differs from the original by {error:.1e} in {where} "
            f"(allowed: {allowed:.1e})"
        )


@dataclass
class Record:
    """What attention modules get and give over a short stream, ``[batch, tokens, ...]``, and how later runs differ."""

    errors: dict[tuple[nn.Module, str], float] = field(default_factory=dict)
    """The largest relative error of each in the run under way."""
    begin: int = 0
    """First token of the call under way."""
    tokens: int = 0
    """Tokens of the call under way."""
    _parts: dict[tuple[nn.Module, str], dict[int, Tensor]] = field(default_factory=dict)
    """By the first token of their call."""
    _recording: bool = True

    def meet(self, module: nn.Module, what: str, x: Tensor) -> Tensor:
        """Record what a module gets or gives for the tokens of this call, or compare it; returns what is on record."""
        parts = self._parts.setdefault((module, what), {})
        if self._recording:
            parts[self.begin] = x
            return x
        want = torch.cat([part for begin, part in parts.items() if begin >= self.begin], dim=1)[:, : x.shape[1]]
        self.errors[module, what] = max(self.errors.get((module, what), 0.0), relative_error(x, want))
        return want

    def meet_all(self, module: nn.Module, what: str, x: Tensor) -> Tensor:
        """The same for something that comes with that of earlier tokens in front of it."""
        new = self.meet(module, what, x[:, -self.tokens :])
        earlier = [part for begin, part in self._parts[module, what].items() if begin < self.begin]
        return torch.cat((*earlier, new), dim=1)[:, -x.shape[1] :]

    def compare(self) -> None:
        """End a run; the next one is compared with the first."""
        self._recording, self.errors = False, {}
