"""The operators: what they write, what they refuse, and attention against the fp64 oracle."""

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error, randn, run, strided

from sinkattn import RingKVCache, build_info, ops, reference, sink_attention
from sinkattn.reference import slot_of, streaming_attention
from sinkattn.rope import rotate, table_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW_PRECISION = DTYPES[:3]
NAMES = dict(zip(DTYPES, ("fp32", "bf16", "fp16", "fp64"), strict=True))


def make_cache(batch=2, kv_heads=2, slots=7, head_dim=16, value_dim=16, dtype=torch.float32):
    """Keys and values that hold something already."""
    return tuple(torch.randn(batch, kv_heads, slots, dim).to(dtype) for dim in (head_dim, value_dim))


def make_tables(rope, seen, tokens, dtype):
    """cos, sin of new tokens, with strides that are not trivial."""
    positions = seen[:, None] + torch.arange(tokens)
    return tuple(strided(table) for table in rope.tables(positions, table_dtype(dtype)))


def write(keys, values, key, value, seen, *, num_sinks, lengths=None, cos=None, sin=None, interleaved=False):
    """`ops.append_` token by token."""
    if cos is not None:
        key = rotate(key, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=interleaved)
    counts = [key.shape[2]] * len(seen) if lengths is None else lengths.tolist()
    for row, count in enumerate(counts):
        for i in range(count):
            slot = slot_of(int(seen[row]) + i, num_sinks, keys.shape[2] - num_sinks)
            keys[row, :, slot], values[row, :, slot] = key[row, :, i], value[row, :, i]


def assert_append_equals_writes(keys, values, *arguments, **options):
    expected = keys.clone(), values.clone()
    write(*expected, *arguments, **options)
    ops.append_(keys, values, *arguments, **options)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


# append_


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("rotary_dim", "style"),
    [(16, "half"), (16, "interleaved"), (6, "half"), (6, "interleaved"), (None, "half")],
    ids=["half", "interleaved", "half-partial", "interleaved-partial", "no-rope"],
)
def test_append_rotates_once_and_copies(dtype, rotary_dim, style):
    _, key, value = make_qkv(5, value_dim=6, dtype=dtype)
    seen = torch.tensor([1, 10**6])
    tables = {}
    if rotary_dim is not None:
        cos, sin = make_tables(make_rope(rotary_dim, style), seen, 5, dtype)
        tables = {"cos": cos, "sin": sin, "interleaved": style == "interleaved"}
    cache = make_cache(value_dim=6, dtype=dtype)
    assert_append_equals_writes(*cache, key, value, seen, num_sinks=2, **tables)


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last-dim-first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every-second": strided,
    "expanded-heads": lambda x: x[:, :1].expand_as(x),
    "expanded-rows": lambda x: x[:1].expand_as(x),
    "one-number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES.keys())
def test_append_takes_any_strides(view):
    _, key, value = make_qkv(5)
    seen = torch.tensor([1, 6])
    cos, sin = make_tables(make_rope(), seen, 5, torch.float32)
    assert_append_equals_writes(*make_cache(), view(key), view(value), seen, num_sinks=2, cos=cos, sin=sin)


@pytest.mark.parametrize("num_sinks", [0, 3, 6])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 40])
@pytest.mark.parametrize("start", [0, 2, 9, 10**9, 2**40], ids=str)
def test_append_wraps_anywhere(num_sinks, tokens, start):
    _, key, value = make_qkv(tokens, head_dim=4)
    seen = torch.tensor([start, start + 5])
    assert_append_equals_writes(*make_cache(head_dim=4, value_dim=4), key, value, seen, num_sinks=num_sinks)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [3, 0, 11], [11, 1, 4]], ids=str)
def test_append_ragged(lengths):
    _, key, value = make_qkv(11, batch=3)
    seen = torch.tensor([0, 4, 10**9])
    cos, sin = make_tables(make_rope(), seen, 11, torch.float32)
    options = {"num_sinks": 2, "lengths": torch.tensor(lengths), "cos": cos, "sin": sin}
    assert_append_equals_writes(*make_cache(batch=3), key, value, seen, **options)


def test_append_in_parallel():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, key, value = make_qkv(64, batch=3, kv_heads=33, head_dim=32)
        seen = torch.tensor([0, 50, 1000])
        cos, sin = make_tables(make_rope(32), seen, 64, torch.float32)
        cache = make_cache(batch=3, kv_heads=33, slots=71, head_dim=32, value_dim=32)
        assert_append_equals_writes(*cache, key, value, seen, num_sinks=4, cos=cos, sin=sin)
    finally:
        torch.set_num_threads(threads)


