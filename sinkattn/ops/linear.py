"""The operator for linear layers of a decode step on a CPU; its kernel is C++ (csrc/linear.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

import sinkattn.ops.library  # noqa: F401  (registers the operators)
from sinkattn.ops.checks import check_no_gradients, check_same_device

# The operator itself, for graphs: takes an input and lists of weights, of their scales and of their biases, the latter
# two empty without any, and returns the products one after the other in the last dimension.
linear_operator = torch.ops.sinkattn.linear.default

# Tokens in one call; with more, PyTorch's matrix product is faster.
MAX_LINEAR_TOKENS = 4
LINEAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(input: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T * scale + bias`` for few tokens on a CPU, in the time that it takes to read the weights once.

    Sums are in fp32, also those of half precision; the result is rounded once.

    Args:
        input: ``[..., columns]``, up to `MAX_LINEAR_TOKENS` tokens in all, in one of `LINEAR_DTYPES`.
        weight: ``[rows, columns]``, contiguous, in the dtype of ``input`` or int8.
        scale: fp32 ``[rows]``, factor of each row of weights.
        bias: ``[rows]`` in the dtype of ``input``.

    Returns:
        ``[..., rows]`` in the dtype of ``input``.

    Raises:
        RuntimeError: for arguments of another shape, dtype or device, or an input that requires gradients.
    """
    check_no_gradients(input, weight, scale, bias)
    return linear_operator(input, [weight], [] if scale is None else [scale], [] if bias is None else [bias])


def int4_linear(
    input: Tensor, packed: Tensor, scale_and_zero: Tensor, group: int, bias: Tensor | None = None
) -> Tensor:
    """Product with 4-bit weights, by PyTorch's kernel.

    Args:
        input: ``[..., columns]``.
        packed: the weights, as PyTorch packs them for CPUs.
        scale_and_zero: ``[columns / group, rows, 2]`` in the dtype of ``input``.
        group: weights of a row that share a scale and a zero point.
        bias: ``[rows]``.

    Returns:
        ``[..., rows]`` in the dtype of ``input``.
    """
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scale_and_zero)
    out = out.view(*input.shape[:-1], -1)
    return out if bias is None else out + bias


@torch.library.register_fake("sinkattn::linear")
def _(input: Tensor, weights: list[Tensor], scales: list[Tensor], biases: list[Tensor]) -> Tensor:
    for x in (*weights, *scales, *biases):
        check_same_device(input, weight=x)
    return input.new_empty(*input.shape[:-1], sum(weight.shape[0] for weight in weights))
