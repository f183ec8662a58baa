"""Error budget of attention: the rounding error to expect of each output, predicted in fp64 from its inputs.

The prediction is a statistical rounding error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 2.8):
rounding errors are independent random numbers of known variance. It uses no measured error, so it is the same on every
machine. Plain PyTorch meets it, as `test_budget.py` checks. Over 100 seeds of each of its cases, with SSE2 and with
AVX2, the RMS error of PyTorch was 0.65 to 0.99 of the prediction in fp32 and 0.58 to 0.92 in 16 bits. No seed exceeded
0.93 of its limit, and no single output 5.2 times its prediction, or 6.9 times with windows of 900.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from sinkattn import reference

ROUNDING = 0.18
"""Mean square of a relative rounding error, over the square of the largest one: the error is uniform within half a unit
in the last place, and the logarithm of the rounded number is uniform within its binade: 1/3 * (1 - 1/4) / (2 log 2)."""

RMS_LIMIT = 1.1
"""Limit of the RMS of all errors over their predictions: a tenth above any case of PyTorch."""

LARGEST_LIMIT = 10
"""Limit of a single error over its prediction. A normal number exceeds 5 once in two million. A large first term is in
all partial sums instead of half of them, which adds a factor of the root of two; a margin of 1.4 makes it 10."""


class Oracle(NamedTuple):
    """Output in fp64, and the predicted RMS error of each of its elements."""

    output: Tensor
    error: Tensor


def oracle_of(dtype: torch.dtype, attention: Any, *tensors: Any, **options: Any) -> Oracle:
    """Output of a function of `sinkattn.reference` for fp64 ``tensors``, and the predicted error in ``dtype``.

    A ring among the tensors is advanced once.
    """
    with patch.object(reference, "attend", partial(expected_error, dtype=dtype)):
        error = attention(*copy.deepcopy(tensors), **options)
    return Oracle(attention(*tensors, **options), error)


def expected_error(
    parts: list[tuple[Tensor, Tensor]],
    values: Tensor,
    distances: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Predicted error of the output ``[heads, value_dim]`` of `sinkattn.reference.attend`, to first order.

    Rotated queries and keys, weights and outputs are rounded to ``dtype``. Everything else is in fp32, and sums run
    from the first term to the last.
    """
    fp32 = ROUNDING * (torch.finfo(torch.float32).eps / 2) ** 2
    cache = 0 if dtype == torch.float32 else ROUNDING * (torch.finfo(dtype).eps / 2) ** 2
    scores, variances = [], []
    for query, keys in parts:
        q, q2, k2 = query[:, :, None], query[:, :, None].square(), keys.square()
        product = keys @ q
        # Roundings of a rotated element: the table, a product and the sum; then the dtype.
        rotated = (k2 * _inexact(keys, dtype)) @ q2 + k2 @ (q2 * _inexact(q, dtype))
        variance = (3 * fp32 + cache) * rotated + fp32 * _sum(k2 @ q2, product, len(q2[0]))
        scores.append(scale * product[..., 0])
        variances.append(scale**2 * variance[..., 0])
    scores, variances = torch.cat(scores, dim=1), torch.cat(variances, dim=1)
    weights = reference.attention_weights(scores, distances, softcap=softcap, **options)
    if softcap is not None:
        capped = (scores / softcap).tanh()
        # The cap scales earlier errors by its derivative; the division and tanh are two more roundings.
        variances = (variances + 2 * fp32 * scores.square()) * (1 - capped.square()).square()
        scores = softcap * capped
    # Two roundings of a score (scale and base), two of its distance to the maximum, and exp to within one unit.
    below = (weights / weights.amax(dim=1, keepdim=True)).log().clamp(min=-100)
    variances = variances + fp32 * (2 * scores.square() + 2 * below.square() + 2)

    # An error of a score changes its own weight, and through the normalisation all others.
    w2, v2, count = weights.square()[:, None], values.square(), values.shape[1]
    output = (weights[:, None] @ values)[:, 0]
    moved = (w2 * variances[:, None]) @ (values - output[:, None]).square()
    summed = fp32 * _sum(w2 @ v2, output[:, None], count)
    # The sum of the weights, the division and the output.
    last = (fp32 * ((count + 1) / 3 + 1) + cache) * output.square()
    return (moved + cache * w2 @ v2 + summed)[:, 0].add(last).sqrt()


def _inexact(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of elements that need rounding: those that are not rotated are exact in the dtype of the cache."""
    return x.to(dtype) != x


def _sum(squares: Tensor, total: Tensor, count: int) -> Tensor:
    """Summed squares of the rounding errors in a sum of products: each product, and each partial sum but the first.

    squares: sum of the squares of the products, total: their sum. In any order, the mean square of the sum of k of n
    is ``squares * k (n - k) / n (n - 1) + total^2 * k (k - 1) / n (n - 1)``.
    """
    return squares * (1 + (count + 1) / 6 - 1 / count) + total.square() * (count + 1) / 3


def assert_within_budget(out: Tensor, oracle: Oracle) -> None:
    """Assert that the RMS of all errors, and the largest error, are within their limits."""
    ratios = errors(out, oracle)
    rms, largest = ratios.square().mean().sqrt().item(), ratios.max().item()
    # The RMS of n independent numbers has a relative standard error of 1 / sqrt(2 n); this allows for three times that.
    # The outputs of a query share the errors of its largest scores, so they count as four independent numbers.
    independent = ratios[..., :4].numel()
    assert rms <= RMS_LIMIT * (1 + 3 / math.sqrt(2 * independent)), f"errors are {rms:.2f} times those to expect"
    assert largest <= LARGEST_LIMIT, f"an error is {largest:.1f} times the one to expect"


def errors(out: Tensor, oracle: Oracle) -> Tensor:
    """Error of each element over its prediction; NaN counts as infinity."""
    error = (out.double() - oracle.output).abs().nan_to_num(nan=torch.inf)
    return torch.where(error == 0, 0, error / oracle.error)
