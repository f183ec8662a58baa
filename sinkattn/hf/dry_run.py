"""Run a model without side effects: evaluation mode, restored module state, sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore each module's training mode at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Disable dropout, gradients, autocast and compilation; restore each module's training mode at the end."""
    with (
        without_dropout(model),
        torch.no_grad(),
        torch.autocast(model.device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),  # compiling does not pay off for a few runs
    ):
        yield


# Types of module attributes that are saved and restored.
PLAIN_TYPES = (bool, int, float, type(None), Tensor)
# Larger buffers are not copied: they are weights of a quantised model, not a state.
MAX_STATE_ELEMENTS = 1 << 20


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of modules and their attributes of plain types at the end."""
    before = [(module, *_state(module)) for module in model.modules()]
    tensors = {x for _, *holders in before for held in holders for x in held.values() if isinstance(x, Tensor)}
    copies = [(x, x.clone()) for x in tensors if x.numel() <= MAX_STATE_ELEMENTS and not x.is_meta]
    non_persistent = [(module, set(module._non_persistent_buffers_set)) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, value in copies:
                if not torch.equal(x, value):
                    x.copy_(value)
        for module, attributes, buffers in before:
            for name in _state(module)[0].keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for module, names in non_persistent:
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(names)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    return {name: x for name, x in module.__dict__.items() if isinstance(x, PLAIN_TYPES)}, dict(module._buffers)


def sample_ids(model: PreTrainedModel, num_tokens: int) -> Tensor:
    """Fixed ids for a trial: int64 ``[2, num_tokens]``."""
    embeddings: Any = model.get_input_embeddings()
    weight: Tensor = embeddings.weight
    # Spread over the vocabulary. The rows differ, so that mixing them up changes the outputs.
    return ((torch.arange(2 * num_tokens, device=weight.device) * 7919 + 13) % weight.shape[0]).view(2, num_tokens)
