"""`ModelPatch`: the attributes, forwards and hooks that `enable` sets on a model and `disable` removes."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from transformers import PreTrainedModel

from sinkattn.argument_checks import check_kind
from sinkattn.ops import RingLayout
from sinkattn.ring_cache import CacheDtype

# Those that exist, by their address, in order of creation.
_patches: WeakValueDictionary[int, ModelPatch] = WeakValueDictionary()


class ModelPatch:
    """Patch of a model. Subclasses define the `forward` that replaces the decoder's.

    Attributes:
        id: identifies the patch; a cache works only with the patch that it was created for.
        cache_class: class of the cache that ``SinkCache(model)`` creates, `SinkCache` or a subclass.
        cache_dtype: of tokens that are not sinks in the rings of a cache; None for that of the model.
    """

    cache_class: type[Any]
    cache_dtype: CacheDtype | None = None

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        self.id = uuid.uuid4().hex
        self.model = model
        self.decoder = decoder
        self.layout = layout
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []
        """Module, name, value and previous value of each attribute that was set; None if it was not set before."""
        self._hooks: list[Any] = []
        _patches[id(self)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copied or saved model."""
        self.__dict__ |= state
        _patches[id(self)] = self

    @property
    def is_installed(self) -> bool:
        """Whether the model is patched."""
        return self.model.__dict__.get("_sinkattn") is self

    def install(self) -> None:
        """Patch the model."""
        for module in {self.model, self.decoder}:
            self.set_attribute(module, "_sinkattn", self)
        self.set_forward(self.decoder, self.forward)

    def remove(self) -> None:
        """Restore the model, also after a partial `install`. Keep attributes that other code has replaced since."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._attributes:
            _restore(*self._attributes.pop())

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a module until `remove`."""
        self._attributes.append((module, name, value, module.__dict__.get(name)))
        module.__dict__[name] = value

    def set_forward(self, module: nn.Module, forward: Callable) -> None:
        """Replace a module's forward until `remove`.

        A wrapper around it, such as accelerate's, may keep it longer; then it calls the previous forward.
        """
        previous = module.__dict__.get("forward")
        self.set_attribute(module, "forward", PatchedForward(_dispatch, self, module, forward, previous))

    def unset_forward(self, module: nn.Module) -> None:
        """Undo the last `set_forward` of a module, unless `remove` has done so."""
        for index, (owner, name, *_) in reversed(list(enumerate(self._attributes))):
            if owner is module and name == "forward":
                return _restore(*self._attributes.pop(index))

    def layout_with(self, num_sinks: int) -> RingLayout:
        """Layout of a cache with another number of sinks; raises ValueError for one that the model does not take."""
        raise NotImplementedError

    def cache_layers(self, state: Any) -> list[Any]:
        """Layers of a new cache."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the decoder while the model is enabled."""
        raise NotImplementedError

    def describe_steps(self, cache: Any) -> str:
        """How the decode steps of a cache run, and why, in one line."""
        raise NotImplementedError

    def run_decoder(self, **kwargs: Any) -> Any:
        """Run the decoder's original forward."""
        return self.original_forward(self.decoder)(**kwargs)

    def original_forward(self, module: nn.Module) -> Callable:
        """The forward of a module that `set_forward` has replaced."""
        attributes = self._attributes
        previous = next(old for owner, name, _, old in attributes if owner is module and name == "forward")
        return _original_forward(module, previous)


def get_patch(model: nn.Module) -> ModelPatch | None:
    """Patch of an enabled model, or of an enabled model inside a wrapper; None if there is none."""
    return next((m.__dict__["_sinkattn"] for m in model.modules() if "_sinkattn" in m.__dict__), None)


def require_patch(model: nn.Module) -> ModelPatch:
    """Patch of an enabled model; raises ValueError if the model is not enabled, TypeError for what is no model."""
    check_kind("model", model, nn.Module, "a transformers PreTrainedModel")
    patch = get_patch(model)
    if patch is None:
        raise ValueError("model: expected a model prepared by sinkattn.enable(model), got one that is not enabled")
    return patch


def find_patch(patch_id: str) -> ModelPatch:
    """Patch of an enabled model by its id; of copies of a model, that of the first.

    Raises RuntimeError if the model is not enabled any more.
    """
    patches = (patch for patch in list(_patches.values()) if patch.id == patch_id and get_patch(patch.model) is patch)
    if (patch := next(patches, None)) is None:
        raise RuntimeError("cache: expected its model to be enabled still, got one that was disabled or is gone")
    return patch


def _restore(module: nn.Module, name: str, value: Any, previous: Any) -> None:
    """Restore an attribute that was set to a value, unless other code has replaced it since."""
    if module.__dict__.get(name) is not value:
        return
    if previous is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = previous


def _original_forward(module: nn.Module, previous: Callable | None) -> Callable:
    return previous or partial(type(module).forward, module)


def _dispatch(
    patch: ModelPatch, module: nn.Module, forward: Callable, previous: Callable | None, *args: Any, **kwargs: Any
) -> Any:
    """Call the patched forward while the patch is installed, else the original."""
    return (forward if patch.is_installed else _original_forward(module, previous))(*args, **kwargs)


class PatchedForward(partial):
    """`_dispatch`, with the signature of the forward that it replaces; never changed."""

    @property
    def __signature__(self) -> inspect.Signature:
        _, module, _, previous = self.args
        return inspect.signature(previous or type(module).forward.__get__(module))
