"""Calls for some rows of a ring, with sinks and a first window token of each row's own: against the fp64 oracle."""

import random

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error

from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.reference import streaming_attention

ROWS, TOKENS = 5, 60
SINKS = [3, 0, 5, 1, 4]
LAYOUT = (5, 9, 2)
OPTIONS = ("rows", "row_sinks", "begins")


def random_calls(seed, most):
    """Calls of up to ``most`` tokens until a row is at its end: rows, new tokens and first window token of each."""
    rng = random.Random(seed)
    done, begins = [0] * ROWS, [0] * ROWS
    while True:
        rows = rng.sample(range(ROWS), rng.randint(1, ROWS))
        counts = [rng.randint(0, most) for _ in rows]
        if any(done[row] + count > TOKENS for row, count in zip(rows, counts, strict=True)):
            return
        for row in rows:
            if rng.random() < 0.3:
                begins[row] = rng.randint(begins[row], done[row])
        yield rows, counts, [begins[row] for row in rows]
        for row, count in zip(rows, counts, strict=True):
            done[row] += count


def feed(ring, qkv, calls, *, leave_out=(), **options):
    """Outputs of all tokens, and for the oracle the tokens of each row and the first window token of each query."""
    out = torch.zeros_like(qkv[0])
    done, begins = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    for rows, counts, first in calls:
        index = done[rows, None] + torch.arange(max(counts))
        new = (x[torch.tensor(rows)[:, None], :, index % TOKENS].transpose(1, 2) for x in qkv)
        given = {"rows": rows, "row_sinks": [SINKS[row] for row in rows], "begins": first}
        given = {name: torch.tensor(x) for name, x in given.items() if name not in leave_out}
        others = [row for row in range(ROWS) if row not in rows]
        before = [x[others].clone() for x in (ring.keys, ring.values, ring.seen)]
        part = sink_attention(*new, ring, lengths=torch.tensor(counts), **given, **options)
        for old, x in zip(before, (ring.keys, ring.values, ring.seen), strict=True):
            torch.testing.assert_close(x[others], old, rtol=0, atol=0, equal_nan=True)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            now = slice(int(done[row]), int(done[row]) + count)
            out[row, :, now], begins[row, now] = part[i, :, :count], first[i]
            assert not part[i, :, count:].any()
            done[row] += count
    assert torch.equal(ring.seen, done)
    return out, {"lengths": done, "begins": begins}


def make_ring(dtype, layout=LAYOUT, rows=ROWS):
    """What was never written is NaN."""
    ring = RingKVCache(rows, 2, 16, *layout, dtype=dtype)
    ring.keys.fill_(torch.nan)
    ring.values.fill_(torch.nan)
    return ring


