"""The compiled decode step of an enabled model: one graph for one token per stream, and linear layers made for it."""

from __future__ import annotations

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


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has weights of a tensor subclass, such as torchao's."""
    return type(module) is nn.Linear and type(module.weight.data) is not Tensor


def linear_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Forward of a linear layer on a CPU that is fast for few tokens, and agrees with its own on a random token.

    None for other modules, weights of an unknown kind, and layers whose forward was replaced.
    """
    if type(module) is not nn.Linear or not module.weight.is_cpu or "forward" in module.__dict__:
        return None
    product = _product(module)
    if product is None or not _agrees(module, product):
        return None
    return partial(_linear, module, product, module.weight if is_quantized(module) else None, module.weight.dtype)


def _linear(
    module: nn.Linear, product: Callable[..., Tensor], quantized: Tensor | None, dtype: torch.dtype, input: Tensor
) -> Tensor:
    """Linear layer; ``quantized`` are the weights that ``product`` was made of, if it reads no others."""
    if (
        not 0 < input.numel() <= ops.MAX_LINEAR_TOKENS * module.in_features
        or input.dtype != dtype
        or not (module.bias is None or (module.bias.dtype == dtype and module.bias.is_contiguous()))
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        # In a graph they would become inputs, and torch caches no graph on disk whose inputs are of a subclass.
        or (not torch.compiler.is_dynamo_compiling() and quantized is not None and module.weight is not quantized)
    ):
        return functional.linear(input, module.weight, module.bias)
    return product(input, bias=module.bias)


def has_replaced_weights(forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether the weights of a quantized layer were replaced since `linear_forward` returned this forward of it."""
    module, _, quantized, _ = forward.args  # type: ignore[attr-defined]  # a partial of _linear
    return module.weight is not quantized


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


@torch.no_grad()
def _agrees(module: nn.Linear, product: Callable[..., Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    input = torch.randn(1, module.in_features, generator=generator).to(module.weight.dtype)
    want = functional.linear(input, module.weight, module.bias).float()
    error, size = (product(input, bias=module.bias).float() - want).norm(), want.norm()
    return bool(error <= max(1e-3, 4 * torch.finfo(input.dtype).eps) * size)
