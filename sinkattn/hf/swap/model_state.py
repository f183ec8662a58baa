"""What a graph of a model depends on besides its inputs: weights, modules, hooks and their settings."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, list, set)
PLAIN_TENSORS = (nn.Parameter, Tensor)
# Containers that every module has; of these only some have to do with its forward.
OF_EVERY_MODULE = nn.Module().__dict__.keys()
OF_FORWARD = {"_modules", "_forward_hooks", "_forward_pre_hooks"}


class ModelState:
    """Where the tensors of a model lie, and the attributes of its modules, as they were.

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
        values, tensors = list(self._values(modules)), list(self._tensors(modules))
        self._ids, self._addresses, self._layouts = list(map(id, values)), _addresses(tensors), _layouts(tensors)
        # The id of an object that is gone may be that of another one, so plain values are kept. Modules are gone with
        # their reference, and for tensors the address counts.
        self._kept = [value for value in values if not isinstance(value, (Tensor, nn.Module, *CONTAINERS))]

    def has_same_tensors(self) -> bool:
        """Whether all tensors are where they were: a graph reads and writes these addresses."""
        modules = [module() for module in self._modules]
        return None not in modules and self._addresses == _addresses(self._tensors(modules))

    def is_same(self) -> bool:
        """Whether no attribute, hook, module or tensor was replaced; changes of a tensor's values do not count."""
        modules = [module() for module in self._modules]
        return (
            None not in modules
            and self._ids == list(map(id, self._values(modules)))
            and self._layouts == _layouts(self._tensors(modules))
        )

    def _values(self, modules: list[Any]) -> Iterable[Any]:
        """Attributes of modules, and what those hold that are containers."""
        attributes = chain.from_iterable([module.__dict__.values() for module in modules])
        containers = [modules[index].__dict__.get(name, ()) for index, name in self._containers]
        return chain(attributes, chain.from_iterable([x.values() if isinstance(x, dict) else x for x in containers]))

    def _tensors(self, modules: list[Any]) -> Iterator[Any]:
        for module in modules:
            if module._parameters:
                yield from module._parameters.values()
            if module._buffers:
                yield from module._buffers.values()
        for index, name in self._tensor_attributes:
            yield modules[index].__dict__.get(name)


def _addresses(tensors: Iterable[Any]) -> list[int]:
    # Subclasses, such as quantized weights, have no address; they count as the objects that they are.
    return [x.data_ptr() if type(x) in PLAIN_TENSORS else id(x) for x in tensors]


def _layouts(tensors: Iterable[Any]) -> list[Any]:
    return [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
