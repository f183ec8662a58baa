"""Rings of 8 bits: rounding, and the specification over them, against exact arithmetic and full-precision attention."""

from fractions import Fraction

import pytest
import torch
from factories import make_qkv, make_rope, max_error, randn, run

from sinkattn import RingKVCache, reference, sink_attention
from sinkattn.reference import hadamard, quantise, streaming_attention
from sinkattn.rope import rotate

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
CODES = torch.arange(256, dtype=torch.uint8)


def nearest(x: float, dtype: torch.dtype) -> float:
    """The number of a dtype of 8 bits that is nearest to x; of two as near, the one whose last bit is 0."""
    numbers = CODES.view(dtype).float().tolist()
    candidates = [(abs(Fraction(y) - Fraction(x)), code % 2, y) for code, y in enumerate(numbers) if y == y]
    return min(candidates)[2]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantise_rounds_to_the_nearest_number(dtype):
    limit = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    grid = torch.cat((torch.linspace(-limit, limit, 500), torch.arange(-16, 17) / 2, torch.tensor([limit])))
    x = torch.stack((grid, grid * 0.37, torch.randn(len(grid)) * 1e-20, torch.randn(len(grid)) * 1e30))
    q, scale = quantise(x, dtype)
    assert q.dtype == dtype
    assert scale.dtype == torch.float32
    assert scale.shape == (4, 1)
    largest = x.abs().amax(dim=1)
    # Division in fp64, rounded again to fp32, is exact division in fp32: fp64 has more than twice the bits.
    assert torch.equal(scale[:, 0], (largest.double() / limit).float())
    for row, row_scale, got in zip(x, scale.tolist(), q.float().tolist(), strict=True):
        scaled = (row.double() / row_scale[0]).float().tolist()
        assert got == [nearest(number, dtype) for number in scaled]
    assert q.float().abs().max() == limit
    assert max_error(q.float() * scale, x.double()) <= largest.max() * (0.51 / 127 if dtype == torch.int8 else 1 / 16)


@pytest.mark.parametrize("dim", [7, 8, 32])
def test_short_vectors_get_the_best_of_several_scales(dim):
    x = torch.randn(2000, dim)
    first = x.abs().amax(dim=1, keepdim=True) / 127
    errors = [
        ((x / s).round() * s - x).square().sum(dim=1) for s in (first.double() * (1 + k / 128) for k in range(16))
    ]
    q, scale = quantise(x, torch.int8)
    assert torch.equal(q, (x / scale).round())
    assert ((scale / first - 1) * 128).round().unique().tolist() == list(range(16))
    error = (q.double() * scale - x).square().sum(dim=1).mean()
    assert error < torch.stack(errors).amin(dim=0).mean() * 1.01
    assert error < errors[0].mean() * (0.65 if dim < 32 else 0.85)


def test_the_largest_element_of_float16_stays_finite():
    x = torch.randn(500, 8) * 1000
    x[:, 3] = torch.finfo(torch.float16).max
    q, scale = quantise(x, torch.int8)
    assert (q * scale).half().isfinite().all()
    x /= 2
    q, scale = quantise(x, torch.int8)
    assert (q * scale).amax() > x.amax()  # as it may, where there is room


