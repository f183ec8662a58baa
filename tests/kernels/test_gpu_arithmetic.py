"""The error budget under the arithmetic of a GPU, which the interpreter does not have: emulated, without one."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from budget import errors, oracle_of
from factories import make_qkv, make_rope
from test_attention import OPTIONS, check, rings_at
from triton.runtime import interpreter

from sinkattn import reference, sink_attention

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself"),
    pytest.mark.filterwarnings("ignore:(invalid|divide|overflow).*encountered:RuntimeWarning"),
]


def ex2_approx(x):
    """2^x of an fp32 array, as the special function unit has it.

    A table of 64 intervals with a parabola in each leaves a Chebyshev polynomial of degree 3, as large as the rounding
    of its coefficients makes it. Up to 0.91 units in the last place, errors are as published: 22.5 bits, 1.41 units,
    74 % correctly rounded (Lindholm et al., IEEE Micro 28(2), 2008, table 1). Subnormal results are flushed to zero.
    """
    x = np.clip(x, -1000, 1000).astype(np.float64)
    whole = np.floor(x)
    interval, place = np.divmod(64 * (x - whole), 1)
    t = 2 * place - 1
    largest = 0.91 * (interval * 0.618034 % 1)  # evenly spread over the intervals
    result = (np.exp2(x) + np.exp2(whole - 23) * largest * (4 * t**3 - 3 * t)).astype(np.float32)
    return np.where(result < 2.0**-126, np.float32(0), result)


def fused_dot(a, b, acc):
    """``a @ b + acc`` of fp32 arrays by fused multiply-adds, one after the other."""
    for column, row in zip(np.moveaxis(a, -1, 0), np.moveaxis(b, -2, 0), strict=True):
        # The product is exact in fp64.
        product = column[..., :, None].astype(np.float64) * row[..., None, :]
        acc = (product + acc).astype(np.float32)
    return acc


@pytest.fixture
def gpu_arithmetic(monkeypatch):
    def create_exp2(builder, x):
        return interpreter.TensorHandle(ex2_approx(x.data), x.dtype.scalar)

    def create_dot(builder, a, b, acc, *_):
        return interpreter.TensorHandle(fused_dot(a.data, b.data, acc.data), acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", create_exp2)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def test_ex2_errs_as_published():
    x = -8 * np.random.default_rng(0).random(200_000, dtype=np.float32)
    exact, got = np.exp2(x.astype(np.float64)), ex2_approx(x)
    units = np.abs(got - exact) / np.exp2(np.floor(np.log2(exact)) - 23)
    assert 1.35 < units.max() < 1.41
    assert 22.5 < -np.log2(np.abs(got / exact - 1).max()) < 22.8
    assert 0.69 < (got == exact.astype(np.float32)).mean() < 0.79
    assert ex2_approx(np.float32([-np.inf, -130, 0])).tolist() == [0, 0, 1]


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("head_dim", [1, 16, 64, 256])
def test_head_sizes_within_budget(head_dim, tokens):
    heads = {"heads": 20 if head_dim < 64 else 2, "kv_heads": 1, "head_dim": head_dim}
    rope = make_rope(head_dim) if head_dim > 1 else None
    check((2, 70, 0), [5, 300], tokens, torch.float32, heads=heads, rope=rope)


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("options", [OPTIONS["all"], {"scale": 3.0}], ids=["all", "large-scores"])
def test_score_options_within_budget(options, tokens):
    check((3, 150, 0), [90, 301], tokens, torch.float32, rope=make_rope(), **options)


@pytest.mark.usefixtures("gpu_arithmetic")
def test_long_windows_are_summed_by_blocks():
    """Errors of a sum from first to last, which the budget allows, grow with the root of the window: 0.87 here."""
    ring, _, exact = rings_at([1000], (4, 600, 0), {}, torch.float32, make_rope())
    new = make_qkv(33, batch=1)
    out = sink_attention(*new, ring, rope=make_rope(), backend="triton")
    oracle = oracle_of(torch.float32, reference.sink_attention, *(x.double() for x in new), exact, rope=make_rope())
    rms = errors(out, oracle).square().mean().sqrt().item()
    assert rms < 0.65
