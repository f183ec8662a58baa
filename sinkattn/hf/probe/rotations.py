"""Find the rotary embedding of each layer by comparing its queries and keys with and without rotation."""

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
from sinkattn.hf.probe.recording import AttentionCall, Recording, record_forward
from sinkattn.hf.probe.result import Rotation
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.rope import STYLES, Rope, rotate


def identity_rotation_hook(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a rotary module: return cos = 1 and sin = 0, so queries and keys keep their values."""
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output):
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected the rotary module to return a pair of cosines and sines or a complex "
        f"tensor, got {type(output).__name__}"
    )


@contextmanager
def without_rotation(rotary_modules: list[nn.Module]) -> Iterator[None]:
    """Replace the output of rotary modules by the identity rotation."""
    with ExitStack() as hooks:
        for module in rotary_modules:
            hooks.callback(module.register_forward_hook(identity_rotation_hook).remove)
        yield


def inv_freq_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Frequencies of a rotary module by buffer name: ``inv_freq``, or one per layer type (``full_attention_inv_freq``).

    Leaves out ``original_inv_freq``, the copy that a module with length-dependent frequencies restores them from.
    """
    named = {name: x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
    return {name: x for name, x in named.items() if "original" not in name}


@dataclass
class Frequencies:
    """One set of rotary frequencies and the buffers that hold it."""

    inv_freq: Tensor
    scaling: float
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)

    def ropes(self) -> Iterator[Rope]:
        """Rotary embeddings with these frequencies: both directions (NanoChat turns backwards), all pair layouts."""
        for sign in (1, -1):
            yield from (Rope(sign * self.inv_freq, self.scaling, style) for style in STYLES)


def distinct_frequencies(rotary_modules: list[nn.Module]) -> list[Frequencies]:
    """Sets of frequencies of the rotary modules, without duplicates."""
    distinct: list[Frequencies] = []
    for module in rotary_modules:
        for name, inv_freq in inv_freq_buffers(module).items():
            scaling = float(getattr(module, name.replace("inv_freq", "attention_scaling"), 1.0))
            same = (x for x in distinct if x.scaling == scaling and torch.equal(x.inv_freq, inv_freq))
            if (known := next(same, None)) is None:
                distinct.append(known := Frequencies(inv_freq.clone(), scaling))
            known.buffers.append((module, name))
    return distinct


def candidate_ropes(
    model: PreTrainedModel, distinct: list[Frequencies], ids: Tensor, rotated: Recording
) -> dict[int, list[Rope]]:
    """Rotary embeddings that each layer may apply, by layer index.

    With several sets of frequencies, zero each in turn: layers whose queries or keys change use it. Comparing rotated
    queries instead is ambiguous: in half precision two sets can give the same values on a few tokens.
    """
    candidates: dict[int, list[Rope]] = {call.module.layer_idx: [] for call in rotated.calls}
    if len(distinct) == 1:
        return {index: list(distinct[0].ropes()) for index in candidates}
    for frequencies in distinct:
        ropes = list(frequencies.ropes())
        for module, name in frequencies.buffers:
            getattr(module, name).zero_()
        try:
            with evaluation_mode(model):
                zeroed = record_forward(find_decoder(model), ids)
        finally:
            for module, name in frequencies.buffers:
                getattr(module, name).copy_(frequencies.inv_freq)
        for before, after in zip(rotated.calls, zeroed.calls, strict=True):
            if not (torch.equal(before.query, after.query) and torch.equal(before.key, after.key)):
                candidates[before.module.layer_idx] += ropes
    return candidates


def find_rotation(
    rotated: AttentionCall, unrotated: AttentionCall, ropes: list[Rope], positions: Tensor
) -> Rotation | None:
    """Rotation that maps the unrotated queries and keys of a layer to the rotated ones; None if no candidate does."""
    head_dim = unrotated.key.shape[-1]
    pairs = ((rotated.query, unrotated.query), (rotated.key, unrotated.key))
    for rope in ropes:
        rotary_dim = 2 * len(rope.inv_freq)
        if rotary_dim > head_dim:
            continue
        cos, sin = rope.tables(positions)
        # Multi-head latent attention rotates the last elements of a head.
        for offset in dict.fromkeys((0, head_dim - rotary_dim)):
            rotation = Rotation(rope, offset)
            if all(_is_close(want, _rotate(x, cos, sin, rotation), rotation) for want, x in pairs):
                return rotation
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    rope, offset = rotation
    turned = rotate(x[..., offset:].float(), cos, sin, interleaved=rope.interleaved)
    return torch.cat((x[..., :offset], turned), dim=-1)


def _is_close(want: Tensor, got: Tensor, rotation: Rotation) -> bool:
    # Twice the rounding of the model's dtype, for each pair: a few channels may be a thousand times larger than others.
    # A norm weight applied after the rotation changes far more than that.
    budget = max(1e-6, 2 * torch.finfo(want.dtype).eps)
    want = want.float()
    error, size = (_pair_norms(x, rotation) for x in (want - got, want))
    return bool((error <= budget * size).all())


def _pair_norms(x: Tensor, rotation: Rotation) -> Tensor:
    """Norm of each rotated pair, and of each element that is not rotated, over batch, heads and tokens."""
    rope, offset = rotation
    end = offset + 2 * len(rope.inv_freq)
    norms = x.double().square().sum(dim=(0, 1, 2))
    rotary = norms[offset:end]
    pairs = rotary.view(-1, 2).sum(dim=1) if rope.interleaved else rotary.view(2, -1).sum(dim=0)
    return torch.cat((norms[:offset], pairs, norms[end:])).sqrt()
