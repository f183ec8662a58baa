"""The Triton kernels against the fp64 specification: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error, strided

pytest.importorskip("triton")

from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.kernels import attention
from sinkattn.kernels.attention import CallShape
from sinkattn.kernels.configs import Target

# Rows of a tile that hold no query divide zero by zero, and nobody reads them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# num_sinks, window, headroom. The interpreter splits the windows of the last two over programs.
LAYOUTS = {"small": (4, 12, 0), "no-sinks": (0, 37, 3), "split": (3, 150, 0), "split-headroom": (20, 140, 9)}
TOKENS = {"one": 1, "few": 3, "chunk": 33}


def rings_at(seen, layout, heads, dtype, rope):
    """Rings of streams that have seen so many tokens each: in ``dtype``, for the kernel and for PyTorch, and in fp64.

    What was never written is NaN.
    """
    num_sinks, window, headroom = layout
    size = num_sinks + window + headroom
    history = make_qkv(size, batch=len(seen), dtype=dtype, **heads)[1:]
    rings = []
    for kind in (dtype, dtype, torch.float64):
        options = {"value_dim": history[1].shape[-1], "dtype": kind}
        ring = RingKVCache(len(seen), history[0].shape[1], history[0].shape[3], *layout, **options)
        ring.keys.fill_(torch.nan)
        ring.values.fill_(torch.nan)
        key, value = (x.to(kind) for x in history)
        total = torch.tensor(seen)
        ring.append(key, value, rope=rope, lengths=total.clamp(max=size))
        # The rest of the stream: the same tokens again, as late as they have to be.
        ring.seen.copy_((total - size).clamp(min=0).maximum(total.clamp(max=size)).minimum(total))
        rest = total - ring.seen
        if rest.any():
            ring.append(key, value, rope=rope, lengths=rest)
        assert ring.seen.tolist() == seen
        for name in ("keys", "values", "seen", "arrivals", "_peak"):
            setattr(ring, name, getattr(ring, name).to(DEVICE))
        rings.append(ring)
    return rings


def check(layout, seen, tokens, dtype, *, heads=None, rope=None, lengths=None, **options):
    """One call of the kernel within the budget, and what it writes to the ring against `ops.append_`."""
    heads = heads or {}
    ring, plain, exact = rings_at(seen, layout, heads, dtype, rope)
    new = [x.to(DEVICE) for x in make_qkv(tokens, batch=len(seen), dtype=dtype, **heads)]
    options |= {"rope": rope, "lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE)}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = sink_attention(*new, ring, backend="triton", **options)
    oracle = oracle_of(dtype, reference.sink_attention, *(x.double() for x in new), exact, **options)
    assert_within_budget(out, oracle)
    plain.append(*new[1:], rope=rope, lengths=options["lengths"])
    assert ring.seen.tolist() == plain.seen.tolist()
    torch.testing.assert_close(ring.keys, plain.keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(ring.values, plain.values, atol=0, rtol=0, equal_nan=True)
    assert not ring.arrivals.any()
    return out, oracle.output


def boundaries(layout):
    """Tokens seen before, at every place where something changes, and far out."""
    num_sinks, window, headroom = layout
    full = num_sinks + window
    places = [0, num_sinks - 1, num_sinks, full - 1, full, full + headroom, full + window // 2, 10**6, 10**9, 2**40]
    return [place for place in dict.fromkeys(places) if place >= 0]


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_boundaries_within_budget(layout, tokens):
    """Every boundary is a row of one ragged batch."""
    check(layout, boundaries(layout), tokens, torch.float32, heads={"head_dim": 16}, rope=make_rope(16))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_dtypes_within_budget(tokens, dtype):
    layout = LAYOUTS["split"]
    check(layout, [2, 10**6], tokens, dtype, heads={"head_dim": 64}, rope=make_rope(64))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 1), (7, 3), (64, 80), (80, 80), (96, 128), (256, 256)], ids=str
)
def test_head_sizes(head_dim, value_dim, tokens):
    # The smaller the head, the more of them, or there would be few outputs to judge by.
    heads = {"heads": 20 if head_dim < 64 else 2, "kv_heads": 1, "head_dim": head_dim, "value_dim": value_dim}
    rope = make_rope(head_dim // 2 * 2) if head_dim > 1 else None
    check((2, 70, 0), [5, 300], tokens, torch.float32, heads=heads, rope=rope)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (9, 3), (14, 2), (16, 1), (71, 1)], ids=str)
def test_head_groups(heads, kv_heads, tokens):
    check((2, 70, 0), [5, 300], tokens, torch.float32, heads={"heads": heads, "kv_heads": kv_heads}, rope=make_rope())


ROTATIONS = {"interleaved": (16, "interleaved"), "partial": (6, "half"), "interleaved-partial": (6, "interleaved")}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("rotation", [*ROTATIONS.values(), None], ids=[*ROTATIONS, "none"])
def test_rotations(rotation, tokens):
    rope = rotation and make_rope(*rotation)
    check((4, 70, 0), [30, 73, 301, 10**6], tokens, torch.float32, rope=rope)


OPTIONS = {
    "softcap": {"softcap": 2.0},
    "sink_logits": {"sink_logits": torch.linspace(-2, 2, 4)},
    "alibi_slopes": {"alibi_slopes": 2.0 ** -torch.arange(1.0, 5)},
    "scale": {"scale": 0.7},
    "all": {"softcap": 2.0, "sink_logits": torch.linspace(-2, 2, 4), "alibi_slopes": 2.0 ** -torch.arange(1.0, 5)},
}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_score_options(options, tokens):
    out, _ = check(LAYOUTS["split"], [2, 90, 301], tokens, torch.float32, rope=make_rope(), **options)
    torch.manual_seed(0)
    _, without = check(LAYOUTS["split"], [2, 90, 301], tokens, torch.float32, rope=make_rope())
    assert max_error(out, without) > 1e-2, "the option has an effect"


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [(1, [1, 0, 1]), (1, [0, 0, 0]), (5, [5, 0, 2]), (40, [40, 0, 1]), (40, [17, 40, 39])],
    ids=str,
)
def test_ragged_rows(tokens, lengths):
    for layout in (LAYOUTS["split"], (4, 5, 0)):
        check(layout, [0, 2, 400], tokens, torch.float32, rope=make_rope(), lengths=lengths)


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [((4, 3, 0), 200), ((0, 1, 0), 150), ((60, 5, 2), 100), ((0, 47, 0), 100), ((3, 300, 0), 290)],
    ids=str,
)
def test_chunks_of_any_length(layout, tokens):
    """Longer than the ring, across all sinks, and with blocks of keys that every query sees."""
    heads = {"heads": 2, "kv_heads": 1}
    check(layout, [0, 1, 500], tokens, torch.float32, heads=heads, rope=make_rope())


def test_sinks_of_several_blocks():
    for tokens in (1, 5, 30):
        check((40, 30, 0), [10, 39, 40, 75, 1000], tokens, torch.float32, rope=make_rope())


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_new_tokens_of_any_strides(tokens):
    ring, plain, _ = rings_at([50], (2, 30, 0), {}, torch.float32, make_rope())
    dense = [x.contiguous().to(DEVICE) for x in make_qkv(tokens, batch=1)]
    expected = sink_attention(*dense, plain, rope=make_rope(), backend="triton")
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in dense], dim=-1)  # as one projection makes them
    parts = joined.split([x.shape[1] * x.shape[3] for x in dense], dim=-1)
    views = [part.unflatten(2, (-1, 16)).transpose(1, 2) for part in parts]
    out = sink_attention(*views, ring, rope=make_rope(), backend="triton")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    ring.rollback(0)


def test_large_scores_do_not_overflow():
    x = torch.full((1, 1, 3, 128), 30.0, dtype=torch.float16, device=DEVICE)
    ring = RingKVCache(1, 1, 128, num_sinks=1, window=4, dtype=torch.float16, device=DEVICE)
    assert torch.equal(sink_attention(x, x, x, ring, backend="triton"), x)


@pytest.mark.parametrize("processors", [1, 16, 128])
@pytest.mark.parametrize("tokens", [1, 3])
def test_several_blocks_and_many_parts(tokens, processors, monkeypatch):
    """All blocks in one program, several in each, and more programs than are combined at once."""
    target = attention.get_target(torch.device(DEVICE))
    monkeypatch.setattr(attention, "get_target", lambda device: target._replace(num_sms=processors))
    monkeypatch.setattr("sinkattn.ops.attention._shapes", {})
    run, grids = attention.decode_launch, set()

    def watched(shape):
        launch = run(shape)
        grids.add((launch.grid[1], launch.numbers["BLOCK_SPLITS"], launch.numbers["BLOCK_N"]))
        return launch

    monkeypatch.setattr(attention, "decode_launch", watched)
    heads = {"heads": 60 // tokens, "kv_heads": 1}
    check((3, 800, 9), [400, 812, 813, 10**6 + 5], tokens, torch.float32, heads=heads, rope=make_rope())
    ((parts, combined, block),) = grids
    if processors == 128:
        assert parts > 2 * combined
    else:
        assert 809 // block >= 2 * parts
    assert (parts == 1) == (processors == 1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_boundaries_of_a_split_window(tokens):
    """Each place on its own: in one batch a neighbour's work can hide a part that is left out."""
    heads = {"heads": 2, "kv_heads": 1}
    for place in boundaries(LAYOUTS["split"]):
        check(LAYOUTS["split"], [place], tokens, torch.float32, heads=heads, rope=make_rope())


