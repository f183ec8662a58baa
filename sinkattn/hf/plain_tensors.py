"""The plain tensors that a weight consists of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN_TENSORS = (nn.Parameter, Tensor)


def plain_tensors(x: Any) -> Iterator[Tensor]:
    """The tensor itself, or those that a subclass such as a quantized weight consists of."""
    if type(x) in PLAIN_TENSORS:
        yield x
    elif is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(x, name))
    elif isinstance(x, Tensor):
        yield x
