"""Read a model's decoder, trained length and rotary parameters, and change its attention implementation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from sinkattn.hf.unsupported import UnsupportedModelError


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a decoder with the attention and mask functions registered under ``name``."""
    original, config = decoder.config, config_with_attention(decoder.config, name)
    modules = modules_with_config(decoder, original)
    try:
        for module in modules:
            module.config = config
        yield
    finally:
        for module in modules:
            module.config = original


def config_with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """Copy of a configuration with another attention implementation; other models may share the original."""
    config = copy.copy(config)
    # Not through the setter, which also changes nested configurations: the copy shares them with the original.
    config._attn_implementation_internal = name
    return config


def modules_with_config(decoder: PreTrainedModel, config: PreTrainedConfig) -> list[Any]:
    """Modules of a decoder whose attribute ``config`` is this configuration."""
    return [module for module in decoder.modules() if module.__dict__.get("config") is config]


def trained_length(model: PreTrainedModel) -> int | None:
    """Number of positions that a model was trained for; None with ALiBi, or if its configuration does not give it."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    length = getattr(config, "max_position_embeddings", None)
    # Frequencies of these types change beyond the original length.
    for rope in rope_parameters(model):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or length
            length = original if length is None else min(length, original or length)
    return length if length and length > 0 else None


def default_window(model: PreTrainedModel, num_sinks: int, max_window: int = 1020) -> int:
    """Largest window up to ``max_window`` for which ``num_sinks + window`` fits the model; at least 1."""
    lengths = (trained_length(model), common_sliding_window(model))
    return max(1, min([max_window, *(length - num_sinks for length in lengths if length is not None)]))


def common_sliding_window(model: PreTrainedModel) -> int | None:
    """The sliding window that all layers have. It limits a model; in mixed models those layers keep theirs."""
    config = model.config.get_text_config(decoder=True)
    is_mixed = "full_attention" in (getattr(config, "layer_types", None) or ())
    return None if is_mixed else getattr(config, "sliding_window", None)


def rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Rotary parameters in a model's configuration: one set, or one for each type of layer."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_type = [each for each in parameters.values() if isinstance(each, dict)]
    return by_type or [parameters]


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that takes token ids and contains all attention layers."""
    for decoder in (model.get_decoder(), model.base_model):
        if isinstance(decoder, PreTrainedModel):
            return decoder
    raise UnsupportedModelError(
        f"{type(model).__name__}: expected a decoder that is a transformers PreTrainedModel, found none"
    )
