"""Rings of 8 bits on the CPU: the kernels store the bits of the specification, and attend over them within budget."""

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, run

from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.reference import streaming_attention

FORMATS = [
    pytest.param(dtype, cache_dtype, id=f"{name}-{cache_dtype}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16))
    for cache_dtype in ops.EIGHT_BIT_DTYPES
]
LAYOUT = (4, 40, 7)


def make_ring(k, v, dtype, cache_dtype, layout=LAYOUT):
    return RingKVCache(
        len(k), k.shape[1], k.shape[3], *layout, value_dim=v.shape[3], dtype=dtype, cache_dtype=cache_dtype
    )


def assert_same_bits(ring, expected):
    assert list(ring.tensors) == list(expected.tensors)
    for name, x in ring.tensors.items():
        assert torch.equal(x.view(torch.uint8), expected.tensors[name].view(torch.uint8)), name


def check(shape, calls, dtype, cache_dtype, layout=LAYOUT, **options):
    """The kernel in several calls, against the specification in one."""
    q, k, v = make_qkv(sum(calls), dtype=dtype, **shape)
    ring, expected = (make_ring(k, v, dtype, cache_dtype, layout) for _ in range(2))
    out = run(sink_attention, ring, q, k, v, calls, **options)
    oracle = oracle_of(dtype, reference.sink_attention, q.double(), k, v, expected, **options)
    assert_within_budget(out, oracle)
    assert_same_bits(ring, expected)


@pytest.mark.parametrize(("dtype", "cache_dtype"), FORMATS)
@pytest.mark.parametrize("head_dim", [7, 80])
def test_eight_bit_head_sizes(head_dim, dtype, cache_dtype):
    shape = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": head_dim, "value_dim": 2 * head_dim - 1}
    check(shape, [3, 50, 1, 7, 1], dtype, cache_dtype, rope=make_rope(head_dim // 2 * 2))


@pytest.mark.parametrize("calls", [[1] * 70, [7] * 10, [64, 6], [70]], ids=["1", "7", "64", "70"])
@pytest.mark.parametrize("cache_dtype", ops.EIGHT_BIT_DTYPES)
def test_calls_of_any_size_are_one_stream(calls, cache_dtype):
    shape = {"batch": 2, "heads": 5, "kv_heads": 1, "head_dim": 16}
    options = {"softcap": 2.0, "sink_logits": torch.linspace(-2, 2, 5), "alibi_slopes": 2.0 ** -torch.arange(1.0, 6)}
    check(shape, calls, torch.float32, cache_dtype, rope=make_rope(8, style="interleaved"), **options)


def test_the_budget_tells_8_bits_from_none():
    """Negative control of `check`: attention over tokens that were not rounded is not within budget."""
    q, k, v = make_qkv(70)
    out = run(sink_attention, make_ring(k, v, torch.float32, "int8"), q, k, v, [70])
    oracle = oracle_of(
        torch.float32, streaming_attention, *(x.double() for x in (q, k, v)), num_sinks=LAYOUT[0], window=LAYOUT[1]
    )
    with pytest.raises(AssertionError, match="times those to expect"):
        assert_within_budget(out, oracle)


@pytest.mark.parametrize("tokens", [1, 40], ids=["decode", "chunk"])
@pytest.mark.parametrize(("dtype", "cache_dtype"), FORMATS)
def test_rows_sinks_and_begins_of_each_row(tokens, dtype, cache_dtype):
    _, k, v = make_qkv(60, batch=3, dtype=dtype)
    ring, expected = (make_ring(k, v, dtype, cache_dtype) for _ in range(2))
    for each in (ring, expected):
        each.append(k, v)
    options = {"rows": torch.tensor([2, 0]), "row_sinks": torch.tensor([1, 4]), "begins": torch.tensor([30, 0])}
    new = make_qkv(tokens, dtype=dtype)
    out = sink_attention(*new, ring, rope=make_rope(), **options)
    q, k, v = new
    oracle = oracle_of(dtype, reference.sink_attention, q.double(), k, v, expected, rope=make_rope(), **options)
    assert_within_budget(out, oracle)
    assert_same_bits(ring, expected)


@pytest.mark.parametrize("cache_dtype", ops.EIGHT_BIT_DTYPES)
def test_appended_tokens_are_those_of_attention(cache_dtype):
    q, k, v = make_qkv(90, dtype=torch.bfloat16)
    rings = [make_ring(k, v, torch.bfloat16, cache_dtype) for _ in range(2)]
    for tokens in (slice(0, 2), slice(2, 60), slice(60, 90)):
        parts = [x[:, :, tokens] for x in (q, k, v)]
        rings[0].append(*parts[1:], rope=make_rope(), lengths=torch.tensor([parts[0].shape[2], 1]))
        sink_attention(*parts, rings[1], rope=make_rope(), lengths=torch.tensor([parts[0].shape[2], 1]))
    assert_same_bits(*rings)


@pytest.mark.parametrize("again", [[1] * 7, [7]], ids=["decode", "chunk"])
@pytest.mark.parametrize("cache_dtype", ops.EIGHT_BIT_DTYPES)
def test_replay_after_rollback_is_the_same(again, cache_dtype):
    q, k, v = make_qkv(67)
    ring, straight = (make_ring(k, v, torch.float32, cache_dtype) for _ in range(2))
    expected = run(sink_attention, straight, q, k, v, [60, *again])
    run(sink_attention, ring, q, k, v, [60])
    sink_attention(*make_qkv(7), ring)
    ring.rollback(7)
    out = run(sink_attention, ring, *(x[:, :, 60:] for x in (q, k, v)), again)
    assert torch.equal(out, expected[:, :, 60:])
    assert_same_bits(ring, straight)


@pytest.mark.parametrize("calls", [[1] * 180, [180], [30, 150]], ids=["decode", "chunk", "chunks"])
@pytest.mark.parametrize(("dtype", "cache_dtype"), FORMATS)
def test_nonfinite_tokens_only_reach_queries_that_see_them(calls, dtype, cache_dtype):
    q, k, v = make_qkv(180, dtype=dtype)
    clean = run(sink_attention, make_ring(k, v, dtype, cache_dtype), q, k, v, calls)
    for x, number in ((k, torch.inf), (v, -torch.inf), (v, torch.nan)):
        x = x[:, :, 20]
        before = x.clone()
        x[..., 3] = number
        out = run(sink_attention, make_ring(k, v, dtype, cache_dtype), q, k, v, calls)
        x.copy_(before)
        assert out[:, :, 20 : 20 + LAYOUT[1]].isnan().all()
        for unseen in (slice(0, 20), slice(20 + LAYOUT[1], 180)):
            assert torch.equal(out[:, :, unseen], clean[:, :, unseen])


def parts_of_a_call():
    q, k, v = make_qkv(1)
    ring = make_ring(k, v, torch.float32, "int8")
    return (
        ring,
        {"keys": ring.keys, "values": ring.values, "key": k, "value": v, "seen": ring.seen, **ring.eight_bit},
        q,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_keys": None}, "expected all of them beside keys of int8 or float8_e4m3fn"),
        ({"key_scales": None}, "expected all of them"),
        ({"keys": torch.zeros(2, 2, 47, 16), "values": torch.zeros(2, 2, 47, 16)}, "none beside others"),
        ({"sink_values": torch.zeros(2, 2, 3, 16)}, "sink_values: expected a contiguous tensor of .* 4 slots"),
        ({"sink_keys": torch.zeros(2, 2, 16, 4).mT}, "sink_keys: expected a contiguous"),
        ({"sink_keys": torch.zeros(2, 2, 4, 16).half()}, "sink_keys: .* of the dtype of key"),
        ({"key_scales": torch.zeros(2, 2, 47, 1).double()}, "key_scales: .* float32 scales"),
        ({"value_scales": torch.zeros(2, 2, 46, 1)}, "value_scales: .* 47 slots"),
        ({"value_scales": torch.zeros(2, 2, 47, 2)}, "value_scales: .* 1 elements"),
        ({"value": torch.zeros(2, 2, 1, 16).half()}, "key, value: expected the dtype"),
        (
            {name: torch.zeros(2, 2, 1, 16).double() for name in ("key", "value")},
            "key, value: expected dtype float32, float16 or bfloat16 with a ring of 8 bits",
        ),
    ],
)
def test_operators_check_the_parts_of_a_ring(change, message):
    ring, tensors, q = parts_of_a_call()
    tensors |= change
    extra = [tensors[name] for name in ring.eight_bit]
    whole = [tensors[name] for name in ("keys", "values")]
    new = [tensors[name] for name in ("key", "value", "seen")]
    before = {name: x.clone() for name, x in ring.tensors.items()}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sinkattn.append_(*whole, *new, None, None, None, 4, False, None, None, *extra)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sinkattn.sink_attention_(
            *whole, q, *new, None, None, None, 4, 40, 1.0, False, None, None, None, None, None, None, None, *extra
        )
    assert all(torch.equal(x, before[name]) for name, x in ring.tensors.items())
