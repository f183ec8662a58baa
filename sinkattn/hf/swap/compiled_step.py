"""The compiled decode step of an enabled model: one graph for one token per stream, and linear layers made for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sinkattn import ops


class CompiledStep:
    """A function of a decode step, compiled by ``torch.compile`` as one graph.

    Args:
        step: takes the state of the running forward, and the arguments of the decoder by name.
        defaults: values of arguments that some callers leave out, so that all share one graph.
    """

    def __init__(self, step: Callable[..., Any], defaults: dict[str, Any]) -> None:
        def own_step(running: Any, kwargs: dict[str, Any]) -> Any:
            return step(running, kwargs)

        # Dynamo limits the graphs of a code object, which enabled models would share.
        own_step.__code__ = own_step.__code__.replace()
        self._step = step
        self._defaults = defaults
        self._compiled = torch.compile(own_step, fullgraph=True, dynamic=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        """The step of a copied model, which is compiled when it first runs."""
        return CompiledStep(copy.deepcopy(self._step, memo), self._defaults)

    def __call__(self, running: Any, kwargs: dict[str, Any]) -> Any:
        """Run the step. It is compiled again for another batch size or dtype, under autocast, and for new adapters."""
        # Callers' arguments also differ in strides and in being inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            given = {name: _normal(x) for name, x in kwargs.items() if x is not None}
            try:
                return self._compiled(running, self._defaults | given)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # Nothing has run. The graphs that there are stay in use.
                warnings.warn(
                    "sinkattn: this decode step is not compiled, as torch has compiled it for so many other batch "
                    "sizes or settings already (torch._dynamo.config.recompile_limit)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self._step(running, self._defaults | given)


def _normal(x: Any) -> Any:
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def linear_forward(module: nn.Linear, *, only_quantized: bool) -> Callable[[Tensor], Tensor] | None:
    """Forward of a linear layer on a CPU that is fast for few tokens; None for a layer or weights of another kind.

    Quantized weights are those of torchao. They must not be replaced afterwards; others may.
    """
    is_wanted = type(module) is nn.Linear and module.weight.is_cpu
    if only_quantized and is_wanted:
        is_wanted = type(module.weight.data) is not Tensor
    product = _product(module) if is_wanted else None
    return product and partial(_linear, module, product, module.weight.dtype)


def _linear(module: nn.Linear, product: Callable[..., Tensor], dtype: torch.dtype, input: Tensor) -> Tensor:
    if (
        input.numel() > ops.MAX_LINEAR_TOKENS * module.in_features
        or input.dtype != dtype
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    ):
        return functional.linear(input, module.weight, module.bias)
    return product(input, bias=module.bias)


def _product(module: nn.Linear) -> Callable[..., Tensor] | None:
    weight: Any = module.weight
    kind = type(weight.data).__name__
    if kind == "Tensor" and weight.dtype in ops.LINEAR_DTYPES:
        return partial(_product_with_weight, module)
    if kind == "Int8Tensor" and weight.scale.numel() == len(weight) and _is_weight_only(weight):
        return partial(ops.linear, weight=weight.qdata, scale=weight.scale.flatten().float())
    if kind == "Int4OpaqueTensor" and _is_weight_only(weight):
        return partial(
            ops.int4_linear, packed=weight.qdata, scale_and_zero=weight.scale_and_zero, group=weight.block_size[-1]
        )
    return None


def _product_with_weight(module: nn.Linear, input: Tensor, *, bias: Tensor | None) -> Tensor:
    if not module.weight.is_contiguous():
        return functional.linear(input, module.weight, bias)
    return ops.linear(input, module.weight, bias=bias)


def _is_weight_only(weight: Any) -> bool:
    """Whether a weight of torchao is a product of integers and scales, and activations stay as they are."""
    others = ("act_quant_kwargs", "act_mapping_type", "act_pre_scale")
    zero_point = getattr(weight, "zero_point", None)
    return all(getattr(weight, name, None) is None for name in others) and (zero_point is None or not zero_point.any())
