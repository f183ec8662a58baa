"""The specification: its two forms agree, and where plain causal attention applies, so does torch's."""

import pytest
import torch
from factories import make_qkv, make_rope, max_error, randn, run
from torch.nn.functional import scaled_dot_product_attention

from sinkattn import RingKVCache, Rope
from sinkattn.reference import sink_attention, sink_attention_, slot_of, streaming_attention, visible
from sinkattn.rope import rotate

FP64 = {"dtype": torch.float64}
TOKENS = 41
CALLS = {"one-call": [41], "singles": [1] * 41, "mixed": [3, 1, 17, 0, 2, 11, 7]}


def run_ring(query, key, value, calls, layout, **options):
    batch, kv_heads, _, head_dim = key.shape
    ring = RingKVCache(batch, kv_heads, head_dim, *layout, value_dim=value.shape[-1], **FP64)
    return run(sink_attention, ring, query, key, value, calls, **options)


def oracle(query, key, value, layout, **options):
    return streaming_attention(query, key, value, num_sinks=layout[0], window=layout[1], **options)


@pytest.mark.parametrize(
    ("token", "expected"),
    [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 3, 4, 5]), (99, [0, 1, 97, 98, 99])],
)
def test_visible_by_hand(token, expected):
    assert visible(token, num_sinks=2, window=3) == expected


@pytest.mark.parametrize(("token", "slot"), [(0, 0), (1, 1), (2, 2), (4, 4), (5, 2), (7, 4), (8, 2)])
def test_slot_by_hand(token, slot):
    assert slot_of(token, num_sinks=2, ring=3) == slot


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("layout", [(0, 1, 0), (0, 5, 2), (1, 1, 0), (2, 3, 2), (3, 7, 0), (4, 28, 5)], ids=str)
def test_ring_equals_gathering(layout, calls):
    q, k, v = make_qkv(TOKENS, value_dim=6, **FP64)
    rope = make_rope()
    error = max_error(run_ring(q, k, v, calls, layout, rope=rope), oracle(q, k, v, layout, rope=rope))
    assert error < 1e-12


VARIANTS = {
    "half": {"rope": make_rope(16)},
    "interleaved": {"rope": make_rope(16, "interleaved")},
    "half-partial": {"rope": make_rope(6)},
    "interleaved-partial": {"rope": make_rope(6, "interleaved")},
    "scaled": {"rope": Rope(make_rope(16).inv_freq, scaling=1.3)},
    "no-rope": {},
    "softcap": {"rope": make_rope(), "softcap": 0.7},
    "alibi": {"alibi_slopes": 2.0 ** -torch.arange(1, 5)},
    "sink-logits": {"rope": make_rope(), "sink_logits": torch.tensor([1.0, -1.0, 0.0, 3.0])},
    "all": {
        "rope": make_rope(),
        "scale": 0.4,
        "softcap": 2.0,
        "alibi_slopes": 2.0 ** -torch.arange(1, 5),
        "sink_logits": torch.tensor([1.0, -1.0, 0.0, 3.0]),
    },
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_agree(options):
    q, k, v = make_qkv(TOKENS, **FP64)
    out = run_ring(q, k, v, CALLS["mixed"], (2, 7, 1), **options)
    assert max_error(out, oracle(q, k, v, (2, 7, 1), **options)) < 1e-12


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_head_groups_agree(heads, kv_heads):
    q, k, v = make_qkv(TOKENS, heads=heads, kv_heads=kv_heads, **FP64)
    out = run_ring(q, k, v, CALLS["mixed"], (2, 7, 1), rope=make_rope())
    assert max_error(out, oracle(q, k, v, (2, 7, 1), rope=make_rope())) < 1e-12


def test_ragged_calls_equal_streams_of_their_own():
    q, k, v = make_qkv(TOKENS, batch=3, **FP64)
    calls = [[3, 0, 9], [1, 1, 1], [0, 20, 5], 2, [7, 4, 0]]
    totals = torch.tensor([13, 27, 17])
    out = run_ring(q, k, v, calls, (2, 7, 1), rope=make_rope())
    together = oracle(q, k, v, (2, 7, 1), rope=make_rope(), lengths=totals)
    assert max_error(out, together) < 1e-12
    for row, total in enumerate(totals.tolist()):
        part = (slice(row, row + 1), slice(None), slice(total))
        alone = oracle(q[part], k[part], v[part], (2, 7, 1), rope=make_rope())
        assert torch.equal(together[part], alone)
        assert not together[row, :, total:].any()


@pytest.mark.parametrize("layout", [(4, 37, 0), (0, 41, 0), (40, 1, 0)], ids=str)
def test_causal_attention_until_something_is_evicted(layout):
    q, k, v = make_qkv(TOKENS, **FP64)
    rope = make_rope()
    tables = rope.tables(torch.arange(TOKENS), torch.float64)
    rotated = [rotate(x, *tables, interleaved=False) for x in (q, k)]
    torchs = scaled_dot_product_attention(*rotated, v, is_causal=True, enable_gqa=True)
    assert max_error(oracle(q, k, v, layout, rope=rope), torchs) < 1e-12
    assert max_error(run_ring(q, k, v, [TOKENS], layout, rope=rope), torchs) < 1e-12


def test_without_sinks_it_is_a_sliding_window():
    q, k, v = make_qkv(TOKENS, **FP64)
    rope, window = make_rope(), 6
    tables = rope.tables(torch.arange(TOKENS), torch.float64)
    rotated = [rotate(x, *tables, interleaved=False) for x in (q, k)]
    age = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    mask = (age >= 0) & (age < window)
    torchs = scaled_dot_product_attention(*rotated, v, attn_mask=mask, enable_gqa=True)
    assert max_error(oracle(q, k, v, (0, window), rope=rope), torchs) < 1e-12


@pytest.mark.parametrize("form", ["gathering", "ring"])
def test_only_visible_tokens_have_an_effect(form):
    layout, tokens = (2, 4, 1), 16

    def outputs(k, v):
        if form == "ring":
            return run_ring(q, k, v, [5, 1, 10], layout, rope=make_rope())
        return oracle(q, k, v, layout, rope=make_rope())

    q, k, v = make_qkv(tokens, **FP64)
    before = outputs(k, v)
    for changed in range(tokens):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, :, changed] += 1
        other_v[:, :, changed] = torch.nan
        after = outputs(other_k, other_v)
        for token in range(tokens):
            same = torch.equal(before[:, :, token], after[:, :, token])
            assert same == (changed not in visible(token, *layout[:2])), (token, changed)


