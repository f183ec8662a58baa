"""How many kernels a layer of a decode step takes: on a GPU each one costs a launch."""

import pytest
import torch
from families import ABSENT, build
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import sinkattn

# Operators that launch nothing, though their name is none of a view.
NO_KERNELS = {"aten::_unsafe_view", "aten::empty", "aten::detach"}
FEW, MANY = 6, 12  # of layers: both hold whole periods of every family's layer types


class KernelCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view and operator.name().partition(".")[0] not in NO_KERNELS
        return operator(*args, **(kwargs or {}))


@torch.no_grad()
def kernels(model, cache) -> int:
    ids = torch.arange(1, 11)[None]
    model(ids, cache=cache, use_cache=True)
    with KernelCounter() as counter:
        model(ids[:, :1], cache=cache, use_cache=True)
    return counter.count


def kernels_per_layer(family: str, *, streaming: bool) -> float:
    counts = []
    for layers in (FEW, MANY):
        model = build(family, num_hidden_layers=layers, layer_types=ABSENT)
        if streaming:
            sinkattn.enable(model, 2, 14)
        counts.append(kernels(model, sinkattn.SinkCache(model) if streaming else DynamicCache(config=model.config)))
    return (counts[1] - counts[0]) / (MANY - FEW)


@pytest.mark.parametrize(
    ("family", "most"), [("llama", 24), ("qwen3", 36), ("gemma3_text", 54), ("falcon", 16), ("gpt_neox", 10)]
)
def test_fewer_than_transformers_takes(family, most):
    count = kernels_per_layer(family, streaming=True)
    assert count <= most
    assert count < kernels_per_layer(family, streaming=False)
