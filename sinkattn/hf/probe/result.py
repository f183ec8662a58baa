"""What a probe finds out about a model and its attention layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.rope import Rope


class Temperature(NamedTuple):
    """Scaling of queries by their position p: ``1 + scale * log(1 + floor((p + 1) / step))`` (Llama 4)."""

    step: float
    scale: float


class Rotation(NamedTuple):
    """A rotary embedding and where in the head the elements begin that it turns."""

    rope: Rope
    begin: int


@dataclass
class LayerInfo:
    """What a probe found out about one attention module."""

    index: int
    rotation: Rotation | None
    """None where nothing is rotated."""
    visible: MaskPattern
    temperature: Temperature | None
    """None where the model scales no queries, or does so by the positions that it is given."""
    alibi_slopes: Tensor | None = None
    """One for each head, of the bias on scaled scores; None without ALiBi."""


@dataclass
class ProbeResult:
    """What a probe found out about a model."""

    decoder: PreTrainedModel
    rotaries: list[nn.Module]
    """Modules that make cosines and sines; none in models whose attention knows no positions (NoPE)."""
    layers: dict[nn.Module, LayerInfo] = field(default_factory=dict)
    """By attention module, in the order in which they ran."""
    forwards: dict[nn.Module, Callable] = field(default_factory=dict)
    """What replaces the forward of attention modules that call no attention function."""
