"""Options of one call of `generate`, as transformers resolves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def call_setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An option of a call: its argument, or else from the generation config passed, or else from the model's own."""
    if name in kwargs:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def eos_ids(model: PreTrainedModel, kwargs: dict[str, Any], device: torch.device) -> Tensor | None:
    """End-of-sequence ids of a call, ``[n]``; None if there are none."""
    eos = call_setting(model, kwargs, "eos_token_id")
    return None if eos is None else torch.as_tensor(eos, device=device).flatten()