# Moves: reorder_, reset_, linearise, rollback_


@pytest.mark.parametrize("source", [[0, 1, 2, 3], [1, 2, 3, 0], [1, 0, 3, 2], [2, 2, 2, 2], [3, 0, 0, 1]], ids=str)
def test_reorder_gathers_rows(source):
    keys, values = make_cache(batch=4, value_dim=6)
    source = torch.tensor(source)
    expected = keys[source], values[source]
    ops.reorder_(keys, values, source)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("rows", [[], [2], [0, 3], [1, 1]], ids=str)
def test_reset_zeroes_rows_alone(rows):
    keys, values = make_cache(batch=4, value_dim=6)
    keys[2], values[2] = torch.nan, torch.inf
    expected = keys.clone(), values.clone()
    for x in expected:
        x[rows] = 0
    ops.reset_(keys, values, torch.tensor(rows, dtype=torch.int64))
    for got, want in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_linearise_orders_by_time():
    keys, values = make_cache(batch=5, slots=2 + 4 + 3, value_dim=6)
    seen = torch.tensor([0, 1, 4, 9, 10**9 + 2])
    tokens = [[], [0], [0, 1, 2, 3], [0, 1, 5, 6, 7, 8], [0, 1, *range(10**9 - 2, 10**9 + 2)]]
    for got, cache in zip(ops.linearise(keys, values, seen, num_sinks=2, window=4), (keys, values), strict=True):
        expected = cache.new_zeros(5, 2, 6, cache.shape[3])
        for row, held in enumerate(tokens):
            expected[row, :, : len(held)] = cache[row][:, [slot_of(token, 2, 7) for token in held]]
        assert torch.equal(got, expected)


def test_rollback_remembers_how_far_the_stream_got():
    seen, peak = torch.tensor([10, 20]), torch.tensor([0, 0])
    ops.rollback_(seen, peak, torch.tensor([2, 0]), headroom=3)
    assert (seen.tolist(), peak.tolist()) == ([8, 20], [10, 20])
    seen += 1
    ops.rollback_(seen, peak, torch.tensor([2, 3]), headroom=3)
    assert (seen.tolist(), peak.tolist()) == ([7, 18], [10, 21])


# opcheck and torch.compile


def op_calls():
    keys, values = make_cache()
    seen, peak = torch.tensor([3, 9]), torch.tensor([3, 10])
    _, key, value = make_qkv(3)
    cos, sin = make_rope().tables(seen[:, None] + torch.arange(3))
    lengths, rows, sinks = torch.tensor([2, 3]), torch.tensor([1, 0]), torch.tensor([2, 1])
    query, (both_cos, both_sin) = randn(2, 4, 3, 16), make_rope().stream_tables(seen, 3, num_sinks=2, window=4)
    slopes, arrivals = torch.linspace(0.1, 0.4, 4), torch.zeros(2, 2, dtype=torch.int32)
    input, weight, bias = randn(2, 1, 24), torch.rand(10, 24), torch.rand(10)
    attend = (keys, values, query, key, value, seen)
    past, none = (ops.linearise(keys, values, seen, num_sinks=2, window=4), (keys[:, :, :0], values[:, :, :0]))
    return {
        "append": ("append_", (keys, values, key, value, seen, None, None, None, 2, False, None, None)),
        "append-ragged-rotated": ("append_", (keys, values, key, value, seen, lengths, cos, sin, 2, True, rows, sinks)),
        "rollback": ("rollback_", (seen, peak, torch.tensor([1, 0]), 2)),
        "reorder": ("reorder_", (keys, values, torch.tensor([1, 0]))),
        "reset": ("reset_", (keys, values, torch.tensor([1]))),
        "linearise": ("linearise", (keys, values, seen, 2, 4)),
        "attend": ("sink_attention_", (*attend, None, None, None, 2, 3, 0.25, False, *[None] * 7)),
        "attend-ragged-rotated": (
            "sink_attention_",
            (*attend, lengths, both_cos, both_sin, 2, 5, 0.25, True, slopes, 3.0, slopes, arrivals, rows, sinks, seen),
        ),
        "gradients": (
            "sink_attention_gradients",
            (
                *past,
                query,
                key,
                value,
                query,
                query,
                seen,
                lengths,
                both_cos,
                both_sin,
                2,
                4,
                0.25,
                True,
                slopes,
                3.0,
                slopes,
            ),
        ),
        "gradients-of-a-new-stream": (
            "sink_attention_gradients",
            (*none, query, key, value, query, query, 0 * seen, *[None] * 3, 2, 4, 0.25, False, *[None] * 3),
        ),
        "linear": ("linear", (input, [weight], [], [bias])),
        "linear-int8": ("linear", (input, [(weight * 20).to(torch.int8)] * 2, [bias] * 2, [])),
    }


