"""The result of probing a model: its decoder, rotary modules and attention layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.rope import Rope


class Temperature(NamedTuple):
    """Query scaling by position p: ``1 + scale * log(1 + floor((p + 1) / step))`` (Llama 4)."""

    step: float
    scale: float


class Rotation(NamedTuple):
    """A rotary embedding, applied to the ``rope.rotary_dim`` elements of each head from ``offset`` on."""

    rope: Rope
    offset: int


@dataclass
class LayerInfo:
    """How one attention module masks, rotates and scales."""

    index: int
    """``layer_idx`` of the module."""
    rotation: Rotation | None
    """None without a rotary embedding."""
    mask: MaskPattern
    temperature: Temperature | None
    """None if queries are not scaled, or are scaled by the ``position_ids`` that the model is given."""
    alibi_slopes: Tensor | None = None
    """``[heads]``, for a bias on the scaled scores; None without ALiBi."""


@dataclass
class ProbeResult:
    """Decoder, rotary modules and attention layers of a model, found by the probe or an adapter."""

    decoder: PreTrainedModel
    rotary_modules: list[nn.Module]
    """Modules that compute cosines and sines; empty if there is none (NoPE), or if the model has an adapter."""
    layers: dict[nn.Module, LayerInfo] = field(default_factory=dict)
    """Attention modules, in the order in which they ran."""
    adapter_forwards: dict[nn.Module, Callable] = field(default_factory=dict)
    """Forwards that replace those of attention modules that do not call transformers' attention function."""
    unrotated_forwards: dict[nn.Module, Callable] = field(default_factory=dict)
    """Forwards of the other attention modules without the rotation of the model; empty if it cannot be left out."""
