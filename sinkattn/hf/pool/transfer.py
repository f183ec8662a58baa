"""Copies from the host to the device of a model."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, out: Tensor | None = None) -> Tensor:
    """Copy a tensor of the host to a device, into ``out`` if it is given, without waiting for what runs there."""
    if device.type == "cuda":
        x = x.pin_memory()  # a copy from other memory waits
    return x.to(device, non_blocking=True) if out is None else out.copy_(x, non_blocking=True)