@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call):
    name, arguments = op_calls()[call]
    torch.library.opcheck(getattr(torch.ops.sinkattn, name).default, arguments)


def test_opcheck_covers_every_operator():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sinkattn::")}
    registered.remove("sinkattn::cpu_capability")  # touches no tensor
    assert registered == {f"sinkattn::{name}" for name, _ in op_calls().values()}


def test_compile_sees_through_attention():
    def step(keys, values, query, key, value, seen, cos, sin):
        options = {"num_sinks": 2, "window": 5, "scale": 0.25}
        return ops.sink_attention_(keys, values, query * 2, key, value, seen, cos, sin, **options) + 1

    cache, new, seen = make_cache(), make_qkv(3), torch.tensor([0, 6])
    tables = make_rope().stream_tables(seen, 3, num_sinks=2, window=5)
    expected = tuple(x.clone() for x in cache)
    out = step(*expected, *new, seen, *tables)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*cache, *new, seen, *tables), out)
    assert all(torch.equal(*pair) for pair in zip(cache, expected, strict=True))


def test_compile_sees_through_append():
    def step(keys, values, key, value, seen):
        ops.append_(keys, values, key * 2, value, seen, num_sinks=2)
        return keys.sum()

    cache, (_, key, value), seen = make_cache(), make_qkv(3), torch.tensor([0, 6])
    expected = tuple(x.clone() for x in cache)
    total = step(*expected, key, value, seen)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*cache, key, value, seen), total)
    assert torch.equal(cache[0], expected[0])
    assert torch.equal(cache[1], expected[1])


# sink_attention_

SHAPES = {
    # num_sinks, window, headroom; rotary_dim, style; shape of the heads; calls
    "decode": ((4, 12, 0), (16, "half"), {}, [1] * 40),
    "prefill-then-decode": ((2, 9, 0), (16, "interleaved"), {}, [21, *[1] * 9]),
    "within-headroom": ((1, 8, 5), (16, "half"), {"heads": 6, "kv_heads": 2}, [6, 6, 1, 4, 6, 6]),
    "long-chunks": ((3, 7, 2), (6, "half"), {"heads": 3, "kv_heads": 3}, [33, 20]),
    "ragged": ((2, 6, 1), (8, "interleaved"), {"batch": 3}, [[5, 0, 13], [1, 1, 1], [0, 17, 2], 2, [9, 1, 0]]),
    "no-sinks": ((0, 5, 0), (16, "half"), {"heads": 4, "kv_heads": 1}, [11, 1, 1, 7]),
    "window-of-one": ((1, 1, 0), (16, "half"), {}, [5, 1, 1, 5]),
    "odd-heads": ((4, 13, 3), (4, "half"), {"heads": 5, "kv_heads": 5, "head_dim": 7, "value_dim": 3}, [4, 19, 3, 1]),
}
LOGITS = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 4), "alibi_slopes": 2.0 ** -torch.arange(1.0, 5)}


def outputs(layout, rope, heads, calls, dtype, **options):
    """The cpu backend and the oracle."""
    totals = [sum(call if isinstance(call, int) else call[row] for call in calls) for row in range(heads["batch"])]
    q, k, v = make_qkv(max(totals), **heads, dtype=dtype)
    batch, kv_heads, _, head_dim = k.shape
    ring = RingKVCache(batch, kv_heads, head_dim, *layout, value_dim=v.shape[3], dtype=dtype)
    out = run(sink_attention, ring, q, k, v, calls, rope=rope, backend="cpu", **options)
    assert ring.seen.tolist() == totals
    options |= {"num_sinks": layout[0], "window": layout[1], "lengths": torch.tensor(totals), "rope": rope}
    return out, oracle_of(dtype, streaming_attention, *(x.double() for x in (q, k, v)), **options)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_within_budget(shape, dtype):
    layout, rope, heads, calls = SHAPES[shape]
    assert_within_budget(*outputs(layout, make_rope(*rope), {"batch": 2, **heads}, calls, dtype))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=NAMES.get)
