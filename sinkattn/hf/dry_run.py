"""Running a model to find something out about it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Run a model without dropout, gradients, autocast and compilation; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),  # what runs but once is not worth it
        ):
            yield
    finally:
        for module in training:
            module.training = True


# Types of attributes that a forward may change.
PLAIN = (bool, int, float, type(None), Tensor)


# Buffers of more elements are weights of a quantised model, and no state.
LARGEST_STATE = 1 << 20


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back, in the end, what modules keep beside their parameters: buffers, and attributes of plain types."""
    before = [(module, *_state(module)) for module in model.modules()]
    tensors = {x for _, *holders in before for held in holders for x in held.values() if isinstance(x, Tensor)}
    copies = [(x, x.clone()) for x in tensors if x.numel() <= LARGEST_STATE and not x.is_meta]
    transient = [(module, set(module._non_persistent_buffers_set)) for module in model.modules()]
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
        for module, names in transient:
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(names)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    return {name: x for name, x in module.__dict__.items() if isinstance(x, PLAIN)}, dict(module._buffers)


def sample_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    """Ids for a trial: int64 ``[2, tokens]``."""
    weight = model.get_input_embeddings().weight
    # Spread over the vocabulary; the two rows differ so that rows cannot be mixed up unseen.
    return ((torch.arange(2 * tokens, device=weight.device) * 7919 + 13) % weight.shape[0]).view(2, tokens)
