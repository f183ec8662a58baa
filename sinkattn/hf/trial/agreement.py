"""Compare two runs of a model layer by layer, with the same inputs to each attention layer.

Comparing final outputs does not work: rounding adds up over the layers of a pretrained model, until logits in bfloat16
differ from those in float32 by half of their spread. So the inputs and outputs of attention are recorded in the first
run. In later runs they are compared with the record and replaced by it, so that differences do not add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sinkattn.hf.unsupported import UnsupportedModelError

# Relative error allowed for attention in fp32. Rounding stays below 1e-4, even with scores of several hundred.
MAX_FP32_ERROR = 1e-3


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference as a fraction of the RMS of ``want``; infinite for NaN.

    For ``[batch, tokens, heads, head_dim]`` the largest over the heads, so that heads with small values count too.
    """
    got, want = got.double(), want.double()
    if torch.equal(got, want):
        return 0.0
    dims = (0, 1, 3) if want.ndim == 4 else None
    error, size = (torch.linalg.vector_norm(x, dim=dims) for x in (got - want, want))
    # A head below 1e-5 of the largest one is within the rounding of that one.
    return float((error / size.clamp(min=1e-5 * size.max())).nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def check_agreement(name: str, where: str, error: float, allowed: float) -> None:
    """Raise UnsupportedModelError if the patched model differs by more than ``allowed``, or by NaN."""
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name}: on a short input the patched model differs from the original by {error:.1e} in {where} "
            f"(allowed: {allowed:.1e})"
        )


@dataclass
class AttentionRecord:
    """Inputs and outputs of attention modules in a first run over a short stream, ``[batch, tokens, ...]``.

    Later runs are compared with the first, and continue with its values.
    """

    errors: dict[tuple[nn.Module, str], float] = field(default_factory=dict)
    """Largest relative error by module and tensor name, since the last `pop_errors`."""
    first_token: int = 0
    """First token of the current call."""
    num_tokens: int = 0
    """Tokens of the current call."""
    _parts: dict[tuple[nn.Module, str], dict[int, Tensor]] = field(default_factory=dict)
    """Recorded tensors by module and name, then by the first token of their call."""
    _is_recording: bool = True

    def record_or_replay(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """In the first run record ``x``; later note its error. Returns the recorded tensor.

        x: ``[batch, tokens, ...]``, for the tokens of the current call.
        """
        parts = self._parts.setdefault((module, name), {})
        if self._is_recording:
            parts[self.first_token] = x
            return x
        want = torch.cat([part for first, part in parts.items() if first >= self.first_token], dim=1)[:, : x.shape[1]]
        self.note_error(module, name, relative_error(x, want))
        return want

    def record_or_replay_with_past(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """The same for keys or values, which may begin with those of past tokens."""
        new = self.record_or_replay(module, name, x[:, -self.num_tokens :])
        past = [part for first, part in self._parts[module, name].items() if first < self.first_token]
        return torch.cat((*past, new), dim=1)[:, -x.shape[1] :]

    def note_error(self, module: nn.Module, name: str, error: float) -> None:
        """Keep an error if it is the largest so far."""
        self.errors[module, name] = max(self.errors.get((module, name), 0.0), error)

    def end_recording(self) -> None:
        """Compare later runs with what has been recorded."""
        self._is_recording = False

    def pop_errors(self) -> dict[tuple[nn.Module, str], float]:
        """Return the errors so far and clear them."""
        errors, self.errors = self.errors, {}
        return errors