# Chunks whose keys are split over programs


@pytest.fixture
def splits(monkeypatch):
    """Splits chunks; a set of the numbers of splits that were launched."""
    launch, numbers = attention.chunk_launch, set()

    def watched(shape, split):
        numbers.add(launch(shape, split).grid[1])
        return launch(shape, split)

    monkeypatch.setattr(attention, "SPLIT_CHUNKS", True)
    monkeypatch.setattr(attention, "chunk_launch", watched)
    return numbers


@pytest.mark.parametrize("layout", [LAYOUTS["split-headroom"], (5, 600, 0)], ids=str)
def test_split_chunks_at_boundaries(layout, splits):
    for place in boundaries(layout):  # each on its own, so that few programs leave room for splits
        check(layout, [place], 33, torch.float32, heads={"heads": 4, "kv_heads": 1}, rope=make_rope())
    assert min(splits) > 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_split_chunks_in_all_dtypes(dtype, splits):
    check((3, 400, 0), [2, 10**6], 33, dtype, heads={"kv_heads": 1, "head_dim": 64}, rope=make_rope(64))
    assert min(splits) > 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_score_options_in_split_chunks(options, splits):
    check((3, 300, 0), [2, 90, 301], 33, torch.float32, heads={"kv_heads": 1}, rope=make_rope(), **options)
    assert min(splits) > 1


