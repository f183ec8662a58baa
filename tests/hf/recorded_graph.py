"""A stand-in for CUDA graphs on any device, and models whose decode steps it replays."""

from collections.abc import Callable
from typing import Any

import torch
from families import build
from hf_models import random_ids
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sinkattn
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.swap.step_graphs import NUM_COMPARED, STEPS_BEFORE

S, W, NEW = 2, 14, 30
REPLAYED = "replayed from a graph"
WARM, WARM_AGAIN = STEPS_BEFORE + NUM_COMPARED, 2 * STEPS_BEFORE + NUM_COMPARED  # steps until replays begin

# What waits for a device, and cannot be captured there.
WAITS = {
    getattr(Tensor, name)
    for name in ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
} | {torch.nonzero}


class RecordedGraph:
    """Records operators with their tensors, and runs them again.

    As in a CUDA graph, a replay reads and writes the memory of the capture, and runs nothing of Python.
    """

    def __init__(self, beside: "RecordedGraph | None" = None) -> None:
        self.beside = beside
        self.calls: list[tuple[Callable, tuple, dict, list[Tensor | None]]] = []
        self.num_replays = 0

    def capture(self, function: Callable[[], Any]) -> Any:
        with NoWaits(), _Recorder(self.calls):
            return function()

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for operator, args, kwargs, outputs in self.calls:
            for x, y in zip(_tensors(operator(*args, **kwargs)), outputs, strict=True):
                if x.data_ptr() != y.data_ptr():
                    y.copy_(x)


class NoWaits(TorchFunctionMode):
    """Lets what would wait for a device raise an error."""

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


class Graphs:
    """Makes graphs, and counts their replays."""

    def __init__(self) -> None:
        self.made = []

    def __call__(self, beside: RecordedGraph | None = None) -> RecordedGraph:
        self.made.append(RecordedGraph(beside))
        return self.made[-1]

    @property
    def num_replays(self) -> int:
        # The first ones of each are compared with the step.
        return sum(max(0, graph.num_replays - NUM_COMPARED) for graph in self.made)


def enabled_pair(family: str = "llama", headroom: int = 0, cache_dtype=None, **overrides):
    """The same model, plain and with captured steps, and the graphs of the latter."""
    plain, model = (
        sinkattn.enable(build(family, **overrides), S, W, headroom, cache_dtype=cache_dtype) for _ in range(2)
    )
    graphs = Graphs()
    get_patch(model).capture_steps(graphs)
    return plain, model, graphs


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, **{"do_sample": False, **options})


def warm(model, batch: int = 1) -> sinkattn.SinkCache:
    """A cache whose steps are captured, if they can be."""
    cache = sinkattn.SinkCache(model)
    with torch.no_grad():
        for tokens in (3, *[1] * WARM):
            model(random_ids(batch, tokens, seed=tokens), cache=cache)
    return cache


@torch.no_grad()
def logits(model, cache, steps: int = 1, **options) -> torch.Tensor:
    ids = random_ids(len(cache.seen), steps, seed=1)
    return torch.cat([model(step, cache=cache, **options).logits for step in ids.split(1, dim=1)], dim=1)