@pytest.mark.parametrize("option", LOGITS)
def test_score_options_within_budget(option, dtype):
    options = {option: LOGITS[option]}
    shape = (2, 6, 1), make_rope(), {"batch": 2}, [9, 2, 1, 1, [1, 5]], dtype
    out, oracle = outputs(*shape, scale=0.7, **options)
    assert_within_budget(out, oracle)
    torch.manual_seed(0)
    _, without = outputs(*shape, scale=0.7)
    assert max_error(without.output, oracle.output) > 1e-2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("tokens", "headroom"), [(5, 6), (17, 0)], ids=["appended-first", "chunk"])
@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_padding_may_hold_anything(backend, tokens, headroom, junk):
    q, k, v = make_qkv(tokens)
    lengths = torch.tensor([tokens - 2, 1])
    results = []
    for filler in (0.0, junk):
        for x in (q, k, v):
            x[0, :, tokens - 2 :], x[1, :, 1:] = filler, filler
        ring = RingKVCache(2, 2, 16, 2, 4, headroom)
        results.append(sink_attention(q, k, v, ring, rope=make_rope(), lengths=lengths, backend=backend))
        assert ring.keys.isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("calls", "headroom"), [([1] * 24, 0), ([3] * 8, 3), ([24], 0), ([5, 12, 7], 1)], ids=["decode", "r3", "long", "r1"]
)
def test_only_visible_tokens_have_an_effect(backend, calls, headroom):
    num_sinks, window, changed = 2, 4, 9
    q, k, v = make_qkv(24)
    results = []
    for _ in range(2):
        ring = RingKVCache(2, 2, 16, num_sinks, window, headroom)
        results.append(run(sink_attention, ring, q, k, v, calls, rope=make_rope(), backend=backend))
        k[:, :, changed], v[:, :, changed] = 1000, 1000
    for token in range(24):
        same = torch.equal(results[0][:, :, token], results[1][:, :, token])
        assert same == (changed not in reference.visible(token, num_sinks, window)), token

    v[:, :, changed] = torch.nan
    ring = RingKVCache(2, 2, 16, num_sinks, window, headroom)
    out = run(sink_attention, ring, q, k, v, calls, rope=make_rope(), backend=backend)
    spoiled = torch.tensor([changed in reference.visible(token, num_sinks, window) for token in range(24)])
    torch.testing.assert_close(out[:, :, ~spoiled], results[0][:, :, ~spoiled])
    assert out[:, :, spoiled].isnan().all()


def test_no_tokens_is_no_work():
    q, k, v = make_qkv(0)
    ring = RingKVCache(2, 2, 16, 2, 4)
    assert sink_attention(q, k, v, ring, rope=make_rope()).shape == (2, 4, 0, 16)
    assert ring.seen.tolist() == [0, 0]


# Refusals: one clear exception, nothing changed


def good_call(function):
    """Arguments that a function of the boundary accepts."""
    query, key, value = make_qkv(3)
    seen = torch.tensor([3, 9])
    cos, sin = make_rope().stream_tables(seen, 3, num_sinks=2, window=5)
    cache = dict(zip(("keys", "values"), make_cache(), strict=True))
    new = {"key": key, "value": value, "seen": seen, "num_sinks": 2, "lengths": torch.tensor([2, 3])}
    return {
        "append_": cache | new | {"cos": cos[0], "sin": sin[0]},
        "sink_attention_": cache | new | {"query": query, "cos": cos, "sin": sin, "window": 5, "scale": 0.25},
        "rollback_": {"seen": seen, "peak": torch.tensor([3, 10]), "counts": torch.tensor([1, 0]), "headroom": 2},
        "reorder_": cache | {"source": torch.tensor([1, 0])},
        "reset_": cache | {"rows": torch.tensor([1])},
        "linearise": cache | {"seen": seen, "num_sinks": 2, "window": 5},
    }[function]


def assert_refused(function, name, spoil, error, message, **options):
    """One argument is spoiled, the call raises, and no tensor has changed."""
    arguments = good_call(function) | options
    getattr(ops, function)(**{name: x.clone() if torch.is_tensor(x) else x for name, x in arguments.items()})
    arguments |= {part: spoil(arguments.get(part)) for part in name.split()}
    before = {name: x.clone() for name, x in arguments.items() if torch.is_tensor(x) and not x.is_meta}
    with pytest.raises(error, match=message):
        getattr(ops, function)(**arguments)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


