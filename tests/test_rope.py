"""Rotary tables against exact angle reduction, and the rotation against complex numbers."""

import math
from fractions import Fraction

import pytest
import torch
from factories import make_rope, randn

from sinkattn import Rope
from sinkattn.rope import rotate, table_dtype

EPS = torch.finfo(torch.float32).eps
TURN = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def exact_tables(rope: Rope, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rational products, reduced by whole turns before anything is rounded."""
    angles = [[float(position * Fraction(f) % TURN) for f in rope.inv_freq.tolist()] for position in positions]
    cos, sin = ([[f(angle) for angle in row] for row in angles] for f in (math.cos, math.sin))
    return torch.tensor(cos, dtype=torch.float64), torch.tensor(sin, dtype=torch.float64)


def table_error(cos, sin, exact):
    return max((got.double() - want).abs().max().item() for got, want in zip((cos, sin), exact, strict=True))


@pytest.mark.parametrize("position", [10**2, 10**6, 10**9])
def test_tables_are_exact_at_any_position(position):
    rope = make_rope(128)
    positions = list(range(position - 8, position + 8))
    cos, sin = rope.tables(torch.tensor(positions))
    assert cos.dtype == sin.dtype == torch.float32
    assert table_error(cos, sin, exact_tables(rope, positions)) <= 2 * EPS


def test_fp32_angles_would_not_be():
    rope = make_rope(128)
    angles = torch.arange(10**6 - 8, 10**6 + 8).float()[:, None] * rope.inv_freq.float()
    exact = exact_tables(rope, list(range(10**6 - 8, 10**6 + 8)))
    assert table_error(angles.cos(), angles.sin(), exact) > 1e-3


def test_scaling_multiplies_both_tables():
    plain = make_rope(8)
    scaled = Rope(plain.inv_freq, scaling=1.25)
    positions = torch.arange(5)
    for got, want in zip(scaled.tables(positions, torch.float64), plain.tables(positions, torch.float64), strict=True):
        assert torch.equal(got, want * 1.25)


def test_stream_tables_hold_both_rotations():
    rope = make_rope(8)
    seen = torch.tensor([0, 5, 10**9])
    cos, sin = rope.stream_tables(seen, 4, num_sinks=2, window=5, dtype=torch.float64)
    stream = [[0, 1, 2, 3], [5, 6, 7, 8], [10**9, 10**9 + 1, 10**9 + 2, 10**9 + 3]]
    cache = [[0, 1, 2, 3], [5, 6, 6, 6], [6, 6, 6, 6]]
    expected = rope.tables(torch.tensor([stream, cache]), torch.float64)
    assert cos.shape == (2, 3, 4, 4)
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])


@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ({"row_sinks": [4, 0, 1]}, [[0, 1, 2, 3], [4, 4, 4, 4], [5, 5, 5, 5]]),
        ({"begins": [0, 4, 10**9 - 2]}, [[0, 1, 2, 3], [3, 4, 5, 6], [4, 5, 6, 6]]),
        ({"row_sinks": [4, 0, 1], "begins": [0, 4, 10**9 - 2]}, [[0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5, 5]]),
    ],
    ids=["row_sinks", "begins", "both"],
)
def test_stream_tables_of_rows_of_their_own(options, cache):
    rope, seen = make_rope(8), torch.tensor([0, 5, 10**9])
    options = {name: torch.tensor(x) for name, x in options.items()}
    tables = rope.stream_tables(seen, 4, num_sinks=2, window=5, dtype=torch.float64, **options)
    stream = seen[:, None] + torch.arange(4)
    for got, expected in zip(
        tables, rope.tables(torch.stack((stream, torch.tensor(cache))), torch.float64), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [12, 8, 2], ids=["full", "partial", "one-pair"])
def test_rotation_is_a_complex_product(interleaved, rotary_dim):
    x = randn(2, 3, 7, 12, dtype=torch.float64)
    angles = randn(7, rotary_dim // 2, dtype=torch.float64)
    out = rotate(x, angles.cos(), angles.sin(), interleaved=interleaved)
    for pair in range(rotary_dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(7).double(), angles[:, pair])
        torch.testing.assert_close(torch.complex(out[..., a], out[..., b]), turned, rtol=0, atol=1e-14)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotation_rounds_once(dtype):
    x = randn(5, 8, dtype=dtype)
    cos, sin = make_rope(8).tables(torch.arange(5))
    assert table_dtype(dtype) == torch.float32
    once = rotate(x.float(), cos, sin, interleaved=False).to(dtype)
    assert torch.equal(rotate(x, cos, sin, interleaved=False), once)


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=["default", "yarn"],
)
def test_from_module_equals_transformers(rope_parameters):
    llama = pytest.importorskip("transformers.models.llama")
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=rope_parameters
    )
    module = llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert (module.attention_scaling != 1) == (rope_parameters["rope_type"] == "yarn")
    positions = torch.arange(16)[None]
    theirs = module(torch.zeros(1, dtype=torch.float32), positions)
    ours = Rope.from_module(module).tables(positions)
    for got, want in zip(ours, theirs, strict=True):
        # Their angles are rounded to fp32: at positions below 16 that is 8 eps at most.
        torch.testing.assert_close(torch.cat((got, got), dim=-1), want, rtol=0, atol=16 * EPS)


def test_from_module_takes_the_live_frequencies():
    module = torch.nn.Module()
    module.inv_freq = torch.tensor([1.0, 0.5])
    module.attention_scaling = 2.0
    rope = Rope.from_module(module, style="interleaved")
    module.inv_freq = torch.tensor([3.0, 4.0, 5.0])
    assert (rope.scaling, rope.style, rope.interleaved, rope.rotary_dim) == (2.0, "interleaved", True, 4)
    assert Rope.from_module(module).inv_freq.tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inv_freq": torch.ones(2, 2)}, r"inv_freq: expected a float tensor \[pairs\], got torch.float32 \[2, 2\]"),
        ({"inv_freq": torch.ones(2, dtype=torch.int64)}, r"inv_freq: .*got torch.int64 \[2\]"),
        ({"inv_freq": torch.ones(0)}, r"inv_freq: .*got torch.float32 \[0\]"),
        ({"inv_freq": torch.ones(2), "style": "neox"}, r"style: expected one of .*, got 'neox'"),
        ({"inv_freq": torch.ones(2), "rotary_dim": 8}, r"rotary_dim: expected twice .* \(4\), got 8"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rope(**arguments)


def test_module_without_frequencies_is_refused():
    with pytest.raises(ValueError, match="module: expected a rotary module with an inv_freq tensor, got Linear"):
        Rope.from_module(torch.nn.Linear(1, 1))


def test_ropes_that_rotate_alike_are_equal():
    inv_freq = torch.tensor([1.0, 0.1])
    rope = Rope(inv_freq)
    assert rope == Rope(inv_freq.double())
    assert len({rope, Rope(inv_freq.clone())}) == 1
    others = [Rope(-inv_freq), Rope(inv_freq[:1]), Rope(inv_freq, 2.0), Rope(inv_freq, style="interleaved")]
    assert len({rope, *others}) == 5
    assert rope != "rope"


def test_frequencies_are_copied_once_per_device():
    rope, meta = Rope(torch.tensor([1.0, 0.1])), torch.device("meta")
    assert rope._inv_freq_on(meta) is rope._inv_freq_on(meta)
    assert rope._inv_freq_on(torch.device("cpu")) is rope.inv_freq


def test_frequencies_are_copied_in_a_compiled_function():
    """A `Rope` on the CPU is used with a ring on another device; its first copy may be made while Dynamo traces."""
    rope, seen = Rope(torch.tensor([1.0, 0.1])), torch.zeros(2, dtype=torch.int64, device="meta")
    compiled = torch.compile(rope.stream_tables, fullgraph=True, backend="eager")
    cos, _ = compiled(seen, 1, num_sinks=2, window=5)
    assert cos.shape == (2, 2, 1, 2)