@pytest.mark.parametrize(
    ("layout", "tokens", "lengths"),
    [
        ((4, 3, 0), 200, None),
        ((0, 1, 0), 150, [150, 0, 7]),
        ((60, 5, 2), 100, [1, 100, 61]),
        ((3, 300, 0), 290, [290, 3, 0]),
        ((40, 30, 0), 90, [0, 0, 90]),
    ],
    ids=str,
)
def test_split_chunks_of_any_length(layout, tokens, lengths, splits, monkeypatch):
    """More splits than blocks of keys that a query sees, padding, sinks among the new tokens."""
    target = attention.get_target(torch.device(DEVICE))
    monkeypatch.setattr(attention, "get_target", lambda device: target._replace(num_sms=600))
    monkeypatch.setattr("sinkattn.ops.attention._shapes", {})
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 24, "value_dim": 40}
    check(layout, [0, 1, 500], tokens, torch.float32, heads=heads, rope=make_rope(24), lengths=lengths)
    assert min(splits) > 1


def test_split_chunks_leave_the_same_ring(splits):
    """Chunks and single tokens in turn."""
    rope, (q, k, v) = make_rope(), (x.to(DEVICE) for x in make_qkv(240, batch=1, kv_heads=1))
    ring, done, out = RingKVCache(1, 1, 16, 2, 141, device=DEVICE), 0, []
    for tokens in (30, 1, 140, 1, 28, 40):
        out.append(
            sink_attention(*(x[:, :, done : done + tokens] for x in (q, k, v)), ring, rope=rope, backend="triton")
        )
        done += tokens
    geometry = {"num_sinks": 2, "window": 141, "rope": rope}
    exact = (x.double() for x in (q, k, v))
    assert_within_budget(torch.cat(out, dim=2), oracle_of(q.dtype, reference.streaming_attention, *exact, **geometry))
    assert min(splits) > 1


