"""The cache against a plain list of tokens, and attention over it however a stream is cut into calls."""

import hypothesis.strategies as st
import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, run
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sinkattn import RingKVCache, Rope, sink_attention
from sinkattn.reference import slot_of, streaming_attention
from sinkattn.rope import rotate

BATCH, KV_HEADS, HEAD_DIM = 3, 2, 4
LAYOUTS = [(0, 1, 0), (0, 3, 0), (0, 4, 2), (1, 1, 0), (1, 1, 3), (2, 5, 0), (2, 4, 3), (4, 2, 1)]
COUNTS = st.lists(st.integers(0, 17), min_size=BATCH, max_size=BATCH)


class RingAgainstLists(RuleBasedStateMachine):
    """Every row of the model is the list of all its (rotated key, value), and the most it ever held."""

    @initialize(layout=st.sampled_from(LAYOUTS), style=st.sampled_from([None, "half", "interleaved"]))
    def start(self, layout, style):
        self.num_sinks, self.window, self.headroom = layout
        self.rope = style and make_rope(HEAD_DIM, style)
        self.ring = RingKVCache(BATCH, KV_HEADS, HEAD_DIM, *layout)
        self.rows = [[] for _ in range(BATCH)]
        self.peaks = [0] * BATCH

    def append(self, counts, width, lengths):
        _, key, value = make_qkv(width, batch=BATCH, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
        self.ring.append(key, value, rope=self.rope, lengths=lengths)
        for row, count in enumerate(counts):
            rotated = key[row]
            if self.rope is not None:
                positions = len(self.rows[row]) + torch.arange(width)
                rotated = rotate(rotated, *self.rope.tables(positions), interleaved=self.rope.interleaved)
            self.rows[row] += [(rotated[:, i], value[row, :, i]) for i in range(count)]
            self.peaks[row] = max(self.peaks[row], len(self.rows[row]))

    @rule(count=st.integers(0, 17))
    def append_evenly(self, count):
        self.append([count] * BATCH, count, None)

    @rule(counts=COUNTS, padding=st.integers(0, 3))
    def append_raggedly(self, counts, padding):
        self.append(counts, max(counts) + padding, torch.tensor(counts))

    @rule(counts=st.lists(st.integers(0, 4), min_size=BATCH, max_size=BATCH))
    def roll_back(self, counts):
        allowed = all(
            count == 0 or (count <= len(tokens) and peak - (len(tokens) - count) <= self.headroom)
            for count, tokens, peak in zip(counts, self.rows, self.peaks, strict=True)
        )
        if allowed:
            self.ring.rollback(torch.tensor(counts))
            for tokens, count in zip(self.rows, counts, strict=True):
                del tokens[len(tokens) - count :]
        else:
            with pytest.raises(RuntimeError, match="rollback: "):
                self.ring.rollback(torch.tensor(counts))

    @precondition(lambda self: self.headroom and all(self.rows))
    @rule()
    def roll_back_one_everywhere(self):
        self.roll_back([1] * BATCH)

    @rule(source=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, source):
        self.ring.reorder(torch.tensor(source))
        self.rows = [list(self.rows[row]) for row in source]
        self.peaks = [self.peaks[row] for row in source]

    @rule(rows=st.lists(st.integers(0, BATCH - 1), max_size=2))
    def reset(self, rows):
        self.ring.reset(torch.tensor(rows, dtype=torch.int64))
        for row in rows:
            self.rows[row], self.peaks[row] = [], 0
            assert not self.ring.keys[row].any()
            assert not self.ring.values[row].any()

    @invariant()
    def counters_agree(self):
        assert self.ring.seen.tolist() == [len(tokens) for tokens in self.rows]

    @invariant()
    def slots_hold_what_is_not_overwritten(self):
        ring = self.window + self.headroom
        for row, (tokens, peak) in enumerate(zip(self.rows, self.peaks, strict=True)):
            for token, (key, value) in enumerate(tokens):
                if token < self.num_sinks or token >= peak - ring:
                    slot = slot_of(token, self.num_sinks, ring)
                    assert torch.equal(self.ring.keys[row, :, slot], key)
                    assert torch.equal(self.ring.values[row, :, slot], value)

    @invariant()
    def linearise_is_sinks_and_window_in_order(self):
        cache = self.ring.linearise()
        for row, tokens in enumerate(self.rows):
            kept = tokens[: self.num_sinks] + tokens[max(self.num_sinks, len(tokens) - self.window) :]
            for part, linear in enumerate(cache):
                expected = torch.zeros(KV_HEADS, self.num_sinks + self.window, HEAD_DIM)
                for i, pair in enumerate(kept):
                    expected[:, i] = pair[part]
                assert torch.equal(linear[row], expected)


RingAgainstLists.TestCase.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, derandomize=True, database=None
)
TestRingAgainstLists = RingAgainstLists.TestCase


