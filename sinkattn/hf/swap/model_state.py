"""What a graph of a model depends on besides its inputs: weights, modules, hooks and their settings."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig

from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.plain_tensors import PLAIN_TENSORS, plain_tensors

CONTAINERS = (dict, list, set, tuple)
# Containers that every module has; of these only some have to do with its forward.
OF_EVERY_MODULE = nn.Module().__dict__.keys()
OF_FORWARD = {"_modules", "_forward_hooks", "_forward_pre_hooks"}


class ModelState:
    """Where the tensors of a model lie, and the attributes of its modules and configurations, as they were.

    Holds no weights: those that a model drops are freed. Comparing takes the host a fraction of the time of a forward.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [weakref.ref(module) for module in modules]
        attributes = [(index, *item) for index, module in enumerate(modules) for item in module.__dict__.items()]
        self._containers = [
            (index, name)
            for index, name, value in attributes
            if isinstance(value, CONTAINERS) and (name in OF_FORWARD or name not in OF_EVERY_MODULE)
        ]
        self._tensor_attributes = [(index, name) for index, name, value in attributes if isinstance(value, Tensor)]
        self._tensor_containers = [
            (index, name)
            for index, name in self._containers
            if any(isinstance(x, Tensor) for x in _contents(modules[index].__dict__[name]))
        ]
        self._configs = list({id(x): x for _, _, x in attributes if isinstance(x, PreTrainedConfig)}.values())
        values, tensors = list(self._values(modules)), list(self._tensors(modules))
        self._ids = list(map(id, values))
        self._addresses = self._tensor_addresses(modules)
        self._layouts = _layouts(tensors)
        # The id of an object that is gone may be that of another one, so plain values are kept. Modules are gone with
        # their reference, and for tensors the address counts.
        self._kept = [value for value in values if not isinstance(value, (Tensor, nn.Module, *CONTAINERS))]

    def has_same_tensors(self) -> bool:
        """Whether all tensors are where they were: a graph reads and writes these addresses."""
        modules = [module() for module in self._modules]
        return None not in modules and self._addresses == self._tensor_addresses(modules)

    def is_same(self) -> bool:
        """Whether no attribute, hook, module or tensor was replaced; changes of a tensor's values do not count."""
        modules = [module() for module in self._modules]
        return (
            None not in modules
            and self._ids == list(map(id, self._values(modules)))
            and self._layouts == _layouts(self._tensors(modules))
        )

    def _values(self, modules: list[Any]) -> Iterable[Any]:
        """Attributes of modules, forwards of their classes, and what containers and configurations hold."""
        attributes = chain.from_iterable([module.__dict__.values() for module in modules])
        containers: list[Any] = [modules[index].__dict__.get(name, ()) for index, name in self._containers]
        containers += [config.__dict__ for config in self._configs]
        contents = [x.values() if isinstance(x, dict) else x for x in containers]
        return chain(attributes, chain.from_iterable(contents), [type(module).forward for module in modules])

    def _tensor_addresses(self, modules: list[Any]) -> list[Any]:
        # A replay waits for this, so it is spelled out.
        addresses = [
            x.data_ptr() if type(x) in PLAIN_TENSORS else [y.data_ptr() for y in plain_tensors(x)]
            for module in modules
            for held in (module._parameters, module._buffers)
            if held
            for x in held.values()
            if x is not None
        ]
        return addresses + [x.data_ptr() for x in self._other_tensors(modules)]

    def _tensors(self, modules: list[Any]) -> Iterator[Tensor]:
        for module in modules:
            for held in (module._parameters, module._buffers):
                for x in held.values():
                    if type(x) in PLAIN_TENSORS:
                        yield x
                    elif x is not None:
                        yield from plain_tensors(x)
        yield from self._other_tensors(modules)

    def _other_tensors(self, modules: list[Any]) -> Iterator[Tensor]:
        for index, name in self._tensor_attributes:
            yield from plain_tensors(modules[index].__dict__.get(name))
        for index, name in self._tensor_containers:
            for x in _contents(modules[index].__dict__.get(name, ())):
                yield from plain_tensors(x)


def unseen_tensors(model: nn.Module) -> str | None:
    """Name of an attribute of a module that holds tensors where `ModelState` does not look; None without any."""
    for path, module in model.named_modules():
        own = {name: value for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE}
        for name, value in (own | module._parameters | module._buffers).items():
            if any(map(_hides_tensors, _contents(value) if isinstance(value, CONTAINERS) else [value])):
                return f"{path}.{name}" if path else name
    return None


def _hides_tensors(x: Any) -> bool:
    """Whether it is an object or container that holds tensors, such as the state of a quantization."""
    if isinstance(x, (nn.Module, type, PreTrainedConfig, ModelPatch)):
        return False
    if isinstance(x, Tensor):
        return type(x) not in PLAIN_TENSORS and not is_traceable_wrapper_subclass(x)
    held = _contents(x) if isinstance(x, CONTAINERS) else getattr(x, "__dict__", {}).values()
    return any(isinstance(y, Tensor) for y in held)


def _contents(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _layouts(tensors: Iterable[Tensor]) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