@pytest.mark.parametrize("tokens", [3, 40])
def test_padding_among_sinks_has_no_effect(tokens):
    """A stream that ends among the sinks, with NaN behind its last token."""
    ring = RingKVCache(1, 2, 16, 4, 20, device=DEVICE)
    exact = RingKVCache(1, 2, 16, 4, 20, dtype=torch.float64, device=DEVICE)
    new = [x.to(DEVICE) for x in make_qkv(tokens, batch=1)]
    for x in new:
        x[:, :, 2:] = torch.nan
    out = sink_attention(*new, ring, rope=make_rope(), lengths=torch.tensor([2], device=DEVICE), backend="triton")
    counted = (x[:, :, :2].double() for x in new)
    oracle = oracle_of(torch.float32, reference.sink_attention, *counted, exact, rope=make_rope())
    assert_within_budget(out[:, :, :2], oracle)
    assert not out[:, :, 2:].any()


def test_padding_is_zero_in_bfloat16():
    new = [x.to(DEVICE) for x in make_qkv(40, dtype=torch.bfloat16)]
    for part in (40, 5):
        ring = RingKVCache(2, 2, 16, 4, 20, dtype=torch.bfloat16, device=DEVICE)
        lengths = torch.tensor([part - 2, 0], device=DEVICE)
        out = sink_attention(*(x[:, :, :part] for x in new), ring, lengths=lengths, backend="triton")
        assert not out[0, :, part - 2 :].any()
        assert not out[1].any()


def test_one_token_of_a_group_too_large_for_decoding():
    heads = {"heads": 33, "kv_heads": 1, "head_dim": 256}
    check((2, 20, 0), [1, 50], 1, torch.float32, heads=heads, rope=make_rope(256))


@pytest.mark.parametrize("tokens", [3, 33])
def test_rotary_tables_of_any_strides(tokens):
    rope, layout = make_rope(), (2, 30, 0)
    outs = []
    for view in (torch.clone, strided):
        torch.manual_seed(0)
        ring, _, _ = rings_at([50], layout, {}, torch.float32, rope)
        new = [x.to(DEVICE) for x in make_qkv(tokens, batch=1)]
        tables = [view(x.to(DEVICE)) for x in rope.stream_tables(ring.seen, tokens, num_sinks=2, window=30)]
        options = {"num_sinks": 2, "window": 30, "scale": 0.25, "backend": "triton"}
        outs.append(ops.sink_attention_(ring.keys, ring.values, *new, ring.seen, *tables, **options))
    assert torch.equal(*outs)