CALLS = {"decode": 1, "few": 3, "chunk": 17}
SCORES = {
    "rope": {"rope": make_rope()},
    "all": {
        "rope": make_rope(6, "interleaved"),
        "softcap": 2.0,
        "alibi_slopes": 2.0 ** -torch.arange(1, 5),
        "sink_logits": torch.linspace(-2, 2, 4),
    },
}
GEOMETRY = {"num_sinks": LAYOUT[0], "window": LAYOUT[1], "row_sinks": torch.tensor(SINKS)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("most", CALLS.values(), ids=CALLS)
def test_rows_equal_gathering(most, options, backend):
    for seed in range(3):
        qkv, ring = make_qkv(TOKENS, batch=ROWS, dtype=torch.float64), make_ring(torch.float64)
        out, streams = feed(ring, qkv, random_calls(seed, most), backend=backend, **options)
        assert max_error(out, streaming_attention(*qkv, **GEOMETRY, **streams, **options)) < 1e-12
        for row, sinks in enumerate(SINKS):
            assert ring.keys[row, :, sinks : LAYOUT[0]].isnan().all(), "slots that are not used stay as they are"
            assert ring.values[row, :, sinks : LAYOUT[0]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("most", CALLS.values(), ids=CALLS)
def test_rows_within_budget(most, dtype):
    qkv = make_qkv(TOKENS, batch=ROWS, dtype=dtype)
    out, streams = feed(make_ring(dtype), qkv, random_calls(4, most), rope=make_rope())
    options = {**GEOMETRY, **streams, "rope": make_rope()}
    assert_within_budget(out, oracle_of(dtype, streaming_attention, *(x.double() for x in qkv), **options))


@pytest.mark.parametrize("left_out", OPTIONS)
def test_every_option_has_an_effect(left_out):
    qkv = make_qkv(TOKENS, batch=ROWS, dtype=torch.float64)
    calls = [([(row + call) % ROWS for row in range(ROWS)], [9] * ROWS, [7 * call] * ROWS) for call in range(5)]
    errors = []
    for names in ((), (left_out,)):
        out, streams = feed(make_ring(torch.float64), qkv, calls, leave_out=names, rope=make_rope())
        errors.append(max_error(out, streaming_attention(*qkv, **GEOMETRY, **streams, rope=make_rope())))
    assert errors[0] < 1e-12
    assert errors[1] > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sinks", [0, 2, 6])
def test_a_row_with_fewer_sinks_is_a_ring_with_fewer(sinks, dtype):
    """Bit for bit, also where the unused slots are more than a KV split of 512 has room for."""
    window, headroom, calls = 505, 3, [600, 1, 4, 1, 30, 1, 1]
    qkv = make_qkv(sum(calls), batch=1, dtype=dtype)
    alone, ring = (make_ring(dtype, (size, window, headroom), rows) for size, rows in ((sinks, 1), (9, 3)))
    for new in zip(*(x.split(calls, dim=2) for x in qkv), strict=True):
        options = {"rows": torch.tensor([1]), "row_sinks": torch.tensor([sinks])}
        out = sink_attention(*new, ring, rope=make_rope(), **options)
        assert torch.equal(out, sink_attention(*new, alone, rope=make_rope()))
    for x, expected in ((ring.keys, alone.keys), (ring.values, alone.values)):
        assert torch.equal(torch.cat((x[1, :, :sinks], x[1, :, 9:]), dim=1), expected[0])


def test_eviction_by_begins_is_a_stream_without_those_tokens():
    """Without positions: the same sinks, and the tokens from the first one on."""
    q, k, v = make_qkv(20, batch=1)
    ring, shorter = (RingKVCache(1, 2, 16, 2, 30) for _ in range(2))
    sink_attention(q[:, :, :16], k[:, :, :16], v[:, :, :16], ring)
    kept = [0, 1, *range(11, 16)]
    sink_attention(q[:, :, kept], k[:, :, kept], v[:, :, kept], shorter)
    new = [x[:, :, 16:] for x in (q, k, v)]
    out = sink_attention(*new, ring, begins=torch.tensor([11]))
    torch.testing.assert_close(out, sink_attention(*new, shorter))


@pytest.mark.parametrize("name", OPTIONS)
def test_recorded_calls_are_refused(name):
    ring, (q, k, v) = make_ring(torch.float32, rows=2), make_qkv(3)
    before = ring.keys.clone()
    numbers = torch.tensor([1, 0]) if name == "rows" else torch.zeros(2, dtype=torch.int64)
    for x in (q, k, v):
        new = [y.clone().requires_grad_(y is x) for y in (q, k, v)]
        with pytest.raises(RuntimeError, match=f"{name}: expected None in a call that autograd records"):
            sink_attention(*new, ring, **{name: numbers})
        assert ring.seen.tolist() == [0, 0]
        torch.testing.assert_close(ring.keys, before, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        assert sink_attention(*new, ring, **{name: numbers}).isfinite().all()
    assert ring.seen.tolist() == [3, 3]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 3], r"rows: expected 0 to 2, got 3 in row 1"),
        ([-1, 0], r"rows: expected 0 to 2, got -1 in row 0"),
        ([1, 1], r"rows: expected different rows, got \[1, 1\]"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows, message, backend):
    ring, new = make_ring(torch.float32, rows=3), make_qkv(3)
    before = ring.keys.clone()
    with pytest.raises(RuntimeError, match=message):
        sink_attention(*new, ring, rope=make_rope(), rows=torch.tensor(rows), backend=backend)
    assert ring.seen.tolist() == [0, 0, 0]
    torch.testing.assert_close(ring.keys, before, rtol=0, atol=0, equal_nan=True)


def test_append_to_rows():
    _, key, value = make_qkv(30, batch=2)
    keys, values = torch.randn(2, 4, 2, 16, 16).unbind()
    seen, rows, sinks = torch.tensor([1, 50]), torch.tensor([3, 0]), torch.tensor([3, 1])
    for lengths in (None, torch.tensor([2, 30])):
        expected = keys.clone(), values.clone()
        for i, (row, start) in enumerate(zip(rows.tolist(), seen.tolist(), strict=True)):
            for token in range(30 if lengths is None else int(lengths[i])):
                slot = reference.slot_of(start + token, int(sinks[i]), 11, 5)
                expected[0][row, :, slot], expected[1][row, :, slot] = key[i, :, token], value[i, :, token]
        ops.append_(keys, values, key, value, seen, num_sinks=5, lengths=lengths, rows=rows, row_sinks=sinks)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])