def tensor(*numbers):
    return lambda _: torch.tensor(numbers)


LENGTHS = [
    ("lengths", tensor(3, 4), RuntimeError, r"lengths: expected 0 to 3, got 4 in row 1"),
    ("lengths", tensor(-1, 0), RuntimeError, r"lengths: expected 0 to 3, got -1 in row 0"),
]
ROWS = [
    ("rows", tensor(0, 2), RuntimeError, r"rows: expected 0 to 1, got 2 in row 1"),
    ("rows", tensor(1, 1), RuntimeError, r"rows: expected different rows, got \[1, 1\]"),
    ("row_sinks", tensor(0, 3), RuntimeError, r"row_sinks: expected 0 to 2, got 3 in row 1"),
    ("row_sinks", tensor(-1, 0), RuntimeError, r"row_sinks: expected 0 to 2, got -1 in row 0"),
]
BEGINS = [
    ("begins", tensor(4, 0), RuntimeError, r"begins: expected 0 to the tokens seen, 3, got 4 in row 0"),
    ("begins", tensor(0, -1), RuntimeError, r"begins: expected 0 to the tokens seen, 9, got -1 in row 1"),
]
NEW_TOKENS = [
    ("key", lambda x: x[0], ValueError, r"key: expected \[batch, kv_heads, tokens, head_dim\], got \[2, 3, 16\]"),
    ("key", lambda x: x[:, :1], ValueError, r"key: expected shape \[2, 2, 3, 16\], got \[2, 1, 3, 16\]"),
    ("key", lambda x: x[..., :8], ValueError, r"key: expected shape \[2, 2, 3, 16\], got \[2, 2, 3, 8\]"),
    ("key", lambda x: x.half(), TypeError, r"key: expected dtype torch.float32, got torch.float16"),
    ("key", lambda x: x.to("meta"), TypeError, r"key: expected device cpu, got meta"),
    ("value", lambda x: x[:, :, :2], ValueError, r"value: expected shape \[2, 2, 3, 16\], got \[2, 2, 2, 16\]"),
    ("value", lambda x: x.double(), TypeError, r"value: expected dtype torch.float32, got torch.float64"),
    ("seen", lambda x: x[:1], ValueError, r"seen: expected shape \[2\], got \[1\]"),
    ("seen", lambda x: x.int(), TypeError, r"seen: expected dtype torch.int64, got torch.int32"),
    ("seen", lambda x: x - 9, RuntimeError, r"seen: expected 0 to 2\^61, got -6 in row 0"),
    ("lengths", lambda x: x[:1], ValueError, r"lengths: expected shape \[2\], got \[1\]"),
    ("lengths", lambda x: x.to("meta"), TypeError, r"lengths: expected device cpu, got meta"),
    ("lengths", lambda x: x.int(), TypeError, r"lengths: expected dtype torch.int64, got torch.int32"),
    *LENGTHS,
    *ROWS,
    ("rows", tensor(0), ValueError, r"rows: expected shape \[2\], got \[1\]"),
    ("rows", lambda _: torch.tensor([0, 1]).int(), TypeError, r"rows: expected dtype torch.int64, got torch.int32"),
    ("row_sinks", tensor(0), ValueError, r"row_sinks: expected shape \[2\], got \[1\]"),
    ("num_sinks", lambda _: 7, (ValueError, RuntimeError), r"num_sinks: expected"),
    ("keys values", lambda x: x.mT.contiguous().mT, RuntimeError, r"keys, values: expected contiguous tensors"),
    ("sin", lambda _: None, (ValueError, RuntimeError), r"cos, sin: expected both or none"),
]


@pytest.mark.parametrize("function", ["append_", "sink_attention_"])
@pytest.mark.parametrize("case", NEW_TOKENS, ids=lambda case: case[0])
def test_bad_new_tokens_are_refused(function, case):
    assert_refused(function, *case)


@pytest.mark.parametrize("name", ["key", "value"])
def test_appending_alone_has_no_gradients(name):
    assert_refused("append_", name, lambda x: x.clone().requires_grad_(), RuntimeError, "computes no gradients")


