"""Settings of one call of `generate`, as transformers reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def call_setting(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a call, as transformers reads it: what a configuration leaves open is as in the model's own."""
    if name in kwargs:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), model.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def eos_ids(model: PreTrainedModel, kwargs: dict[str, Any], device: torch.device) -> Tensor | None:
    """End-of-sequence ids of a call, ``[n]``; None if it has none."""
    eos = call_setting(model, kwargs, "eos_token_id")
    return None if eos is None else torch.as_tensor(eos, device=device).flatten()
