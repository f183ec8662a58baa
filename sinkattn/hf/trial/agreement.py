"""Whether two runs of a model agree: each layer's attention on the same inputs, and what the model makes of it.

Rounding adds up over the layers of a pretrained model: its last outputs in bfloat16 can differ by half of their spread
from those in float32. So runs are compared layer by layer. The first one is recorded; in every later one what a layer
gets and gives is compared with the record, which then takes its place, so that nothing adds up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sinkattn.hf.unsupported import UnsupportedModelError

# Attention of the same inputs in fp32: rounding stays below 1e-4, even with scores of several hundred.
BOUND = 1e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, as a fraction of that of ``want``; a NaN counts as infinite.

    Of ``[batch, tokens, heads, head_dim]`` the largest of any head, so that heads with small values count as well.
    """
    got, want = got.double(), want.double()
    if torch.equal(got, want):
        return 0.0
    dims = (0, 1, 3) if want.ndim == 4 else None
    error, size = (torch.linalg.vector_norm(x, dim=dims) for x in (got - want, want))
    # What is smaller than the rounding of other heads is none of a head's own.
    return float((error / size.clamp(min=1e-5 * size.max())).nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def check_agreement(name: str, where: str, error: float, allowed: float) -> None:
    """Refuse a model whose swap is off by more than what is allowed."""
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name}: on a short input the swapped model differs from the original by {error:.1e} in {where} "
            f"(allowed: {allowed:.1e})"
        )


@dataclass
class Record:
    """What attention modules get and give in the first run over a short stream, ``[batch, tokens, ...]``.

    In every later run, what they get and give is compared with the first run and replaced by it.
    """

    errors: dict[tuple[nn.Module, str], float] = field(default_factory=dict)
    """The largest relative error of each, over all runs since `compare`."""
    begin: int = 0
    """First token of the call under way."""
    tokens: int = 0
    """Tokens of the call under way."""
    _parts: dict[tuple[nn.Module, str], dict[int, Tensor]] = field(default_factory=dict)
    """By the first token of their call."""
    _recording: bool = True

    def settle(self, module: nn.Module, what: str, x: Tensor) -> Tensor:
        """Record what a module gets or gives for the tokens of this call, or compare it; returns what is on record."""
        parts = self._parts.setdefault((module, what), {})
        if self._recording:
            parts[self.begin] = x
            return x
        want = torch.cat([part for begin, part in parts.items() if begin >= self.begin], dim=1)[:, : x.shape[1]]
        self.note(module, what, relative_error(x, want))
        return want

    def settle_with_past(self, module: nn.Module, what: str, x: Tensor) -> Tensor:
        """The same for keys or values that may come with those of earlier tokens in front."""
        new = self.settle(module, what, x[:, -self.tokens :])
        past = [part for begin, part in self._parts[module, what].items() if begin < self.begin]
        return torch.cat((*past, new), dim=1)[:, -x.shape[1] :]

    def note(self, module: nn.Module, what: str, error: float) -> None:
        """Keep an error if it is the largest so far."""
        self.errors[module, what] = max(self.errors.get((module, what), 0.0), error)

    def compare(self) -> dict[tuple[nn.Module, str], float]:
        """Compare from now on, with new errors; returns those until now."""
        errors, self.errors, self._recording = self.errors, {}, False
        return errors
