"""How much attention may err: what rounding costs, predicted for each output from the numbers that it is made of.

The prediction is the statistical rounding error analysis of textbooks (Higham, Accuracy and Stability of Numerical
Algorithms, 2.8): roundings are independent random numbers of known size. It needs no measured result, so it is the
same on every machine, and no yardstick can be lucky. It is what plain PyTorch errs by, which `test_budget.py` checks.
Over 100 seeds of each of its cases, with SSE2 and with AVX2, all errors of PyTorch together were 0.65 to 0.99 of those
to expect in fp32 and 0.58 to 0.92 in 16 bits; no single seed came nearer to its limit than 0.93, and no output erred by
more than 5.2 times what is to expect, or 6.9 in windows of 900.
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
"""Mean square of a relative rounding error, over the square of the largest: the error is uniform within half a unit in
the last place, and the logarithm of what is rounded within its binade: 1/3 * (1 - 1/4) / (2 log 2)."""

RMS_LIMIT = 1.1
"""What the root mean square of all errors may be, in units of those to expect: a tenth above any case of PyTorch."""

LARGEST_LIMIT = 10
"""What any one error may be. A normal number is beyond 5 once in two million; a large term that comes first is in all
partial sums and not, as on the average, in half of them, which is the root of two more; and half of that to be safe."""


class Oracle(NamedTuple):
    """Output in fp64, and for each of its numbers the root mean square of the error to expect."""

    output: Tensor
    error: Tensor


def oracle_of(dtype: torch.dtype, attention: Any, *tensors: Any, **options: Any) -> Oracle:
    """What `attention` of the specification gives for fp64 ``tensors``, and the error to expect in ``dtype``.

    A ring among the tensors advances, once.
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
    """In place of `sinkattn.reference.attend`: how much its output ``[heads, value_dim]`` errs, to first order.

    Rotated queries and keys, weights and outputs are rounded to ``dtype``. All else is in fp32, and sums run from their
    first term to the last.
    """
    fp32 = ROUNDING * (torch.finfo(torch.float32).eps / 2) ** 2
    cache = 0 if dtype == torch.float32 else ROUNDING * (torch.finfo(dtype).eps / 2) ** 2
    scores, variances = [], []
    for query, keys in parts:
        q, q2, k2 = query[:, :, None], query[:, :, None].square(), keys.square()
        product = keys @ q
        # A rotated element: the table, a product and their sum; then the dtype.
        rotated = (k2 * _inexact(keys, dtype)) @ q2 + k2 @ (q2 * _inexact(q, dtype))
        variance = (3 * fp32 + cache) * rotated + fp32 * _sum(k2 @ q2, product, len(q2[0]))
        scores.append(scale * product[..., 0])
        variances.append(scale**2 * variance[..., 0])
    scores, variances = torch.cat(scores, dim=1), torch.cat(variances, dim=1)
    weights = reference.attention_weights(scores, distances, softcap=softcap, **options)
    if softcap is not None:
        capped = (scores / softcap).tanh()
        # The cap dampens what came before; dividing by it and tanh are two roundings more.
        variances = (variances + 2 * fp32 * scores.square()) * (1 - capped.square()).square()
        scores = softcap * capped
    # The scale and the base of a score, two roundings of what it is below the largest, and exp to within a unit.
    below = (weights / weights.amax(dim=1, keepdim=True)).log().clamp(min=-100)
    variances = variances + fp32 * (2 * scores.square() + 2 * below.square() + 2)

    # A score moves its own weight, and by the sum all others.
    w2, v2, count = weights.square()[:, None], values.square(), values.shape[1]
    output = (weights[:, None] @ values)[:, 0]
    moved = (w2 * variances[:, None]) @ (values - output[:, None]).square()
    summed = fp32 * _sum(w2 @ v2, output[:, None], count)
    # The sum of the weights, the division and the output.
    last = (fp32 * ((count + 1) / 3 + 1) + cache) * output.square()
    return (moved + cache * w2 @ v2 + summed)[:, 0].add(last).sqrt()


def _inexact(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What had to be rounded: elements that were not rotated are what was given, in the dtype of the cache."""
    return x.to(dtype) != x


def _sum(squares: Tensor, total: Tensor, count: int) -> Tensor:
    """Roundings in a sum of products: one of each, and one of each partial sum but the first, squared and added up.

    squares: sum of the squares of the products, total: their sum. In any order, the mean square of the sum of k of n
    is ``squares * k (n - k) / n (n - 1) + total^2 * k (k - 1) / n (n - 1)``.
    """
    return squares * (1 + (count + 1) / 6 - 1 / count) + total.square() * (count + 1) / 3


def assert_within_budget(out: Tensor, oracle: Oracle) -> None:
    """All errors together, and the largest, are no more than rounding explains."""
    ratios = errors(out, oracle)
    rms, largest = ratios.square().mean().sqrt().item(), ratios.max().item()
    # A root mean square of n independent numbers is off by 1 / sqrt(2 n); this allows for three times that. Outputs of
    # a query share the errors of its few large scores, so they count as four.
    independent = ratios[..., :4].numel()
    assert rms <= RMS_LIMIT * (1 + 3 / math.sqrt(2 * independent)), f"errors are {rms:.2f} times those to expect"
    assert largest <= LARGEST_LIMIT, f"an error is {largest:.1f} times the one to expect"


def errors(out: Tensor, oracle: Oracle) -> Tensor:
    """Error of every number in units of the one to expect; a NaN counts as infinite."""
    error = (out.double() - oracle.output).abs().nan_to_num(nan=torch.inf)
    return torch.where(error == 0, 0, error / oracle.error)