def test_one_rotation_of_the_query_is_not_enough():
    layout, tokens = (4, 8, 0), 60
    q, k, v = make_qkv(tokens, **FP64)
    ring = RingKVCache(2, 2, 16, *layout, **FP64)
    geometry = {"num_sinks": layout[0], "window": layout[1]}
    cos, sin = make_rope().stream_tables(ring.seen, tokens, dtype=torch.float64, **geometry)
    errors = []
    for once in (False, True):
        if once:
            cos[1], sin[1] = cos[0], sin[0]
        out = sink_attention_(ring.keys, ring.values, q, k, v, ring.seen, cos, sin, scale=0.25, **geometry)
        errors.append(max_error(out, oracle(q, k, v, layout, rope=make_rope(), scale=0.25)))
    assert errors[0] < 1e-12
    assert errors[1] > 1e-2


def test_counters_advance_by_what_each_row_brought():
    ring = RingKVCache(2, 2, 16, 2, 4, **FP64)
    q, k, v = make_qkv(3, **FP64)
    sink_attention(q, k, v, ring)
    sink_attention(q, k, v, ring, lengths=torch.tensor([1, 0]))
    assert ring.seen.tolist() == [4, 3]


def test_softcap_and_sink_logits_by_hand():
    q, k, v = (torch.tensor(x, **FP64).view(1, 1, -1, 1) for x in ([0.0, 2.0], [1.0, 3.0], [10.0, 20.0]))
    out = oracle(q, k, v, (0, 2), scale=1.0, softcap=4.0, sink_logits=torch.tensor([0.5]))
    logits = 4 * torch.tanh(torch.tensor([2.0, 6.0], **FP64) / 4)
    weights = torch.cat((logits, torch.tensor([0.5], **FP64))).softmax(0)
    assert out[0, 0, 1, 0].item() == pytest.approx((weights[:2] @ torch.tensor([10.0, 20.0], **FP64)).item(), abs=1e-14)


def test_alibi_counts_cache_relative_distance():
    q, k, v = torch.zeros(1, 1, 9, 1, **FP64), torch.zeros(1, 1, 9, 1, **FP64), randn(1, 1, 9, 1, **FP64)
    out = oracle(q, k, v, (1, 2), alibi_slopes=torch.tensor([0.5]))
    weights = torch.tensor([-1.0, -0.5, 0.0], **FP64).softmax(0)
    for token in range(3, 9):
        expected = weights @ v[0, 0, [0, token - 1, token], 0]
        assert out[0, 0, token, 0].item() == pytest.approx(expected.item(), abs=1e-14)
