"""The operator for linear layers of a decode step, against PyTorch in fp64."""

import pytest
import torch

from sinkattn import ops


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", ops.LINEAR_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (2, 2), (4,), ()], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (35, 77)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_rounded_product(dtype, shape, rows, columns, with_bias):
    input, weight = randn(*shape, columns, dtype=dtype), randn(rows, columns, dtype=dtype)
    bias = randn(rows, dtype=dtype) if with_bias else None
    want = torch.nn.functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
    got = ops.linear(input, weight, bias=bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert not torch.allclose(got.double(), want.roll(1, dims=-1), rtol=0.1)


@pytest.mark.parametrize("dtype", ops.LINEAR_DTYPES)
def test_int8_weights_have_a_scale_for_each_row(dtype):
    input, weight = randn(2, 1, 50, dtype=dtype), torch.randint(-128, 128, (33, 50), dtype=torch.int8)
    scale, bias = torch.rand(33), randn(33, dtype=dtype)
    want = torch.nn.functional.linear(input.double(), weight.double() * scale.double()[:, None], bias.double())
    torch.testing.assert_close(
        ops.linear(input, weight, scale, bias).double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4
    )


def test_input_may_have_any_strides():
    input, weight = randn(64, 3, dtype=torch.float32).T, randn(7, 64, dtype=torch.float32)
    torch.testing.assert_close(ops.linear(input, weight), input @ weight.T)


@pytest.mark.skipif("not torch.backends.mkldnn.is_available()")
def test_int4_linear_is_the_product_with_the_weights_it_stands_for():
    rows, columns, group = 32, 64, 32
    input, integers = randn(2, 1, columns, dtype=torch.bfloat16), torch.randint(16, (rows, columns), dtype=torch.int32)
    scale, zero = torch.rand(2, rows, 1).bfloat16(), torch.rand(2, rows, 1).bfloat16()
    factors, offsets = (x[..., 0].T.repeat_interleave(group, dim=1).double() for x in (scale, zero))
    weight = (integers - 8) * factors + offsets
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    bias = randn(rows, dtype=torch.bfloat16)
    got = ops.int4_linear(input, packed, torch.cat((scale, zero), dim=-1), group, bias)
    torch.testing.assert_close(got.double(), input.double() @ weight.T + bias.double(), rtol=0.02, atol=0.2)


GOOD = {"input": torch.zeros(1, 8), "weight": torch.zeros(4, 8)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"input": torch.zeros(1, 7)}, r"input: expected \[\.\.\., 8\]"),
        ({"input": torch.zeros(5, 8)}, "input: expected 1 to 4 tokens, got 5"),
        ({"input": torch.zeros(0, 8)}, "input: expected 1 to 4 tokens, got 0"),
        ({"input": torch.zeros(1, 8, dtype=torch.float64)}, "input: expected dtype float32, float16 or bfloat16"),
        ({"weight": torch.zeros(8, 4).T}, r"weight: expected \[rows, columns\], contiguous"),
        ({"weight": torch.zeros(4, 8).half()}, "weight: expected int8 or the dtype of input"),
        ({"scale": torch.zeros(4).half()}, r"scale: expected \[4\], contiguous, in float32"),
        ({"scale": torch.zeros(1)}, r"scale: expected \[4\]"),
        ({"bias": torch.zeros(5)}, r"bias: expected \[4\]"),
        ({"bias": torch.zeros(4).half()}, r"bias: expected \[4\], contiguous, in"),
        ({"weight": torch.zeros(4, 8, requires_grad=True)}, "computes no gradients"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear(**{**GOOD, **bad})


@pytest.mark.parametrize("tokens", [1, 3])
def test_several_weights_give_their_products_one_after_the_other(tokens):
    input = randn(tokens, 40, dtype=torch.float32)
    weights = [torch.randint(-128, 128, (rows, 40), dtype=torch.int8) for rows in (5, 0, 33)]
    scales, biases = ([torch.rand(len(weight)) for weight in weights] for _ in range(2))
    got = ops.linear_operator(input, weights, scales, biases)
    want = [ops.linear(input, *each) for each in zip(weights, scales, biases, strict=True)]
    assert torch.equal(got, torch.cat(want, dim=-1))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([], [], []), "weights: expected at least one, got none"),
        (([GOOD["weight"]] * 2, [torch.ones(4)], []), "scales: expected none, or as many as weights"),
        (([GOOD["weight"]] * 2, [], [torch.ones(4)]), "biases: expected none, or as many as weights"),
        (([GOOD["weight"], GOOD["weight"].to(torch.int8)], [], []), "weight: expected int8 or the dtype of input"),
        (([GOOD["weight"].to(torch.int8), GOOD["weight"]], [], []), "weight: expected int8 or the dtype of input"),
        (([GOOD["weight"], torch.zeros(4, 7)], [], []), r"input: expected \[\.\.\., 7\]"),
    ],
)
def test_bad_lists_are_refused(lists, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear_operator(GOOD["input"], *lists)
