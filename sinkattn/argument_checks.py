"""Checks of single arguments: each error names the argument, what is expected, and what came."""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import Any

from torch import SymInt, Tensor


def check_whole(name: str, value: Any, least: int | None = 0) -> None:
    """Raise ValueError for anything but a whole number from ``least`` on; None: what follows checks the range."""
    if isinstance(value, bool) or not isinstance(value, (Integral, SymInt)):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    number: Any = value  # not int(value), which would make a constant of a size within torch.compile
    if least is not None and not least <= number < 2**63:
        limit = "" if number < least else ", below 2**63"
        raise ValueError(f"{name}: expected {least} or more{limit}, got {value}")


def check_fraction(name: str, value: Any) -> None:
    """Raise ValueError for anything but a number from 0 to 1."""
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected 0 to 1, got {value!r}")


def check_kind(name: str, value: Any, kind: Any, expected: str) -> None:
    """Raise TypeError for anything but an object of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_tensors(**arguments: Any) -> None:
    """Raise TypeError for an argument that is no tensor."""
    for name, value in arguments.items():
        check_kind(name, value, Tensor, "a tensor")


def check_path(name: str, value: Any) -> None:
    """Raise TypeError for anything but a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {type(value).__name__}")