def make_ring(*layout, batch=2, dtype=torch.float32, **options):
    return RingKVCache(batch, 2, 16, *layout, dtype=dtype, **options)


# However a stream is cut into calls


@pytest.mark.parametrize("headroom", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_do_not_matter(dtype, headroom):
    tokens, layout = 300, (4, 28, headroom)
    q, k, v = make_qkv(tokens, batch=1, dtype=dtype)
    options = {"num_sinks": 4, "window": 28, "rope": make_rope()}
    oracle = oracle_of(dtype, streaming_attention, *(x.double() for x in (q, k, v)), **options)
    expected = make_ring(*layout, batch=1, dtype=dtype)
    expected.append(k, v, rope=make_rope())
    for calls in ([tokens], [1] * tokens, [7] * 42 + [6], [64] * 4 + [44], [13, 1, 90, 2, 29, 10, 0, 28, 127]):
        ring = make_ring(*layout, batch=1, dtype=dtype)
        out = run(sink_attention, ring, q, k, v, calls, rope=make_rope())
        assert_within_budget(out, oracle)
        assert torch.equal(ring.keys, expected.keys)
        assert torch.equal(ring.values, expected.values)


def test_rollback_and_replay_equals_never_having_rolled_back():
    q, k, v = make_qkv(60)
    straight, winding = make_ring(2, 6, 4), make_ring(2, 6, 4)
    expected = run(sink_attention, straight, q, k, v, [5] * 12, rope=make_rope())
    replayed = []
    for start in range(0, 60, 5):
        part = slice(start, start + 5)
        wrong = make_qkv(4)
        sink_attention(*wrong, winding, rope=make_rope())
        winding.rollback(torch.tensor([4, 4]))
        replayed.append(sink_attention(q[:, :, part], k[:, :, part], v[:, :, part], winding, rope=make_rope()))
        sink_attention(*make_qkv(4), winding, rope=make_rope())
        winding.rollback(3)
        winding.rollback(torch.tensor([1, 1]))
    assert torch.equal(torch.cat(replayed, dim=2), expected)
    assert all(torch.equal(*pair) for pair in zip(winding.linearise(), straight.linearise(), strict=True))


def test_rolled_back_tokens_may_have_held_anything():
    q, k, v = make_qkv(12)
    straight, winding = make_ring(2, 6, 2), make_ring(2, 6, 2)
    run(sink_attention, straight, q[:, :, :9], k[:, :, :9], v[:, :, :9], [9])
    run(sink_attention, winding, q[:, :, :9], k[:, :, :9], v[:, :, :9], [9])
    sink_attention(*(torch.full_like(x[:, :, :2], torch.nan) for x in (q, k, v)), winding)
    winding.rollback(2)
    last = [x[:, :, 9:10] for x in (q, k, v)]
    torch.testing.assert_close(sink_attention(*last, winding), sink_attention(*last, straight))


def test_reordered_beams_equal_replays():
    q, k, v = make_qkv(30, batch=4)
    ring = make_ring(2, 6, batch=4)
    first, last = ([x[:, :, part] for x in (q, k, v)] for part in (slice(20), slice(20, 30)))
    sink_attention(*first, ring, rope=make_rope(), lengths=torch.tensor([20, 3, 9, 14]))
    source = torch.tensor([2, 0, 0, 3])
    ring.reorder(source)
    out = sink_attention(*last, ring, rope=make_rope())

    replay = make_ring(2, 6, batch=4)
    lengths = torch.tensor([9, 20, 20, 14])
    sink_attention(*(x[source] for x in first), replay, rope=make_rope(), lengths=lengths)
    assert torch.equal(sink_attention(*last, replay, rope=make_rope()), out)
    assert torch.equal(ring.seen, replay.seen)


@pytest.mark.parametrize("rows", [torch.tensor([1]), None], ids=["one-row", "all-rows"])
def test_reset_row_equals_a_fresh_row(rows):
    ring, fresh = make_ring(2, 6, 1), make_ring(2, 6, 1)
    poisoned = [x.clone() for x in make_qkv(20)]
    for x in poisoned:
        x[slice(None) if rows is None else rows] = torch.nan
    sink_attention(*poisoned, ring, rope=make_rope())
    ring.reset(rows)
    q, k, v = make_qkv(13)
    out = run(sink_attention, ring, q, k, v, [4, 1, 1, 7], rope=make_rope())
    expected = run(sink_attention, fresh, q, k, v, [4, 1, 1, 7], rope=make_rope())
    for row in [0, 1] if rows is None else rows.tolist():
        assert torch.equal(out[row], expected[row])
        assert ring.seen[row] == 13


# However far the stream has come


def error_at(position: int, tokens: int = 24) -> float:
    """RMS error against the fp64 oracle on tokens that come after ``position``."""
    torch.manual_seed(0)
    num_sinks, window = 4, 28
    q, k, v = make_qkv(num_sinks + window + tokens, head_dim=64)
    rope = make_rope(64)
    ring = RingKVCache(2, 2, 64, num_sinks, window)
    ring.append(k[:, :, :num_sinks], v[:, :, :num_sinks], rope=rope)
    ring.seen.fill_(position - window)
    recent = slice(num_sinks, num_sinks + window)
    ring.append(k[:, :, recent], v[:, :, recent], rope=rope)
    decoded = slice(num_sinks + window, None)
    out = run(sink_attention, ring, *(x[:, :, decoded] for x in (q, k, v)), [1] * 10 + [tokens - 10], rope=rope)
    assert ring.seen.tolist() == [position + tokens] * 2
    oracle = streaming_attention(*(x.double() for x in (q, k, v)), num_sinks=num_sinks, window=window, rope=rope)
    return (out.double() - oracle[:, :, decoded]).square().mean().sqrt().item()


@pytest.mark.parametrize("position", [10**6, 10**9])
def test_error_does_not_grow_with_the_stream(position):
    assert error_at(position) <= 2 * error_at(10**2)


def test_error_would_grow_with_fp32_angles(monkeypatch):
    exact = error_at(10**2)

    def fp32_tables(self, positions, dtype=torch.float32):
        angles = positions.float().unsqueeze(-1) * self.inv_freq.float()
        return angles.cos().to(dtype), angles.sin().to(dtype)

    monkeypatch.setattr(Rope, "tables", fp32_tables)
    assert error_at(10**6) > 100 * exact


# The object itself


def test_layers_share_counters():
    first = make_ring(2, 6, 1)
    second = make_ring(2, 6, 1, share_seen_with=first)
    assert second.seen is first.seen
    rope = make_rope()
    alone = [make_ring(2, 6, 1), make_ring(2, 6, 1)]
    for tokens in (3, 1, 9):
        # The owner comes last: it advances the counters of both.
        layers = [make_qkv(tokens), make_qkv(tokens)]
        outs = [sink_attention(*x, ring, rope=rope) for x, ring in zip(layers, (second, first), strict=True)]
        expected = [sink_attention(*x, ring, rope=rope) for x, ring in zip(layers, alone, strict=True)]
        assert all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))
    first.rollback(1)
    second.rollback(1)
    assert second.seen.tolist() == [12, 12]
    second.reset()
    assert not second.keys.any()
    assert first.seen.tolist() == [12, 12]