def test_other_vectors_have_one_scale():
    x = torch.randn(10, 33)
    largest = x.abs().amax(dim=1, keepdim=True)
    assert torch.equal(quantise(x, torch.int8)[1], largest / 127)
    assert torch.equal(quantise(x[:, :8], torch.float8_e4m3fn)[1], x[:, :8].abs().amax(dim=1, keepdim=True) / 448)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantise_of_zero_tiny_and_nonfinite_vectors(dtype):
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [torch.inf, 1.0], [1.0, -torch.inf], [torch.nan, 1.0]])
    q, scale = quantise(x, dtype)
    assert not q[2:].float().any()
    assert not q[0].float().any()
    assert scale[2:].isnan().all()
    smallest = 2.0**-100 / {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
    torch.testing.assert_close(scale[:2], torch.full((2, 1), smallest), rtol=1e-7, atol=0)


def sylvester(dim: int) -> torch.Tensor:
    """The Hadamard matrix of a power of two, by Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


@pytest.mark.parametrize(("dim", "block"), [(8, 8), (64, 64), (80, 16), (96, 32), (7, 1)])
def test_hadamard_is_the_matrix_product_in_blocks(dim, block):
    matrix = torch.block_diag(*[sylvester(block)] * (dim // block))
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ matrix, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard(hadamard(x)) / block, x, rtol=0, atol=1e-13)
    half = x.to(torch.bfloat16)
    assert torch.equal(hadamard(half), hadamard(half.float()))
    assert hadamard(half).dtype == torch.float32


def rounded(x: torch.Tensor, dtype: torch.dtype, num_sinks: int, *, are_keys: bool) -> torch.Tensor:
    """What queries see of keys or values ``[batch, heads, tokens, dim]``, in fp64: sinks as they are."""
    q, scale = quantise(hadamard(x) if are_keys else x, dtype)
    seen = q.double() * scale
    if are_keys:
        seen = seen @ sylvester(x.shape[-1]) / x.shape[-1]
    return torch.cat((x[:, :, :num_sinks].double(), seen[:, :, num_sinks:]), dim=2)


def test_hadamard_keeps_an_outlier_from_spoiling_the_other_elements():
    x = torch.randn(1000, 64)
    x[:, 5] *= 30
    others = torch.arange(64) != 5
    errors = []
    for transformed in (False, True):
        q, scale = quantise(hadamard(x) if transformed else x, torch.int8)
        seen = hadamard(q * scale) / 64 if transformed else q * scale
        errors.append((seen - x)[:, others].square().mean().sqrt())
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_sees_rounded_tokens_and_whole_sinks(cache_dtype, dtype):
    query, key, value = make_qkv(50, dtype=dtype)
    ring = RingKVCache(2, 2, 16, 3, 9, 4, dtype=dtype, cache_dtype=cache_dtype)
    assert ring.dtype == dtype
    assert ring.cache_dtype == cache_dtype
    assert ring.keys.shape[2] == 13
    seen = run(reference.sink_attention, ring, query.double(), key, value, [1, 5, 20, 4, 20])
    k, v = (rounded(x, DTYPES[cache_dtype], 3, are_keys=x is key) for x in (key, value))
    expected = streaming_attention(query.double(), k, v, num_sinks=3, window=9)
    assert max_error(seen, expected) < 1e-12
    whole = streaming_attention(query.double(), key.double(), value.double(), num_sinks=3, window=9)
    assert max_error(seen, whole) > 1e-4  # rounding shows
    for got, x in zip(ring.linearise(), (k, v), strict=True):
        in_sight = torch.cat((x[:, :, :3], x[:, :, -9:]), dim=2)
        torch.testing.assert_close(
            got, in_sight.to(dtype), **({"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {})
        )


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_keys_are_rounded_after_the_rotation(cache_dtype):
    rope = make_rope()
    query, key, value = make_qkv(40)
    ring = RingKVCache(2, 2, 16, 0, 9, 0, dtype=torch.float32, cache_dtype=cache_dtype)
    seen = run(reference.sink_attention, ring, query.double(), key, value, [1, 39], rope=rope)
    tables = [rope.tables(torch.arange(40), dtype) for dtype in (torch.float32, torch.float64)]
    k = rounded(rotate(key, *tables[0], interleaved=False), DTYPES[cache_dtype], 0, are_keys=True)
    q = rotate(query.double(), *tables[1], interleaved=False)
    v = rounded(value, DTYPES[cache_dtype], 0, are_keys=False)
    expected = streaming_attention(q, k, v, num_sinks=0, window=9)
    assert max_error(seen, expected) < 1e-12


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_rows_of_a_ring_are_rolled_back_reordered_and_reset(cache_dtype):
    query, key, value = make_qkv(40)
    options = {"backend": "reference"}

    def fed(order, *calls):
        ring = RingKVCache(2, 2, 16, 3, 9, 4, dtype=torch.float32, cache_dtype=cache_dtype)
        out = run(sink_attention, ring, *(x[order] for x in (query, key, value)), calls, **options)
        return ring, out

    ring, _ = fed([0, 1], 20)
    sink_attention(*(randn(*x[:, :, :4].shape) for x in (query, key, value)), ring, **options)
    ring.rollback(4)
    ring.reorder(torch.tensor([1, 0]))
    out = sink_attention(*(x[[1, 0], :, 20:24] for x in (query, key, value)), ring, **options)
    expected, whole = fed([1, 0], 24)
    assert torch.equal(out, whole[:, :, 20:24])
    for name, x in expected.tensors.items():
        assert torch.equal(ring.tensors[name].float(), x.float()), name
    ring.take_rows(torch.tensor([0, 0, 1]))
    assert ring.nbytes == expected.nbytes * 3 // 2
    ring.reset(torch.tensor([0]))
    assert ring.seen.tolist() == [0, 24, 24]
    for name, x in ring.tensors.items():
        assert not x[0].float().any(), name
        assert torch.equal(x[1:].float(), expected.tensors[name].float()), name


def test_memory_is_that_of_the_parts():
    ring = RingKVCache(3, 2, 64, 4, 1020, value_dim=32, dtype=torch.bfloat16, cache_dtype="int8")
    assert ring.nbytes == 3 * 2 * (1020 * (64 + 32 + 2 * 4) + 4 * (64 + 32) * 2)
    assert ring.nbytes < 0.55 * RingKVCache(3, 2, 64, 4, 1020, value_dim=32, dtype=torch.bfloat16).nbytes
    assert "cache_dtype='int8'" in repr(ring)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_dtype": "int4"}, r"cache_dtype: expected one of \('int8', 'fp8'\), or None, got 'int4'"),
        ({"cache_dtype": torch.int8}, "cache_dtype: expected one of"),
        ({"cache_dtype": "int8", "dtype": torch.float64}, "dtype: expected float32, float16 or bfloat16"),
    ],
)
def test_bad_dtypes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RingKVCache(1, 1, 8, **options)


def test_calls_that_autograd_records_are_refused():
    ring = RingKVCache(1, 1, 8, 2, 4, dtype=torch.float32, cache_dtype="int8")
    query = torch.randn(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected a ring of full precision in a call that autograd records"):
        sink_attention(query, *torch.randn(2, 1, 1, 1, 8), ring, backend="reference")
    assert ring.seen.item() == 0