@pytest.mark.parametrize("case", [*LENGTHS, *ROWS, *BEGINS], ids=lambda case: case[0])
def test_reference_backend_refuses_bad_numbers_too(case):
    assert_refused("sink_attention_", *case, backend="reference")


ATTENTION = [
    *BEGINS,
    ("begins", tensor(0), ValueError, r"begins: expected shape \[2\], got \[1\]"),
    ("query", lambda x: x[0], ValueError, r"query: expected \[batch, heads, tokens, head_dim\], got \[4, 3, 16\]"),
    ("query", lambda x: x[:, :, :2], ValueError, r"query: expected shape \[2, 4, 3, 16\], got \[2, 4, 2, 16\]"),
    ("query", lambda x: x[:, :3], ValueError, r"query: expected heads to be a multiple of kv_heads \(2\), got 3"),
    ("query", lambda x: x[:, :0], ValueError, r"query: expected heads to be a multiple of kv_heads \(2\), got 0"),
    ("query", lambda x: x.double(), TypeError, r"query: expected dtype torch.float32, got torch.float64"),
    ("alibi_slopes", lambda _: torch.ones(4, requires_grad=True), RuntimeError, r"computes no gradients"),
    ("cos sin", lambda x: x.to("meta"), TypeError, r"cos: expected device cpu, got meta"),
    ("sink_logits", tensor(1.0, 1.0), ValueError, r"sink_logits: expected shape \[4\], got \[2\]"),
    ("alibi_slopes", lambda _: torch.ones(4, 1), ValueError, r"alibi_slopes: expected shape \[4\], got \[4, 1\]"),
    ("cos", lambda x: x[0], ValueError, r"cos: expected shape \[2, 2, 3, 8\], got \[2, 3, 8\]"),
    ("sin", lambda x: x.double(), TypeError, r"sin: expected dtype torch.float32, got torch.float64"),
    ("cos sin", lambda _: torch.ones(2, 2, 3, 9), ValueError, r"cos: expected at most 8 pairs .*, got 9"),
    ("window", lambda _: 6, (ValueError, RuntimeError), r"window: .*got 6"),
    ("window", lambda _: 0, (ValueError, RuntimeError), r"window: .*got 0"),
    ("backend", lambda _: "cuda", ValueError, r"backend: expected one of .*, got 'cuda'"),
]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case[0])
def test_bad_attention_is_refused(case):
    assert_refused("sink_attention_", *case)


MOVES = [
    ("append_", "cos sin", lambda x: x[:1], r"cos, sin: expected \[batch, tokens, pairs\]"),
    ("rollback_", "counts", tensor(3, 0), r"rollback: row 0 can roll back 2 tokens more \(headroom 2\), got 3"),
    ("rollback_", "counts", tensor(0, 2), r"rollback: row 1 can roll back 1 tokens more \(headroom 2\), got 2"),
    ("rollback_", "counts", tensor(0, -1), r"rollback: expected 0 to 9 tokens in row 1, got -1"),
    ("rollback_", "counts", tensor(4, 0), r"rollback: expected 0 to 3 tokens in row 0, got 4"),
    ("reorder_", "source", tensor(0, 2), r"source: expected 0 to 1, got 2 in row 1"),
    ("reorder_", "source", tensor(-1, 0), r"source: expected 0 to 1, got -1 in row 0"),
    ("reorder_", "source", tensor(0), r"source: expected a contiguous int64 tensor of 2 elements"),
    ("reset_", "rows", tensor(0, 2), r"rows: expected 0 to 1, got 2"),
    ("reset_", "rows", tensor(0.0), r"rows: expected a contiguous int64 tensor"),
    ("linearise", "window", lambda _: 6, r"num_sinks, window: .* num_sinks \+ window <= 7 slots, got 2 and 6"),
    ("linearise", "seen", tensor(1), r"seen: expected a contiguous int64 tensor of 2 elements"),
]