def test_shared_reorder_moves_rows_and_leaves_counters():
    owner = make_ring(2, 6)
    layer = make_ring(2, 6, share_seen_with=owner)
    _, k, v = make_qkv(5)
    layer.append(k, v)
    owner.append(k, v, lengths=torch.tensor([5, 2]))
    before = layer.keys.clone()
    layer.reorder(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, before[[1, 1]])
    assert layer.seen.tolist() == [5, 2]


@pytest.mark.parametrize("other", [{"batch": 3}, {"batch": 1}], ids=["more-rows", "fewer-rows"])
def test_counters_of_another_batch_are_refused(other):
    with pytest.raises(ValueError, match="share_seen_with: "):
        make_ring(2, 6, share_seen_with=make_ring(2, 6, **other))


def test_memory_is_constant():
    ring = RingKVCache(2, 3, 8, 4, 28, 5, value_dim=6, dtype=torch.bfloat16)
    expected = 2 * 3 * (4 + 28 + 5) * (8 + 6) * 2
    pointers = ring.keys.data_ptr(), ring.values.data_ptr(), ring.seen.data_ptr()
    for tokens in (1, 100, 3):
        sink_attention(*make_qkv(tokens, kv_heads=3, heads=3, head_dim=8, value_dim=6, dtype=torch.bfloat16), ring)
        assert ring.nbytes == expected
    assert (ring.keys.data_ptr(), ring.values.data_ptr(), ring.seen.data_ptr()) == pointers


def test_stream_goes_on_outside_inference_mode():
    q, k, v = make_qkv(8)
    with torch.inference_mode():
        ring = make_ring(2, 4, 1)
        sink_attention(q, k, v, ring)
    sink_attention(q, k, v, ring)
    ring.rollback(1)
    ring.reset()
    assert ring.seen.tolist() == [0, 0]


