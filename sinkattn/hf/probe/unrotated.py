"""Forwards of attention modules without the model's own rotation, which would multiply by the identity."""

from __future__ import annotations

import re
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# apply_rotary_pos_emb in most families.
ROTARY_FUNCTION = re.compile(r"apply_\w*rotary\w*")


class UnrotatedForward:
    """Forward of an attention module in which functions named like ``apply_rotary_pos_emb`` return what they are given.

    It runs the code of the class with globals of its own, so no other model is affected; names that are replaced in the
    module of the class later are not seen. Whether it is right for a family is for the caller to find out.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._original = type(module).forward
        self._function = _unrotated(_plain_forward(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward; that of the class if it is another one by now, with the rotation by zero."""
        original = type(self.module).forward
        return (self._function if original is self._original else original)(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or saved one makes its function anew: functions with globals of their own cannot be saved."""
        return UnrotatedForward, (self.module,)


def unrotated_forward(module: nn.Module) -> UnrotatedForward | None:
    """An `UnrotatedForward`; None if the module's own forward was replaced, or calls no such function by name."""
    if "forward" in module.__dict__ or not _rotary_functions(_plain_forward(module)):
        return None
    return UnrotatedForward(module)


def _plain_forward(module: nn.Module) -> Any:
    """The function of the class, without decorators of transformers, which rename arguments of outside callers."""
    function: Any = type(module).forward
    while hasattr(function, "__wrapped__") and function.__globals__["__name__"].startswith("transformers."):
        function = function.__wrapped__
    return function


def _rotary_functions(function: Any) -> list[str]:
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if not isinstance(code, CodeType):
        return []
    return [name for name in code.co_names if ROTARY_FUNCTION.fullmatch(name) and callable(names.get(name))]


def _unrotated(function: Any) -> FunctionType:
    names = {**function.__globals__, **dict.fromkeys(_rotary_functions(function), _as_given)}
    # With its module's name Dynamo would look the globals up in that module.
    del names["__name__"]
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _as_given(query: Any, key: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return query, key
