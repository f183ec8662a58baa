"""`ModelPatch`: attributes and forwards that `enable` puts on a model, and `disable` removes again."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from sinkattn.ops import RingLayout


class ModelPatch:
    """What `enable` puts on a model. A subclass has the `forward` that replaces the decoder's own.

    Attributes:
        id: of this patch; a cache works only with the patch that it was made for.
        cache_class: class that ``SinkCache(model)`` makes.
    """

    cache_class: type[Cache]

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        self.id = uuid.uuid4().hex
        self.model = model
        self.decoder = decoder
        self.layout = layout
        self._set: list[tuple[nn.Module, str, Any, Any]] = []
        """Module, attribute, value, and the value before; None if there was none."""
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Put everything in place."""
        for module in {self.model, self.decoder}:
            self.set_attribute(module, "_sinkattn", self)
        self.set_forward(self.decoder, self.forward)

    def remove(self) -> None:
        """Restore the model, however far `install` came; an attribute that was replaced since by others stays."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._set:
            module, name, value, before = self._set.pop()
            if module.__dict__.get(name) is not value:
                continue
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module until `remove`."""
        self._set.append((module, name, value, module.__dict__.get(name)))
        module.__dict__[name] = value

    def set_forward(self, module: nn.Module, forward: Callable) -> None:
        """Replace a module's forward until `remove`; a wrapper around it, such as accelerate's, may stay longer."""
        self.set_attribute(
            module, "forward", _Forward(_dispatch, self, module, forward, module.__dict__.get("forward"))
        )

    def cache_layers(self, state: Any) -> list[Any]:
        """Layers of a new cache."""
        raise NotImplementedError

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder while the model is enabled."""
        raise NotImplementedError

    def run_decoder(self, **kwargs) -> Any:
        """Run the decoder's own forward."""
        before = next(own for module, name, _, own in self._set if module is self.decoder and name == "forward")
        return _own_forward(self.decoder, before)(**kwargs)


def get_patch(model: nn.Module) -> ModelPatch | None:
    """Patch of an enabled model, or of one wrapped in it; None if it is not enabled."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


def _own_forward(module: nn.Module, before: Callable | None) -> Callable:
    return before or partial(type(module).forward, module)


def _dispatch(patch: ModelPatch, module: nn.Module, forward: Callable, before: Callable | None, *args, **kwargs) -> Any:
    is_enabled = patch.model.__dict__.get("_sinkattn") is patch
    return (forward if is_enabled else _own_forward(module, before))(*args, **kwargs)


class _Forward(partial):
    """`_dispatch`, with the signature of the forward that it replaces."""

    @property
    def __signature__(self) -> inspect.Signature:
        _, module, _, before = self.args
        return inspect.signature(before or type(module).forward.__get__(module))