def test_defaults():
    ring = RingKVCache(1, 2, 8)
    assert (ring.layout.num_sinks, ring.layout.window, ring.layout.headroom) == (4, 1020, 0)
    assert ring.keys.shape == ring.values.shape == (1, 2, 1024, 8)
    assert ring.keys.dtype == torch.get_default_dtype()
    assert repr(ring) == (
        "RingKVCache(batch_size=1, kv_heads=2, head_dim=8, num_sinks=4, window=1020, headroom=0, "
        "dtype=torch.float32, device=cpu)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"batch_size: expected 1 or more, got 0"),
        ({"kv_heads": -1}, r"kv_heads: expected 1 or more, got -1"),
        ({"head_dim": 0}, r"head_dim: expected 1 or more, got 0"),
        ({"value_dim": 0}, r"value_dim: expected 1 or more, got 0"),
        ({"num_sinks": -1}, r"num_sinks: expected 0 or more .*, got -1"),
        ({"window": 0}, r"window: expected 1 or more .*, got 0"),
        ({"headroom": -1}, r"headroom: expected 0 or more .*, got -1"),
        ({"dtype": torch.int8}, r"dtype: expected one of .*, got torch.int8"),
    ],
)
def test_bad_constructions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RingKVCache(**{"batch_size": 1, "kv_heads": 1, "head_dim": 2} | arguments)


BAD_CALLS = {
    "query": (lambda q, k, v: {"query": q[0]}, ValueError, r"query: expected \[batch, heads, tokens, head_dim\]"),
    "key": (lambda q, k, v: {"key": k[0]}, ValueError, r"key: expected \[batch, kv_heads, tokens, head_dim\]"),
    "value": (lambda q, k, v: {"value": v.double()}, TypeError, r"value: expected dtype torch.float32"),
    "rope": (lambda q, k, v: {"rope": make_rope(18)}, ValueError, r"cos: expected at most 8 pairs"),
    "too-many": (lambda q, k, v: {"lengths": torch.tensor([0, 99])}, RuntimeError, r"lengths: .*got 99 in row 1"),
    "negative": (lambda q, k, v: {"lengths": torch.tensor([-1, 1])}, RuntimeError, r"lengths: .*got -1 in row 0"),
}


@pytest.mark.parametrize("tokens", [1, 3, 12], ids=["decode", "within-headroom", "long-chunk"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_refused_calls_change_nothing(tokens, backend, case):
    spoil, error, message = BAD_CALLS[case]
    ring = make_ring(2, 6, 3)
    ring.append(*make_qkv(7)[1:])
    before = ring.keys.clone(), ring.values.clone(), ring.seen.clone()
    q, k, v = make_qkv(tokens)
    arguments = {"query": q, "key": k, "value": v, "rope": make_rope(), "backend": backend} | spoil(q, k, v)
    with pytest.raises(error, match=message):
        sink_attention(ring=ring, **arguments)
    for got, want in zip((ring.keys, ring.values, ring.seen), before, strict=True):
        assert torch.equal(got, want)


BAD_MOVES = {
    "append-heads": (lambda ring: ring.append(*make_qkv(3, kv_heads=1)[1:]), ValueError, r"key: expected shape"),
    "append-rows": (lambda ring: ring.append(*make_qkv(3, batch=1)[1:]), ValueError, r"key: expected shape"),
    "append-2d": (lambda ring: ring.append(torch.ones(2, 16), torch.ones(2, 16)), ValueError, r"key: expected \[batch"),
    "append-lengths": (
        lambda ring: ring.append(*make_qkv(3)[1:], lengths=torch.tensor([4, 0])),
        RuntimeError,
        r"lengths: expected 0 to 3, got 4 in row 0",
    ),
    "rollback-far": (lambda ring: ring.rollback(4), RuntimeError, r"row 0 can roll back 3 tokens more .*, got 4"),
    "rollback-rows": (lambda ring: ring.rollback(torch.tensor([1])), ValueError, r"counts: expected shape \[2\]"),
    "rollback-dtype": (lambda ring: ring.rollback(torch.ones(2)), TypeError, r"counts: expected dtype torch.int64"),
    "reorder-source": (
        lambda ring: ring.reorder(torch.tensor([0, 2])),
        RuntimeError,
        r"source: expected 0 to 1, got 2",
    ),
    "reorder-rows": (lambda ring: ring.reorder(torch.tensor([0])), ValueError, r"source: expected shape \[2\]"),
    "reset-row": (lambda ring: ring.reset(torch.tensor([2])), RuntimeError, r"rows: expected 0 to 1, got 2"),
}


@pytest.mark.parametrize("case", BAD_MOVES)
def test_refused_moves_change_nothing(case):
    call, error, message = BAD_MOVES[case]
    ring = make_ring(2, 6, 3)
    ring.append(*make_qkv(17)[1:])
    before = ring.keys.clone(), ring.values.clone(), ring.seen.clone()
    with pytest.raises(error, match=message):
        call(ring)
    for got, want in zip((ring.keys, ring.values, ring.seen), before, strict=True):
        assert torch.equal(got, want)
    ring.rollback(3)
