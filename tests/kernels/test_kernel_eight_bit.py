"""The Triton kernels over rings of 8 bits: what they write, bit for bit, and outputs against the fp64 specification."""

import copy
from typing import NamedTuple

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, strided

pytest.importorskip("triton")

import triton
import triton.language as tl

from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.kernels import attention
from sinkattn.kernels.primitives import quantise

# Rows of a tile that hold no query divide zero by zero, and nobody reads them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
lacks_fp8 = DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9)
needs_fp8 = pytest.mark.skipif(lacks_fp8, reason="needs compute capability 8.9")
CACHE_DTYPES = ["int8", pytest.param("fp8", marks=needs_fp8)]
TOKENS = {"one": 1, "few": 3, "chunk": 33}


class Stream(NamedTuple):
    """The row of the ring of a row of a call, the tokens that it has seen, its sinks, and where its window begins."""

    row: int
    seen: int
    sinks: int = 4
    begin: int = 0


# The ring not yet full, before and after the last sink; where it wraps; and with options of each row's own.
STREAMS = [Stream(2, 2), Stream(0, 90), Stream(1, 163), Stream(4, 10**6, 1, 10**6 - 7), Stream(5, 3, 2, 3)]
LAYOUT = 4, 150, 9  # the interpreter splits such a window over programs


def ring_of(streams, layout, dtype, cache_dtype, **sizes):
    """A ring that is random where a query may see it, and NaN elsewhere."""
    sizes = {"kv_heads": 1, "head_dim": 16} | sizes
    ring = RingKVCache(8, **sizes, layout=ops.RingLayout(*layout), dtype=dtype, cache_dtype=cache_dtype)
    ring.seen[[stream.row for stream in streams]] = torch.tensor([stream.seen for stream in streams])
    sinks = [ring.eight_bit[name].fill_(torch.nan) for name in ("sink_keys", "sink_values")]
    for x, name in ((ring.keys, "key_scales"), (ring.values, "value_scales")):
        vectors = torch.randn(x.shape).to(dtype)
        q, scales = reference.quantise(reference.hadamard(vectors) if x is ring.keys else vectors, x.dtype)
        x.copy_(q)
        ring.eight_bit[name].fill_(torch.nan)
        for row, seen, num_sinks, begin in streams:
            window = range(max(num_sinks, begin, seen - layout[1] + 1), seen)
            slots = [reference.slot_of(token, num_sinks, ring.layout.ring, 0) for token in window]
            ring.eight_bit[name][row][:, slots] = scales[row][:, slots]
    for row, seen, num_sinks, _ in streams:
        for x in sinks:
            x[row][:, : min(seen, num_sinks)].normal_()
    tensors = {name: x.to(DEVICE) for name, x in ring.tensors.items()}
    ring.replace(tensors, ring.seen.to(DEVICE), ring.peak.to(DEVICE))
    return ring


def of_rows(streams):
    """The options of a call that say what its rows are."""
    rows, _, sinks, begins = (torch.tensor(x, device=DEVICE) for x in zip(*streams, strict=True))
    return {"rows": rows, "row_sinks": sinks, "begins": begins}


def assert_same(ring, expected):
    """Everything that the rings hold is the same, bit for bit."""
    for name, x in expected.tensors.items():
        torch.testing.assert_close(ring.tensors[name].float(), x.float(), atol=0, rtol=0, equal_nan=True, msg=name)
    assert torch.equal(ring.seen, expected.seen)
    assert not ring.arrivals.any()