@pytest.mark.parametrize("tokens", [1, 33])
def test_scores_far_below_zero(tokens):
    """As large as floats go: what has been seen decides, not what a sum starts from."""
    ring = RingKVCache(1, 1, 16, 1, 4, device=DEVICE)
    q, k, v = (torch.ones(1, 1, tokens, 16, device=DEVICE) for _ in range(3))
    out = sink_attention(q * 1e18, -k * 1e18, v, ring, backend="triton")
    assert torch.equal(out, v)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_what_is_out_of_sight_has_no_effect(tokens, junk):
    """Padding, and slots of headroom that hold tokens from before the window."""
    layout = (2, 20, 30)
    results = []
    for filler in (0.0, junk):
        torch.manual_seed(0)
        ring, _, _ = rings_at([60, 60], layout, {}, torch.float32, None)
        new = [x.contiguous().to(DEVICE) for x in make_qkv(tokens)]
        for cache in (ring.keys, ring.values):
            cache[:, :, 2 + (60 - 2 - 25) % 50] = filler  # the token 25 before the next
        for x in new:
            x[0, :, tokens - 1 :] = filler
        lengths = torch.tensor([tokens - 1, tokens], device=DEVICE)
        results.append(sink_attention(*new, ring, lengths=lengths, backend="triton"))
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_wrong_positions_of_sinks_are_noticed():
    """A negative control: with the sinks' rotation taken for the window's, the budget is missed."""
    rope, layout = make_rope(), LAYOUTS["split"]
    ring, _, exact = rings_at([1000], layout, {}, torch.float32, rope)
    new = [x.to(DEVICE) for x in make_qkv(1, batch=1)]
    cos, sin = (x.to(DEVICE) for x in rope.stream_tables(ring.seen, 1, num_sinks=3, window=150))
    options = {"num_sinks": 3, "window": 150, "scale": 0.25, "arrivals": ring.arrivals, "backend": "triton"}
    oracle = oracle_of(torch.float32, reference.sink_attention, *(x.double() for x in new), exact, rope=rope)
    right = ops.sink_attention_(ring.keys, ring.values, *new, ring.seen, cos, sin, **options)
    assert_within_budget(right, oracle)
    cos[1], sin[1] = cos[0], sin[0]
    wrong = ops.sink_attention_(ring.keys, ring.values, *new, ring.seen, cos, sin, **options)
    with pytest.raises(AssertionError, match="times those to expect"):
        assert_within_budget(wrong, oracle)


@pytest.mark.skipif(DEVICE == "cuda", reason="the order of programs is the GPU's own")
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_programs_may_run_in_any_order(tokens, monkeypatch):
    """The last program first: a slot that is written must be none that another program still has to read."""
    from triton.runtime import interpreter

    def run():
        torch.manual_seed(0)
        ring, _, _ = rings_at([170, 171], LAYOUTS["split"], {}, torch.float32, make_rope())
        out = sink_attention(*make_qkv(tokens), ring, rope=make_rope(), backend="triton")
        return out, ring.keys, ring.values

    forwards = run()
    builder = interpreter.interpreter_builder
    in_order, visited = builder.set_grid_idx, []

    def in_reverse(*index):
        index = [size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)]
        visited.append(index)
        in_order(*index)

    monkeypatch.setattr(builder, "set_grid_idx", in_reverse)
    for got, expected in zip(run(), forwards, strict=True):
        assert torch.equal(got, expected)
    assert visited[-1] == [0, 0, 0]
    assert len(visited) > 1