@pytest.mark.parametrize("case", MOVES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_bad_moves_are_refused(case):
    function, name, spoil, message = case
    assert_refused(function, name, spoil, RuntimeError, message)


def test_parameters_are_welcome_where_no_gradient_is_asked_for():
    arguments = good_call("sink_attention_")
    arguments["query"] = arguments["query"].clone().requires_grad_()
    with torch.no_grad():
        assert not ops.sink_attention_(**arguments).requires_grad


# Backends


def test_backend_is_chosen_by_device():
    assert ops.select_backend(torch.device("cpu")) == "cpu"
    assert ops.select_backend(torch.device("cpu"), "reference") == "reference"
    with pytest.raises(RuntimeError, match="backend: 'cpu' runs on CPU tensors, got tensors on meta"):
        ops.select_backend(torch.device("meta"), "cpu")
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'gpu'"):
        ops.select_backend(torch.device("cpu"), "gpu")


def test_environment_overrides_the_backend(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "sink_attention_", lambda *args, **kwargs: called.append(args))
    monkeypatch.setenv("SINKATTN_BACKEND", "reference")
    ops.sink_attention_(**good_call("sink_attention_"), backend="cpu")
    assert len(called) == 1
    monkeypatch.setenv("SINKATTN_BACKEND", "cpu")
    ops.sink_attention_(**good_call("sink_attention_"), backend="reference")
    assert len(called) == 1
    monkeypatch.setenv("SINKATTN_BACKEND", "quick")
    with pytest.raises(ValueError, match=r"SINKATTN_BACKEND: expected one of .*, got 'quick'"):
        ops.sink_attention_(**good_call("sink_attention_"))


def test_build_info_names_what_was_built():
    info = build_info()
    assert info["cuda"] is (info["cuda_toolkit"] is not None)
    assert info["torch_abi_target"] == "2.10"
    assert info["compiler"]
    assert info["torch_built_with"]


def test_fresh_memory_is_poisoned():
    package = {"__name__": "sinkattn.ops", "torch": torch}
    assert eval("torch.empty(3).isnan().all()", package)
    assert eval("torch.zeros(3).new_empty(3).isnan().all()", package)
    assert eval("torch.empty_like(torch.zeros(3)).isnan().all()", package)
    assert eval("torch.empty(3, dtype=torch.int64).dtype", package) == torch.int64
    assert not randn(3).isnan().any()


def test_fp16_scores_do_not_overflow():
    x = torch.full((1, 1, 3, 128), 30.0, dtype=torch.float16)
    for backend in ("cpu", "reference"):
        ring = RingKVCache(1, 1, 128, num_sinks=1, window=4, dtype=torch.float16)
        assert torch.equal(sink_attention(x, x, x, ring, backend=backend), x)


def test_token_counts_have_a_bound():
    ring = RingKVCache(1, 1, 2, num_sinks=1, window=4)
    one = torch.ones(1, 1, 9, 2)
    ring.seen.fill_(2**63 - 4)
    with pytest.raises(RuntimeError, match=r"seen: expected 0 to 2\^61, got 9223372036854775804 in row 0"):
        ring.append(one, one)
    ring.seen.fill_(2**60)
    ring.append(one, one)
    assert ring.seen.item() == 2**60 + 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
        ({"softcap": 0.0}, "softcap: expected more than 0, or None, got 0.0"),
        ({"softcap": -3.0}, "softcap: expected more than 0, or None, got -3.0"),
    ],
)
def test_bad_score_options_are_refused(options, message):
    ring, one = RingKVCache(1, 1, 2, num_sinks=1, window=4), torch.ones(1, 1, 1, 2)
    with pytest.raises(ValueError, match=message):
        sink_attention(one, one, one, ring, **options)
    assert ring.seen.item() == 0


def test_what_keeps_triton_from_running_is_said(monkeypatch):
    device = torch.device("cuda", 7)
    monkeypatch.setattr(ops.backends, "triton_obstacle", lambda device: f"{device} is too old")
    with pytest.raises(RuntimeError, match="backend: 'triton' cannot run: cuda:7 is too old"):
        ops.select_backend(device, "triton")
    with pytest.warns(RuntimeWarning, match="plain PyTorch runs on cuda:7, slowly: cuda:7 is too old"):
        assert ops.select_backend(device) == "reference"
    monkeypatch.setattr(ops.backends, "triton_obstacle", lambda device: None)
    assert ops.select_backend(device) == "triton"
    assert ops.select_backend(device, dtype=torch.float64) == "reference"


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    ops.backends.triton_obstacle.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        with pytest.raises(RuntimeError, match="it needs CUDA tensors, or TRITON_INTERPRET=1 set for CPU tensors"):
            ops.select_backend(torch.device("cpu"), "triton")
    finally:
        ops.backends.triton_obstacle.cache_clear()
    with pytest.raises(RuntimeError, match="it needs CUDA tensors, got tensors on meta"):
        ops.select_backend(torch.device("meta"), "triton")
