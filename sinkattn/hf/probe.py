"""Finding out what a model does, by running it: which modules attend, and how they rotate queries and keys.

Nothing is assumed from a model's name. Two short forwards run with an attention function that records what it gets
and returns something independent of queries and keys, so that both see the same hidden states: one with the model's
rotary embedding, one with the identity in its place. What comes out must be explained by one known convention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sinkattn.rope import STYLES, Rope, rotate

PROBE_NAME = "sinkattn_probe"
PROBE_TOKENS = 8

# Arguments of an attention function that the swap honours, and those that say nothing about the result.
HONOURED = {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"}


class UnsupportedModelError(ValueError):
    """The model does something that sinkattn cannot prove it computes exactly; the message says what."""


@dataclass
class Call:
    """One call of the attention function during a probe."""

    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass
class Findings:
    """What a probe found out about a model."""

    decoder: PreTrainedModel
    rotary: nn.Module
    ropes: dict[nn.Module, Rope | None] = field(default_factory=dict)
    """Rotary embedding of each attention module, in layer order; None where it uses none."""
    sliding_windows: dict[nn.Module, int] = field(default_factory=dict)
    """Native sliding window of the attention modules that have one, in tokens."""


_calls: ContextVar[list[Call]] = ContextVar("sinkattn_probe_calls")


def _record(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    _calls.get().append(Call(module, query, key, attention_mask, options))
    # Neither queries nor keys: rotating them must not change what later layers see.
    heads = query.shape[1] // value.shape[1]
    return value.repeat_interleave(heads, dim=1).transpose(1, 2).contiguous(), None


def no_mask(*args, **kwargs) -> None:
    """Mask function of an attention function that masks by itself."""
    return None


AttentionInterface.register(PROBE_NAME, _record)
AttentionMaskInterface.register(PROBE_NAME, no_mask)


def no_rotation(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Forward hook of a rotary module: the angle is zero, so queries and keys pass unchanged, bit for bit."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise UnsupportedModelError(f"{type(module).__name__}: expected cosines and sines from the rotary module")
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a decoder with another attention function."""
    before = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation(name)
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout and gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def trained_length(model: PreTrainedModel) -> int | None:
    """Positions that a model was trained for, in tokens; None if its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    length = getattr(config, "max_position_embeddings", None)
    # Frequencies of these kinds change beyond the original length.
    if rope.get("rope_type") in ("dynamic", "longrope"):
        length = rope.get("original_max_position_embeddings") or length
    return length


def probe(model: PreTrainedModel) -> Findings:
    """Find the decoder, the rotary module and each attention module's rotary convention; leaves the model as it was.

    Raises:
        UnsupportedModelError: saying what could not be explained.
    """
    decoder, rotary = _find_rotary(model)
    findings = Findings(decoder, rotary)
    device = model.get_input_embeddings().weight.device
    positions = torch.arange(PROBE_TOKENS, device=device)
    with evaluation_mode(model):
        embeddings = model.get_input_embeddings().weight
        # Fixed rows of the table, so that a probe is the same every time.
        ids = (positions * 7919 + 13) % embeddings.shape[0]
        rotated = _run(decoder, ids)
        handle = rotary.register_forward_hook(no_rotation)
        try:
            plain = _run(decoder, ids)
        finally:
            handle.remove()

    layers = decoder.config.num_hidden_layers
    found = [getattr(call.module, "layer_idx", None) for call in rotated]
    if found != list(range(layers)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one call of the attention function in each of its {layers} layers, "
            f"got layers {found}"
        )
    # Read only now: a short forward puts length-dependent frequencies back to those of short inputs.
    candidates = [Rope.from_module(rotary, style) for style in STYLES]
    for with_rotation, without in zip(rotated, plain, strict=True):
        _check_options(model, with_rotation)
        rope = _explain(with_rotation, without, candidates, positions)
        unmoved = torch.equal(with_rotation.key, without.key) and torch.equal(with_rotation.query, without.query)
        if rope is None and not unmoved:
            raise UnsupportedModelError(
                f"{type(model).__name__}: layer {with_rotation.module.layer_idx} changes queries and keys by position "
                "in a way that is no known rotary embedding"
            )
        findings.ropes[with_rotation.module] = rope
        if (sliding_window := with_rotation.options.get("sliding_window")) is not None:
            findings.sliding_windows[with_rotation.module] = sliding_window
    return findings


def _find_rotary(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module]:
    rotary = [
        (parent, module)
        for parent in model.modules()
        for module in parent.children()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    if len(rotary) != 1 or not isinstance(rotary[0][0], PreTrainedModel):
        names = ", ".join(sorted({type(module).__name__ for _, module in rotary})) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one rotary module, used by all layers of a decoder, got {len(rotary)} "
            f"({names}); models with absolute, ALiBi or several kinds of positions are not supported yet"
        )
    return rotary[0]


def _run(decoder: PreTrainedModel, ids: Tensor) -> list[Call]:
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        with attention_implementation(decoder, PROBE_NAME):
            decoder(input_ids=ids.unsqueeze(0), use_cache=False)
    finally:
        _calls.reset(token)
    return calls


def _check_options(model: PreTrainedModel, call: Call) -> None:
    if call.mask is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: layer {call.module.layer_idx} gets an attention mask that the model makes itself"
        )
    unknown = {
        name
        for name, option in call.options.items()
        if option is not None and name not in HONOURED | HARMLESS and not (name == "is_causal" and option)
    }
    if unknown or not getattr(call.module, "is_causal", True):
        what = f"passes {sorted(unknown)} to its attention function" if unknown else "is not causal"
        raise UnsupportedModelError(f"{type(model).__name__}: layer {call.module.layer_idx} {what}")


def _explain(rotated: Call, plain: Call, candidates: list[Rope], positions: Tensor) -> Rope | None:
    for rope in candidates:
        if rope.rotary_dim > plain.key.shape[-1]:
            continue
        cos, sin = rope.tables(positions)
        pairs = ((rotated.query, plain.query), (rotated.key, plain.key))
        if all(_close(want, rotate(x.float(), cos, sin, interleaved=rope.interleaved)) for want, x in pairs):
            return rope
    return None


def _close(want: Tensor, got: Tensor) -> bool:
    # Twice the rounding of the model's own dtype. Norm weights that come after a rotation move far more than that.
    budget = max(1e-6, 2 * torch.finfo(want.dtype).eps)
    return bool((want.float() - got).norm() <= budget * want.float().norm())
