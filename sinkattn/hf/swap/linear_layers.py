"""Linear layers of a model on a CPU, made for the few tokens of a decode step."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from sinkattn import ops
from sinkattn.hf.model_patch import ModelPatch

# PyTorch's product of one token is as fast in float32. On arm64 it has kernels of Arm's for half precision, beside
# which ours was not timed.
DTYPES = (torch.bfloat16, torch.float16) if platform.machine() == "x86_64" else ()


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has weights of a tensor subclass, such as torchao's."""
    return type(module) is nn.Linear and type(module.weight.data) is not Tensor


class LinearForward(partial[Tensor]):
    """A forward that `linear_forward` has made; its first argument is the patch."""


def restore_forwards(patch: ModelPatch) -> None:
    """Give the linear layers of a model the forwards of their class again."""
    for module in patch.model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, LinearForward) and forward.args[0] is patch:
            del module.__dict__["forward"]


def linear_forward(patch: ModelPatch, module: nn.Module) -> LinearForward | None:
    """Forward of a linear layer on a CPU that is fast for few tokens, while a patch is installed.

    None for other modules, layers whose forward was replaced, weights in float32, and those of an unknown kind:
    quantized ones with which it does not agree with the layer's own on a random token, too.
    """
    if type(module) is not nn.Linear or not module.weight.is_cpu or "forward" in module.__dict__:
        return None
    if not is_quantized(module):
        return LinearForward(_linear, patch, module) if module.weight.dtype in DTYPES else None
    product = _quantized_product(module.weight)
    if product is None or not _agrees(module, product):
        return None
    return LinearForward(_quantized_linear, patch, module, product, module.weight, module.weight.dtype)


def _linear(patch: ModelPatch, module: nn.Linear, input: Tensor) -> Tensor:
    """Linear layer with the weights that it has now, which may have been moved, converted or quantized."""
    # Attributes of modules take longer to read.
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if (
        not torch.compiler.is_dynamo_compiling()  # compilers know PyTorch's operator better
        and patch.is_installed
        and type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.is_contiguous()
        and _is_suited(input, weight.shape[1], weight.dtype, bias)
    ):
        return ops.linear_operator(input, [weight], [], [] if bias is None else [bias])
    return functional.linear(input, module.weight, module.bias)


def _quantized_linear(
    patch: ModelPatch,
    module: nn.Linear,
    product: Callable[..., Tensor],
    weight: Tensor,
    dtype: torch.dtype,
    input: Tensor,
) -> Tensor:
    """Linear layer with the quantized weights that ``product`` was made of, unless it has others by now."""
    # In a graph they would become inputs, and torch caches no graph on disk whose inputs are of a subclass.
    is_same = torch.compiler.is_dynamo_compiling() or (patch.is_installed and module.weight is weight)
    if is_same and _is_suited(input, module.in_features, dtype, module.bias):
        return product(input, bias=module.bias)
    return functional.linear(input, module.weight, module.bias)


def has_replaced_weights(forward: LinearForward) -> bool:
    """Whether the weights of a quantized layer were replaced since `linear_forward` returned this forward of it."""
    _, module, _, weight, _ = forward.args
    return module.weight is not weight


def _is_suited(input: Tensor, columns: int, dtype: torch.dtype, bias: Tensor | None) -> bool:
    """Whether an input is of so few tokens, and of the dtype, that the operator takes it, and nothing else is asked."""
    return (
        0 < input.numel() <= ops.MAX_LINEAR_TOKENS * columns
        and input.dtype == dtype
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_dynamo_compiling() or not _is_transformed())
    )


def _is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation, which the operator does not know, may be at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _quantized_product(weight: Any) -> Callable[..., Tensor] | None:
    kind = type(weight.data).__name__
    if kind == "Int8Tensor" and weight.scale.numel() == len(weight) and _is_weight_only(weight):
        return partial(ops.linear, weight=weight.qdata, scale=weight.scale.flatten().float())
    if kind == "Int4OpaqueTensor" and _is_weight_only(weight):
        return partial(
            ops.int4_linear, packed=weight.qdata, scale_and_zero=weight.scale_and_zero, group=weight.block_size[-1]
        )
    return None


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
