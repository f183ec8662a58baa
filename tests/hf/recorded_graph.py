"""A stand-in for CUDA graphs on any device: records operators with their tensors, and runs them again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What waits for a device, and cannot be captured there.
WAITS = {
    getattr(Tensor, name)
    for name in ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
} | {torch.nonzero}


class RecordedGraph:
    """As in a CUDA graph, a replay reads and writes the memory of the capture, and runs nothing of Python."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor | None]]] = []
        self.num_replays = 0

    def capture(self, function: Callable[[], Any]) -> Any:
        with _NoWaits(), _Recorder(self.calls):
            return function()

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for operator, args, kwargs, outputs in self.calls:
            for x, y in zip(_tensors(operator(*args, **kwargs)), outputs, strict=True):
                if x.data_ptr() != y.data_ptr():
                    y.copy_(x)


class _NoWaits(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, _tensors(output)))
        return output


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in _pytree.tree_leaves(output) if isinstance(x, Tensor)]
