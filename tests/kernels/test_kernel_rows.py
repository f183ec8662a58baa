"""The Triton kernels in calls of some rows of a ring, with sinks and a first window token of each row's own."""

import copy

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error

pytest.importorskip("triton")

from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.attention_arguments import AttentionArguments
from sinkattn.kernels import attention

# Rows of a tile that hold no query divide zero by zero, and nobody reads them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The row of the ring of each row of a call, the tokens that it has seen, its sinks, and the first token of its window:
# as early as can be, after the sinks, in the middle of the ring, on either side of where it wraps, and as late.
ROWS, SEEN = [5, 0, 3, 6, 2, 7], [0, 2, 40, 10**6, 163, 10**9]
SINKS, BEGINS = [3, 0, 4, 1, 2, 4], [0, 2, 25, 10**6 - 7, 100, 10**9]
LAYOUTS = {"small": (4, 12, 3), "split": (4, 150, 9)}
TOKENS = {"one": 1, "few": 3, "chunk": 33}


def ring_and_options(layout, dtype=torch.float32):
    """A ring in which everything that no query may see is NaN, and the options of a call."""
    ring = RingKVCache(8, 2, 16, *layout, dtype=dtype, device=DEVICE)
    for cache in (ring.keys, ring.values):
        cache.fill_(torch.nan)
        for row, seen, sinks, begin in zip(ROWS, SEEN, SINKS, BEGINS, strict=True):
            window = range(max(sinks, begin, seen - ring.layout.window + 1), seen)
            slots = [reference.slot_of(token, sinks, ring.layout.ring, layout[0]) for token in window]
            slots += range(min(seen, sinks))
            cache[row][:, slots] = torch.randn(2, len(slots), 16, dtype=torch.float64, device=DEVICE).to(dtype)
    numbers = {"rows": ROWS, "row_sinks": SINKS, "begins": BEGINS}
    options = {name: torch.tensor(x, device=DEVICE) for name, x in numbers.items()}
    ring.seen[options["rows"]] = torch.tensor(SEEN, device=DEVICE)
    return ring, options


def check(layout, tokens, dtype=torch.float32, **options):
    """One call of the kernel within the budget, what it writes against `ops.append_`, and every option's effect."""
    ring, of_rows = ring_and_options(layout, dtype)
    new = [x.to(DEVICE) for x in make_qkv(tokens, batch=len(ROWS), dtype=dtype)]
    exact, plain = copy.deepcopy(ring), copy.deepcopy(ring)
    exact.keys, exact.values = exact.keys.double(), exact.values.double()
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = sink_attention(*new, ring, backend="triton", rope=make_rope(), **of_rows, **options)
    inputs = *(x.double() for x in new), exact
    oracle = oracle_of(dtype, reference.sink_attention, *inputs, rope=make_rope(), **of_rows, **options)
    assert_within_budget(out, oracle)

    seen = plain.seen[of_rows["rows"]]
    cos, sin = (x[0] for x in make_rope().stream_tables(seen, tokens, num_sinks=layout[0], window=layout[1]))
    given = {"num_sinks": layout[0], "lengths": options.get("lengths"), "cos": cos, "sin": sin}
    given |= {name: of_rows[name] for name in ("rows", "row_sinks")}
    ops.append_(plain.keys, plain.values, *new[1:], seen, **given)
    torch.testing.assert_close(ring.keys, plain.keys, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(ring.values, plain.values, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(ring.seen, exact.seen)
    assert not ring.arrivals.any()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_within_budget(layout, tokens):
    check(layout, tokens)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_rows_with_all_options(tokens):
    lengths = torch.tensor([tokens, 0, tokens // 2, 1, tokens, 1])
    scores = {"softcap": 2.0, "sink_logits": torch.linspace(-2, 2, 4), "alibi_slopes": 2.0 ** -torch.arange(1.0, 5)}
    check(LAYOUTS["split"], tokens, lengths=lengths, **scores)


@pytest.fixture
def split_chunks(monkeypatch):
    """Splits chunks, on a GPU with processors for several programs of each."""
    target = attention.get_target(torch.device(DEVICE))
    monkeypatch.setattr(attention, "get_target", lambda device: target._replace(num_sms=256))
    monkeypatch.setattr("sinkattn.ops.attention._shapes", {})
    monkeypatch.setattr(attention, "SPLIT_CHUNKS", True)


def test_rows_of_a_split_chunk(split_chunks, monkeypatch):
    launch, splits = attention.chunk_launch, []
    monkeypatch.setattr(attention, "chunk_launch", lambda *x: splits.append(launch(*x).grid[1]) or launch(*x))
    check(LAYOUTS["split"], 17)
    assert splits[0] > 1


@pytest.mark.parametrize("tokens", [1, 17], ids=["one", "chunk"])
def test_every_option_has_an_effect(tokens):
    ring, options = ring_and_options(LAYOUTS["small"])
    new = [x.to(DEVICE) for x in make_qkv(tokens, batch=len(ROWS))]
    out = sink_attention(*new, copy.deepcopy(ring), backend="triton", rope=make_rope(), **options)
    ring.keys.nan_to_num_(nan=3.0)
    for name, others in {"rows": ROWS[::-1], "row_sinks": [4] * len(ROWS), "begins": [0] * len(ROWS)}.items():
        changed, other = options | {name: torch.tensor(others, device=DEVICE)}, copy.deepcopy(ring)
        other.seen[changed["rows"]] = torch.tensor(SEEN, device=DEVICE)
        wrong = sink_attention(*new, other, backend="triton", rope=make_rope(), **changed)
        assert max_error(out, wrong.double()) > 1e-2, name


def rows_out_of_range_are_padding(tokens):
    """On a GPU nobody reads them on the host, so they must do no harm; here the checks are left out."""
    ring, options = ring_and_options(LAYOUTS["split"])
    options["rows"][0], options["rows"][-1] = -1, 8
    before = ring.keys.clone(), ring.values.clone()
    new = [x.to(DEVICE) for x in make_qkv(tokens, batch=len(ROWS))]
    seen = torch.tensor(SEEN, device=DEVICE)
    named = dict.fromkeys(AttentionArguments._fields) | options
    named |= {"keys": ring.keys, "values": ring.values, "seen": seen, "num_sinks": 4, "window": 150, "scale": 0.25}
    named |= {"interleaved": False, **dict(zip(("query", "key", "value"), new, strict=True))}
    call = AttentionArguments(**named)
    out, _ = attention.attend(call, attention.call_shape(call))
    assert out[1:-1].isfinite().all()
    assert not out[[0, -1]].any()
    for x, old in zip((ring.keys, ring.values), before, strict=True):
        torch.testing.assert_close(x[[5, 7]], old[[5, 7]], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 17], ids=["one", "chunk"])
def test_rows_out_of_range(tokens):
    rows_out_of_range_are_padding(tokens)


def test_rows_out_of_range_in_a_split_chunk(split_chunks):
    rows_out_of_range_are_padding(17)