def test_every_way_is_taken():
    """What the tests above rely on: one token and a few go one way, many the other, and so do groups too large."""

    def uses_decode_kernel(tokens, heads=4, kv_heads=2, head_dim=16, window=70):
        sizes = (1, heads, kv_heads, tokens, head_dim, head_dim, 2 + window, 2, window, head_dim // 2)
        return CallShape(Target(90, 4), torch.float32, *sizes, False, 1.0, None, (), (), ()).uses_decode_kernel

    assert uses_decode_kernel(1)
    assert uses_decode_kernel(3)
    assert not uses_decode_kernel(33)
    assert not uses_decode_kernel(3, window=2)
    assert not uses_decode_kernel(3, heads=71, kv_heads=1)
    assert uses_decode_kernel(1, heads=71, kv_heads=1)
    assert not uses_decode_kernel(1, heads=71, kv_heads=1, head_dim=256)


def test_a_stream_of_calls():
    """Decoding and chunks in turn, over several wraps, ragged: as the specification has it token by token."""
    layout, rope = (2, 21, 4), make_rope()
    q, k, v = (x.to(DEVICE) for x in make_qkv(150, batch=2))
    ring = RingKVCache(2, 2, 16, *layout, device=DEVICE)
    done, out = 0, []
    for tokens in (1, 1, 30, 1, 4, 5, 1, 1, 60, 16, 1, 20, 1, 1, 7):
        part = slice(done, done + tokens)
        out.append(
            sink_attention(q[:, :, part], k[:, :, part], strided(v[:, :, part]), ring, rope=rope, backend="triton")
        )
        done += tokens
    assert done == 150
    exact, geometry = (x.double() for x in (q, k, v)), {"num_sinks": 2, "window": 21, "rope": rope}
    assert_within_budget(torch.cat(out, dim=2), oracle_of(q.dtype, reference.streaming_attention, *exact, **geometry))


# The boundary


def triton_call():
    query, key, value = (x.to(DEVICE) for x in make_qkv(1))
    ring = RingKVCache(2, 2, 16, 2, 9, device=DEVICE)
    call = {"keys": ring.keys, "values": ring.values, "query": query, "key": key, "value": value, "seen": ring.seen}
    layout = {"num_sinks": 2, "window": 9, "scale": 0.25, "backend": "triton", "arrivals": ring.arrivals}
    return call | layout | {"cos": None, "sin": None}


REFUSED = [
    ({"arrivals": lambda x: x.long()}, TypeError, "arrivals: expected dtype torch.int32, got torch.int64"),
    ({"arrivals": lambda x: x[:, :1]}, ValueError, r"arrivals: expected shape \[2, 2\], got \[2, 1\]"),
    ({"keys": lambda x: x.mT.contiguous().mT}, ValueError, "keys: expected contiguous memory, got strides"),
    ({"values": lambda x: x[:, :1]}, ValueError, r"values?: expected shape"),
    ({"values": lambda x: x.half()}, TypeError, "values: expected dtype torch.float32, got torch.float16"),
    ({"sink_logits": lambda _: torch.ones(3)}, ValueError, r"sink_logits: expected shape \[4\], got \[3\]"),
    ({"window": lambda _: 10}, ValueError, "window: expected 1 to 9, got 10"),
    (
        {name: lambda x: x.double() for name in ("keys", "values", "query", "key", "value")},
        TypeError,
        r"keys: expected one of .* for the triton backend, got torch.float64",
    ),
    (
        {name: lambda x: x.repeat(1, 1, 1, 20) for name in ("keys", "values", "query", "key", "value")},
        ValueError,
        "keys: expected a head_dim of 1 to 256 for the triton backend, got 320",
    ),
]


@pytest.mark.parametrize(("spoiled", "error", "message"), REFUSED, ids=["-".join(case[0]) for case in REFUSED])
def test_bad_arguments_are_refused(spoiled, error, message):
    call = triton_call()
    ops.sink_attention_(**call)
    call |= {name: spoil(call.get(name)) for name, spoil in spoiled.items()}
    before = {name: x.clone() for name, x in call.items() if torch.is_tensor(x)}
    with pytest.raises(error, match=message):
        ops.sink_attention_(**call)
    assert all(torch.equal(call[name], x) for name, x in before.items())


def test_no_tokens_is_no_work():
    q, k, v = (x.to(DEVICE) for x in make_qkv(0))
    ring = RingKVCache(2, 2, 16, 2, 4, device=DEVICE)
    assert sink_attention(q, k, v, ring, rope=make_rope(), backend="triton").shape == (2, 4, 0, 16)


def test_arrivals_are_made_when_none_are_given():
    call = triton_call()
    given = ops.sink_attention_(**call)
    assert torch.equal(ops.sink_attention_(**call | {"arrivals": None}), given)


def test_the_output_joins_heads_without_a_copy():
    q, k, v = (x.to(DEVICE) for x in make_qkv(5))
    ring = RingKVCache(2, 2, 16, 2, 4, device=DEVICE)
    assert sink_attention(q, k, v, ring, backend="triton").transpose(1, 2).is_contiguous()