def check(tokens, dtype, cache_dtype, *, layout=LAYOUT, spread=1.0, sizes=None, **options):
    """One call of the kernel within the budget, and what it leaves in the ring."""
    sizes = {"kv_heads": 1, "head_dim": 16} | (sizes or {})
    streams = [stream._replace(sinks=min(stream.sinks, layout[0])) for stream in STREAMS]
    ring = ring_of(streams, layout, dtype, cache_dtype, **sizes)
    for name in ("sink_values", "value_scales"):
        ring.eight_bit[name] *= spread
    query, key, value = (x.to(DEVICE) for x in make_qkv(tokens, batch=len(streams), dtype=dtype, **sizes))
    value *= spread
    options |= {"rope": make_rope(sizes["head_dim"] // 2 * 2), **of_rows(streams)}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    exact = copy.deepcopy(ring)
    out = sink_attention(query, key, value, ring, backend="triton", **options)
    oracle = oracle_of(dtype, reference.sink_attention, query.double(), key, value, exact, **options)
    assert_within_budget(out, oracle)
    assert_same(ring, exact)


@triton.jit
def quantise_block(x, q, scales, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    block, block_scales = quantise(tl.load(x + at), q.dtype.element_ty)
    tl.store(q + at, block)
    tl.store(scales + row, block_scales)


@pytest.mark.parametrize("dim", [64, 16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_rounding_has_the_bits_of_the_reference(cache_dtype, dtype, dim):
    """Ties, subnormal numbers, zeros, vectors of any size, and NaN and infinities."""
    stored = ops.EIGHT_BIT_DTYPES[cache_dtype]
    limit, largest = reference.LIMITS[stored], torch.finfo(dtype).max
    x = torch.randn(16, 64, dtype=torch.float64)
    x[0] = torch.linspace(-limit, limit, 64)
    x[1] = (torch.arange(64) - 31.5).where(torch.arange(64) > 0, limit)  # halves
    x[2] = (2.0 ** torch.arange(-13, 3))[:, None].mul(torch.tensor([1, 1.0625, 1.1875, -1.5])).flatten()
    x[2, 0] = limit
    x[3:7] *= torch.tensor([[1e-40], [1e-30], [1e30], [largest / 5]])
    x[7], x[8, :60] = 0, 0
    x[9, 3], x[10, 5], x[11, dim - 1] = torch.nan, torch.inf, -torch.inf
    x = x.clamp(-largest, largest).where(x.isfinite(), x).to(dtype)[:, :dim].contiguous().to(DEVICE)
    expected, expected_scales = reference.quantise(x, stored)
    q, scales = torch.empty_like(expected), torch.empty_like(expected_scales)
    quantise_block[(1,)](x, q, scales, 16, dim)
    assert torch.equal(q.view(torch.uint8) & 0x7F, expected.view(torch.uint8) & 0x7F)
    assert torch.equal(q.float(), expected.float())
    assert torch.equal(scales.view(torch.int32), expected_scales.view(torch.int32))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(FP32, "int8"), (BF16, "int8"), *(pytest.param(dtype, "fp8", marks=needs_fp8) for dtype in (FP16, BF16))],
    ids=str,
)
def test_within_budget(dtype, cache_dtype, tokens):
    check(tokens, dtype, cache_dtype)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_all_options(tokens):
    lengths = torch.tensor([tokens, 0, tokens // 2 + 1, 1, tokens])
    scores = {"softcap": 2.0, "sink_logits": torch.linspace(-2, 2, 4), "alibi_slopes": 2.0 ** -torch.arange(1.0, 5)}
    check(tokens, FP32, "int8", layout=(4, 70, 0), lengths=lengths, **scores)


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(7, 3), (80, 48)], ids=str)
def test_head_sizes(head_dim, value_dim, tokens):
    sizes = {"head_dim": head_dim, "value_dim": value_dim}
    check(tokens, FP16, "int8", layout=(0 if head_dim == 7 else 4, 70, 0), sizes=sizes)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("spread", [1e-3, 1e4], ids=str)
def test_small_and_large_values_in_fp16(spread, tokens):
    """A weight times the scale of a small value is below the range of fp16."""
    check(tokens, FP16, "int8", layout=(4, 40, 0), spread=spread)


def test_keys_split_over_programs(monkeypatch):
    target, launch, splits = attention.get_target(torch.device(DEVICE)), attention.chunk_launch, []
    monkeypatch.setattr(attention, "get_target", lambda device: target._replace(num_sms=256))
    monkeypatch.setattr("sinkattn.ops.attention._shapes", {})
    monkeypatch.setattr(attention, "SPLIT_CHUNKS", True)
    monkeypatch.setattr(attention, "chunk_launch", lambda *x: splits.append(launch(*x).grid[1]) or launch(*x))
    check(17, FP32, "int8")
    assert splits[0] > 1


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_stream_of_calls(cache_dtype):
    """Chunks, a few tokens and single ones in turn, over several wraps: the ring and outputs of the specification."""
    query, key, value = (x.to(DEVICE) for x in make_qkv(111, batch=1, kv_heads=1, dtype=BF16))
    layout = {"kv_heads": 1, "head_dim": 16, "num_sinks": 3, "window": 21, "headroom": 4}
    ring = RingKVCache(1, **layout, dtype=BF16, cache_dtype=cache_dtype, device=DEVICE)
    exact, done, outs = copy.deepcopy(ring), 0, []
    for tokens in (1, 1, 30, 1, 4, 1, 1, 60, 9, 1, 2):
        new = [strided(x[:, :, done : done + tokens]) for x in (query, key, value)]
        outs.append(sink_attention(*new, ring, rope=make_rope(), backend="triton"))
        done += tokens
    oracle = oracle_of(BF16, reference.sink_attention, query.double(), key, value, exact, rope=make_rope())
    assert_within_budget(torch.cat(outs, dim=2), oracle)
    assert_same(ring, exact)
    whole = copy.deepcopy(exact)
    whole.reset()
    streams = (x.double() for x in (query, key, value))
    unrounded = oracle_of(BF16, reference.streaming_attention, *streams, num_sinks=3, window=21, rope=make_rope())
    with pytest.raises(AssertionError, match="times those to expect"):
        assert_within_budget(torch.cat(outs, dim=2), unrounded)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_a_vector_that_is_not_finite(junk, tokens):
    """Queries that see it are NaN; it is nothing to those of a later call, once it is out of sight."""
    ring = RingKVCache(2, 1, 16, 1, 4, cache_dtype="int8", device=DEVICE)
    for _ in range(3):
        sink_attention(*(x.to(DEVICE) for x in make_qkv(1, kv_heads=1)), ring, backend="triton")
    query, key, value = (x.to(DEVICE) for x in make_qkv(tokens, kv_heads=1))
    value[0, :, 0, 3] = junk
    out = sink_attention(query, key, value, ring, backend="triton")
    assert out[0, :, 0].isnan().all()
    assert out[1].isfinite().all()
    assert ring.eight_bit["value_scales"].isnan().sum() == (tokens < 20)
    for _ in range(4):
        out = sink_attention(*(x.to(DEVICE) for x in make_qkv(1, kv_heads=1)), ring, backend="triton")
    assert out.isfinite().all()


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch):
    ring = RingKVCache(2, 2, 16, cache_dtype="fp8", device=DEVICE)
    monkeypatch.setattr("sinkattn.ops.attention._shapes", {})
    monkeypatch.setattr("sinkattn.ops.checks.lacks_fp8", lambda device: True)
    with pytest.raises(TypeError, match=r"keys: expected torch.int8 on .*, got torch.float8_e4m3fn"):
        sink_attention(*(x.to(DEVICE) for x in make_qkv(1)), ring, backend="triton")
    assert not ring.seen.any()
    assert not any(x.float().any() for x in ring.tensors.values())
