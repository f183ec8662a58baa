"""Which rotary embedding each layer applies, from queries and keys with and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.dry_run import evaluation_mode
from sinkattn.hf.model_config import find_decoder
from sinkattn.hf.probe.recording import Call, Recording, record_forward
from sinkattn.hf.probe.result import Rotation
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.rope import STYLES, Rope, rotate


def no_rotation(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a rotary module: the angle is zero, so queries and keys keep their values."""
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output):
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    raise UnsupportedModelError(f"{type(module).__name__}: expected cosines and sines from the rotary module")


@contextmanager
def without_rotation(rotaries: list[nn.Module]) -> Iterator[None]:
    """Run a model with the identity in place of its rotary embeddings."""
    with ExitStack() as hooks:
        for rotary in rotaries:
            hooks.callback(rotary.register_forward_hook(no_rotation).remove)
        yield


def inv_freq_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Frequencies of a rotary module by buffer name: ``inv_freq``, or one per layer type (``full_attention_inv_freq``).

    The originals of length-dependent frequencies are left out.
    """
    named = {name: x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
    return {name: x for name, x in named.items() if "original" not in name}


@dataclass
class Frequencies:
    """One set of frequencies of a model, and the buffers that hold it."""

    inv_freq: Tensor
    scaling: float
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)

    def ropes(self) -> Iterator[Rope]:
        """Every rotary embedding that these may be meant for: most turn one way, NanoChat's the other."""
        for sign in (1, -1):
            yield from (Rope(sign * self.inv_freq, self.scaling, style) for style in STYLES)


def distinct_frequencies(rotaries: list[nn.Module]) -> list[Frequencies]:
    """Sets of frequencies of some rotary modules, equal ones once."""
    distinct: list[Frequencies] = []
    for rotary in rotaries:
        for name, inv_freq in inv_freq_buffers(rotary).items():
            scaling = float(getattr(rotary, name.replace("inv_freq", "attention_scaling"), 1.0))
            same = (x for x in distinct if x.scaling == scaling and torch.equal(x.inv_freq, inv_freq))
            if (known := next(same, None)) is None:
                distinct.append(known := Frequencies(inv_freq.clone(), scaling))
            known.buffers.append((rotary, name))
    return distinct


def ropes_by_layer(
    model: PreTrainedModel, distinct: list[Frequencies], ids: Tensor, rotated: Recording
) -> dict[int, list[Rope]]:
    """Candidate rotations of each layer, by layer index.

    With several sets of frequencies, each is zeroed in turn: the layers whose queries or keys change use it. Comparing
    rotated queries would not do, as in half precision two sets can be too close to tell apart on a few tokens.
    """
    users: dict[int, list[Rope]] = {call.module.layer_idx: [] for call in rotated.calls}
    if len(distinct) == 1:
        return {index: list(distinct[0].ropes()) for index in users}
    for frequencies in distinct:
        ropes = list(frequencies.ropes())
        for module, name in frequencies.buffers:
            getattr(module, name).zero_()
        try:
            with evaluation_mode(model):
                changed = record_forward(find_decoder(model), ids)
        finally:
            for module, name in frequencies.buffers:
                getattr(module, name).copy_(frequencies.inv_freq)
        for before, after in zip(rotated.calls, changed.calls, strict=True):
            if not (torch.equal(before.query, after.query) and torch.equal(before.key, after.key)):
                users[before.module.layer_idx] += ropes
    return users


def explain_rotation(rotated: Call, plain: Call, ropes: list[Rope], positions: Tensor) -> Rotation | None:
    """Rotation that turns the plain queries and keys of a layer into the rotated ones; None if no candidate does."""
    head_dim = plain.key.shape[-1]
    pairs = ((rotated.query, plain.query), (rotated.key, plain.key))
    for rope in ropes:
        if rope.rotary_dim > head_dim:
            continue
        cos, sin = rope.tables(positions)
        # Multi-head latent attention rotates the end of the head.
        for begin in dict.fromkeys((0, head_dim - rope.rotary_dim)):
            if all(
                _close(want, torch.cat((x[..., :begin], _rotate(x[..., begin:], cos, sin, rope)), dim=-1), rope, begin)
                for want, x in pairs
            ):
                return Rotation(rope, begin)
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    return rotate(x.float(), cos, sin, interleaved=rope.interleaved)


def _close(want: Tensor, got: Tensor, rope: Rope, begin: int) -> bool:
    # Twice the rounding of the model's own dtype, pair by pair: a few channels may be a thousand times the others.
    # Norm weights that come after a rotation move far more than that.
    budget = max(1e-6, 2 * torch.finfo(want.dtype).eps)
    want = want.float()
    error, size = (_pair_norms(x, rope, begin) for x in (want - got, want))
    return bool((error <= budget * size).all())


def _pair_norms(x: Tensor, rope: Rope, begin: int) -> Tensor:
    """Over everything but the pairs that are rotated together; an element that is not rotated stands alone."""
    norms = x.double().square().sum(dim=(0, 1, 2))
    rotary = norms[begin : begin + rope.rotary_dim]
    pairs = rotary.view(-1, 2).sum(dim=1) if rope.interleaved else rotary.view(2, -1).sum(dim=0)
    return torch.cat((norms[:begin], pairs, norms[begin + rope.rotary_dim :])).sqrt()
