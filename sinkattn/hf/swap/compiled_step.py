"""The compiled decode step of an enabled model: one graph for one token per stream."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CompiledStep:
    """A function of a decode step, compiled by ``torch.compile`` as one graph.

    Args:
        step: takes the state of the running forward, and the arguments of the decoder by name.
        plain: the same without being compiled; takes only the arguments of the decoder.
        defaults: values of arguments that some callers leave out, so that all share one graph.
    """

    def __init__(self, step: Callable[..., Any], plain: Callable[..., Any], defaults: dict[str, Any]) -> None:
        # It imports inductor, which takes most of a second, and which only models that are compiled need.
        from sinkattn.hf.swap.step_backend import compile_graph, keep_guards

        def own_step(running: Any, kwargs: dict[str, Any]) -> Any:
            return step(running, kwargs)

        # Dynamo limits the graphs of a code object, which enabled models would share.
        own_step.__code__ = own_step.__code__.replace()
        self._arguments = step, plain, defaults
        self._compiled = torch.compile(
            own_step,
            backend=compile_graph,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": keep_guards},
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of a copied or saved model, is compiled when it first runs."""
        return CompiledStep, self._arguments

    def __call__(self, running: Any, kwargs: dict[str, Any]) -> Any:
        """Run the step. It is compiled again for another batch size or dtype, under autocast, and for new adapters."""
        _, plain, defaults = self._arguments
        # Callers' arguments also differ in strides and in being inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            given = {name: _normal(x) for name, x in kwargs.items() if x is not None}
            try:
                return self._compiled(running, defaults | given)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # Nothing has run. The graphs that there are stay in use.
                warnings.warn(
                    "sinkattn: this decode step is not compiled, as torch has compiled it for so many other batch "
                    "sizes or settings already (torch._dynamo.config.recompile_limit)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return plain(**defaults | given)


def _normal(x: Any) -> Any:
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
