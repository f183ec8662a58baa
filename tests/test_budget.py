"""The error budget: plain PyTorch keeps it in every shape and with every seed, and what loses precision does not."""

import math

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope
from torch.nn.functional import scaled_dot_product_attention

from sinkattn.reference import streaming_attention
from sinkattn.rope import rotate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# heads, kv_heads, head_dim, value_dim, tokens; the last three have enough outputs to tell a factor of two.
SHAPES = [
    (16, 1, 1, 1, 6),
    (2, 1, 7, 3, 8),
    (2, 1, 64, 64, 3),
    (8, 2, 128, 1, 40),
    (2, 1, 256, 64, 40),
    (4, 2, 16, 16, 40),
]
LARGE = SHAPES[3:]


def streams(shape, dtype):
    """Query, key and value, their rotation, and the oracle of causal attention."""
    heads, kv_heads, head_dim, value_dim, tokens = shape
    sizes = {"batch": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    new = make_qkv(tokens, **sizes, dtype=dtype)
    rope = make_rope(head_dim // 2 * 2) if head_dim > 1 else None
    exact = (x.double() for x in new)
    return *new, rope, oracle_of(dtype, streaming_attention, *exact, num_sinks=0, window=tokens, rope=rope)


def rotated(query, key, rope, position=0, angles=torch.float64):
    """Query and key at the positions from ``position`` on, by angles of that dtype."""
    if rope is None:
        return query, key
    positions = torch.arange(position, position + query.shape[2])
    angle = positions.to(angles)[:, None] * rope.inv_freq.to(angles)
    return [rotate(x, angle.cos().float(), angle.sin().float(), interleaved=False) for x in (query, key)]


def same(x):
    return x


def attention(query, key, value, rope, *, operand=same, weight=same, partial_sum=same, **positions):
    """In plain PyTorch, with a flaw: rotated operands and weights in the dtype that comes, sums in fp32, one by one."""
    dtype, heads, tokens = query.dtype, query.shape[1], query.shape[2]
    query, key = rotated(query, key, rope, **positions)
    query, key, value = (operand(x.float()).repeat_interleave(heads // x.shape[1], dim=1) for x in (query, key, value))
    scores = query @ key.mT / math.sqrt(query.shape[3])
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    weights = weight((scores - scores.amax(dim=3, keepdim=True)).exp())
    total, out = weights.sum(dim=3, keepdim=True), torch.zeros(())
    for token in range(tokens):
        out = partial_sum(out + weights[..., token, None].to(dtype) * value[:, :, token, None])
    return (out / total).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_pytorch_is_within_budget(shape, dtype):
    for seed in range(8):
        torch.manual_seed(seed)
        query, key, value, rope, oracle = streams(shape, dtype)
        assert_within_budget(attention(query, key, value, rope), oracle)
        query, key = rotated(query, key, rope)
        assert_within_budget(scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), oracle)


def assert_missed(out, oracle):
    with pytest.raises(AssertionError, match="times"):
        assert_within_budget(out, oracle)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_twice_the_error_is_noticed(shape, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        *new, oracle = streams(shape, dtype)
        assert_missed(2 * attention(*new).double() - oracle.output, oracle)


def stored_as(dtype):
    return lambda x: x.to(dtype).float()


def ten_bits(x):
    """As TF32 has them."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def four_units_off(x):
    return x * (1 + 4 * torch.finfo(FP32).eps * (2 * torch.rand_like(x) - 1))


FLAWS = {
    "operands-tf32": (FP32, {"operand": ten_bits}),
    "weights-bf16": (FP32, {"weight": stored_as(BF16)}),
    "weights-fp16": (FP32, {"weight": stored_as(FP16)}),
    "weights-of-a-bad-exp": (FP32, {"weight": four_units_off}),
    "sums-bf16": (FP32, {"partial_sum": stored_as(BF16)}),
    "sums-fp16": (FP32, {"partial_sum": stored_as(FP16)}),
    "angles-fp32": (FP32, {"position": 10**6, "angles": FP32}),
    "in-bf16-sums-bf16": (BF16, {"partial_sum": stored_as(BF16)}),
    "in-bf16-angles-fp32": (BF16, {"position": 10**6, "angles": FP32}),
    "in-fp16-weights-bf16": (FP16, {"weight": stored_as(BF16)}),
    "in-fp16-sums-fp16": (FP16, {"partial_sum": stored_as(FP16)}),
    "in-fp16-angles-fp32": (FP16, {"position": 10**6, "angles": FP32}),
}


@pytest.mark.parametrize(("dtype", "flaw"), FLAWS.values(), ids=FLAWS)
def test_lost_precision_is_noticed(dtype, flaw):
    for seed in range(3):
        torch.manual_seed(seed)
        *new, oracle = streams(SHAPES[-1], dtype)
        assert_missed(attention(*new, **flaw), oracle)


def test_a_single_wrong_output_is_noticed():
    *new, oracle = streams(SHAPES[-1], FP32)
    out = attention(*new)
    out[0, 1, 20, 3] += 12 * oracle.error[0, 1, 20, 3]
    assert_missed(out, oracle)
    out[0, 1, 20, 3] = torch.nan
    assert_missed(out, oracle)
