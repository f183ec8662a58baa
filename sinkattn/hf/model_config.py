"""Reading a model: its decoder, its trained length, its rotary parameters, its attention implementation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sinkattn.hf.unsupported import UnsupportedModelError


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a decoder with another attention function."""
    before, own = decoder.config, with_attention(decoder.config, name)
    modules = modules_with(decoder, before)
    try:
        for module in modules:
            module.config = own
        yield
    finally:
        for module in modules:
            module.config = before


def with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A copy of a configuration with another attention function: other models may share the original."""
    config = copy.copy(config)
    config._attn_implementation_internal = name  # as the setter does, but for nested configurations
    return config


def modules_with(decoder: PreTrainedModel, config: PreTrainedConfig) -> list[nn.Module]:
    """Modules of a decoder that read this configuration."""
    return [module for module in decoder.modules() if module.__dict__.get("config") is config]


def trained_length(model: PreTrainedModel) -> int | None:
    """Positions that a model was trained for, in tokens; None if its configuration does not say, or with ALiBi."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    length = getattr(config, "max_position_embeddings", None)
    # Frequencies of these kinds change beyond the original length.
    for rope in rope_parameters(model):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or length
            length = original if length is None else min(length, original or length)
    return length if length and length > 0 else None


def rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Rotary parameters in a model's configuration, one set or several by type of layer."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_type = [each for each in parameters.values() if isinstance(each, dict)]
    return by_type or [parameters]


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Find the part of a model that takes token ids and has all attention layers."""
    for decoder in (model.get_decoder(), model.base_model):
        if isinstance(decoder, PreTrainedModel):
            return decoder
    raise UnsupportedModelError(f"{type(model).__name__}: expected a decoder that is a transformers model")
