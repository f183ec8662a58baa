"""The fused CPU kernel on shapes that models have: every head size and grouping, both of its ways, any threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error, run
from torch.testing import assert_close

from sinkattn import RingKVCache, ops, sink_attention
from sinkattn.reference import streaming_attention

LOW_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODE = [1] * 6
# Longer than the window of 70, whose ring wraps within; then single tokens, then one that no long call is left of.
CALLS = [90, *DECODE, 33, *DECODE]
LAYOUT = (4, 70, 0)


def both(layout, heads, calls, dtype, rope=None, **options):
    """The kernel and the oracle on the same streams."""
    q, k, v = make_qkv(sum(calls), **heads, dtype=dtype)
    ring = RingKVCache(*k.shape[:2], k.shape[3], *layout, value_dim=v.shape[3], dtype=dtype)
    out = run(sink_attention, ring, q, k, v, calls, rope=rope, **options)
    options |= {"num_sinks": layout[0], "window": layout[1], "rope": rope}
    return out, oracle_of(dtype, streaming_attention, *(x.double() for x in (q, k, v)), **options)


@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 80, 128, 256], ids=lambda head_dim: f"dim{head_dim}")
def test_head_sizes_within_budget(head_dim, dtype):
    rope = make_rope(head_dim // 2 * 2) if head_dim > 1 else None
    heads = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": head_dim, "value_dim": 2 * head_dim - 1}
    assert_within_budget(*both(LAYOUT, heads, CALLS, dtype, rope))


@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 2), (9, 3), (4, 1), (5, 1), (14, 2), (8, 1), (71, 1)], ids=str
)
def test_head_groups_within_budget(heads, kv_heads, dtype):
    shape = {"batch": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": 32}
    assert_within_budget(*both(LAYOUT, shape, [80, *DECODE], dtype, make_rope(32)))


@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
@pytest.mark.parametrize("option", ["softcap", "sink_logits", "alibi_slopes"])
def test_score_options_on_both_ways(option, dtype):
    values = {"softcap": 2.0, "sink_logits": torch.linspace(-2, 2, 4), "alibi_slopes": 2.0 ** -torch.arange(1.0, 5)}
    options = {option: values[option]}
    heads = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 64}
    assert_within_budget(*both(LAYOUT, heads, CALLS, dtype, make_rope(64), **options))


@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
@pytest.mark.parametrize("headroom", [0, 40], ids=lambda headroom: f"headroom{headroom}")
def test_windows_of_several_stretches(headroom, dtype):
    """600 slots are read in two KV splits, and 700 tokens at once in two chunks."""
    layout, heads = (5, 595, headroom), {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 32}
    assert_within_budget(*both(layout, heads, [700, *DECODE, 3, 5, 37, 2, *DECODE], dtype, make_rope(32)))


def test_double_precision():
    out, oracle = both(LAYOUT, {"head_dim": 24}, CALLS, torch.float64, make_rope(24), softcap=3.0)
    assert max_error(out, oracle.output) < 1e-13


def step(ring, query, key, value, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return sink_attention(query, key, value, ring, rope=make_rope(64))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 300], ids=["decode", "chunk"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
def test_results_do_not_depend_on_threads(tokens, batch, dtype):
    shape = {"batch": batch, "heads": 8, "kv_heads": 4, "head_dim": 64, "dtype": dtype}
    history, new = make_qkv(900, **shape), make_qkv(tokens, **shape)
    results = []
    for threads in (1, 2, 3):
        ring = RingKVCache(batch, 4, 64, 4, 700, dtype=dtype)
        step(ring, *history, threads)
        out = step(ring, *new, threads)
        results.append((out, ring.keys, ring.values))
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (5, 1)], ids=str)
def test_tokens_of_a_call_are_those_of_calls_of_one(heads, kv_heads, dtype):
    """Some of the tokens see all keys of a block, and some do not: at both ends of the window, anywhere in the ring.

    Bit for bit, but on AMX, which takes over from five queries on.
    """
    layout, rope = (3, 130, 8), make_rope(24)
    most = 31 // (heads // kv_heads)  # with more queries per KV head a call is a chunk
    calls = [min(call, most) for call in [4, 9, 2, *[3, 7, 5, 8, 6] * 12]]
    q, k, v = make_qkv(sum(calls), heads=heads, kv_heads=kv_heads, head_dim=24, value_dim=40, dtype=dtype)
    rings = [RingKVCache(*k.shape[:2], k.shape[3], *layout, value_dim=v.shape[3], dtype=dtype) for _ in range(2)]
    together = run(sink_attention, rings[0], q, k, v, calls, rope=rope, sink_logits=torch.zeros(heads))
    one_by_one = run(sink_attention, rings[1], q, k, v, [1] * sum(calls), rope=rope, sink_logits=torch.zeros(heads))
    if dtype == torch.bfloat16 and heads // kv_heads <= 4 and ops.cpu_capability() == "amx":
        assert_close(together, one_by_one, atol=1e-4, rtol=2**-7)  # two roundings of the output
        assert (together == one_by_one).float().mean() > 0.98
    else:
        assert torch.equal(together, one_by_one)
    assert all(torch.equal(getattr(rings[0], name), getattr(rings[1], name)) for name in ("keys", "values"))


def test_every_output_is_written():
    """Fresh memory is filled with NaN by torch itself here."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "the filling is on"
        ring = RingKVCache(2, 2, 16, 2, 40)
        for tokens, lengths in ((1, [1, 0]), (50, [50, 7]), (33, [0, 0]), (1, [0, 1])):
            q, k, v = make_qkv(tokens)
            assert sink_attention(q, k, v, ring, lengths=torch.tensor(lengths)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [1, 40], ids=["decode", "chunk"])
def test_a_call_allocates_its_output_alone(tokens):
    ring = RingKVCache(2, 2, 64, 4, 300)
    q, k, v = make_qkv(tokens, head_dim=64)
    tables = make_rope(64).stream_tables(ring.seen, tokens, num_sinks=4, window=300)

    def attend():
        return ops.sink_attention_(
            ring.keys, ring.values, q, k, v, ring.seen, *tables, num_sinks=4, window=300, scale=1
        )

    out = attend()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(3):
            out = attend()
    allocated = [event.self_cpu_memory_usage for event in profile.events()]
    assert [size for size in allocated if size > 0] == [out.nbytes] * 3


def test_the_output_joins_heads_without_a_copy():
    q, k, v = make_qkv(5)
    out = sink_attention(q, k, v, RingKVCache(2, 2, 16, 2, 4))
    assert out.transpose(1, 2).is_contiguous()


RUN_IF_AVAILABLE = """
import sys, pytest
from sinkattn import ops
capability, *arguments = sys.argv[1:]
sys.exit(pytest.main(arguments) if ops.cpu_capability() == capability else "not on this processor")
"""


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs within itself")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability):
    """Tests of both ways again, with a lesser instruction set than the processor's best."""
    if ops.cpu_capability() == capability:
        pytest.skip("the processor's best, which all other tests run")
    command = [sys.executable, "-c", RUN_IF_AVAILABLE, capability, "-q", "-p", "no:cacheprovider"]
    command += ["-k", "head_sizes or options", __file__, str(Path(__file__).with_name("test_cpu_eight_bit.py"))]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.stderr.endswith("not on this processor\n"):
        pytest.skip("not on this processor")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
