"""Caches, and lists of tensors, on another device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def tensors_in(x: Any) -> list[Tensor]:
    """All tensors that an object holds, also in lists, dicts and attributes, each once and in a fixed order."""
    return [*_tensors_in(x, set())]


def _tensors_in(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(x) in seen or isinstance(x, type):
        return
    seen.add(id(x))
    if isinstance(x, Tensor):
        yield x
        return
    held = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else getattr(x, "__dict__", {})
    for y in held.values() if isinstance(held, dict) else held:
        yield from _tensors_in(y, seen)


def with_tensors(x: T, tensors: Sequence[Tensor]) -> T:
    """A copy of an object with these tensors in the places of its `tensors_in`."""
    memo: dict[int, Any] = {id(old): new for old, new in zip(tensors_in(x), tensors, strict=True)}
    return copy.deepcopy(x, memo)


def moved(x: T, device: torch.device | str) -> T:
    """A copy of an object on this device; "meta" for one without data."""
    # No inference tensors, even under torch.inference_mode(): the stream may continue outside of it.
    with torch.inference_mode(False):
        return with_tensors(x, [tensor.to(device, copy=True) for tensor in tensors_in(x)])
