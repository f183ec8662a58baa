"""Gradients of attention over a ring, against autograd through the specification on whole streams."""

from dataclasses import replace

import pytest
import torch
from factories import make_qkv, make_rope
from torch import Tensor

from sinkattn import RingKVCache, reference, sink_attention
from sinkattn.ops import attention, gradients

S, W = 3, 9
HEADS = {"heads": 6, "kv_heads": 2, "head_dim": 8}
OPTIONS = {
    "plain": {},
    "no rotation": {"rope": None},
    "interleaved": {"rope": make_rope(8, style="interleaved")},
    "half of the head": {"rope": make_rope(4)},
    "soft cap": {"softcap": 2.0},
    "sink logits": {"sink_logits": True},
    "ALiBi": {"alibi_slopes": True},
    "all": {"softcap": 3.0, "sink_logits": True, "alibi_slopes": True},
}


@pytest.fixture(params=["fused", "products"], autouse=True)
def backward(request, monkeypatch):
    """Runs a test on the C++ kernel and on PyTorch's matrix products."""
    kernel = "cpu" if request.param == "fused" else None
    monkeypatch.setattr(attention, "_backward_kernel", lambda backend: kernel)
    return request.param


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def make_options(name: str) -> dict:
    generator = torch.Generator().manual_seed(7)
    options = {"rope": make_rope(8), "scale": 0.3, **OPTIONS[name]}
    for option in ("sink_logits", "alibi_slopes"):
        if options.get(option):
            options[option] = torch.rand(HEADS["heads"], dtype=torch.float64, generator=generator)
    return options


def expected(first: int, streams: list[Tensor], options: dict, lengths: Tensor | None = None) -> Tensor:
    """Output for the tokens from ``first`` on, by the specification."""
    return reference.streaming_attention(*streams, num_sinks=S, window=W, lengths=lengths, **options)[:, :, first:]


def assert_gradients(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    for x, y in zip(got, want, strict=True):
        assert (x.grad - y.grad).norm() <= tolerance * y.grad.norm(), (x.grad, y.grad)


@pytest.mark.parametrize(
    ("backward", "block"), [("fused", 64), ("products", 3), ("products", 128)], indirect=["backward"]
)
@pytest.mark.parametrize("calls", [(40,), (2, 1, 20, 7, 1), (5, 60, 3)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_the_specification(name, calls, block, monkeypatch):
    """In every call, with what came before as a constant. Blocks of queries are those of the matrix products."""
    monkeypatch.setattr(gradients, "QUERY_BLOCK", block)
    options = make_options(name)
    streams = make_qkv(sum(calls), dtype=torch.float64, **HEADS)
    weights = torch.randn_like(streams[0])
    ring, first = RingKVCache(2, 2, 8, S, W, dtype=torch.float64), 0
    for tokens in calls:
        part = slice(first, first + tokens)
        ours, theirs = ([leaf(x[:, :, part]) for x in streams] for _ in range(2))
        logits = [leaf(options["sink_logits"]) for _ in range(2)] if "sink_logits" in options else None
        own, other = ({**options, **({"sink_logits": x} if logits else {})} for x in logits or (None, None))
        (sink_attention(*ours, ring, **own) * weights[:, :, part]).sum().backward()
        whole = [torch.cat((x[:, :, :first], y), dim=2) for x, y in zip(streams, theirs, strict=True)]
        (expected(first, whole, other) * weights[:, :, part]).sum().backward()
        # A first token alone has one key, and so no gradient for its query.
        checked = slice(1, 3) if first + tokens == 1 else slice(0, 3)
        assert_gradients(ours[checked], theirs[checked])
        if logits:
            assert_gradients(logits[:1], logits[1:])
        first += tokens


@pytest.mark.parametrize("backward", ["fused"], indirect=True)
@pytest.mark.parametrize("past", [0, 2, 250])
@pytest.mark.parametrize(
    ("layout", "tokens", "heads"),
    [
        ((4, 200), 200, {"heads": 6, "kv_heads": 2, "head_dim": 20, "value_dim": 36}),  # queries in several groups
        ((0, 70), 300, {"heads": 2, "kv_heads": 1, "head_dim": 16}),  # longer than the window
        ((70, 30), 150, {"heads": 2, "kv_heads": 2, "head_dim": 16}),  # sinks of several blocks
        ((3, 100), 150, {"heads": 66, "kv_heads": 33, "head_dim": 4}),  # several blocks of queries in a group
        ((2, 40), 100, {"heads": 71, "kv_heads": 1, "head_dim": 8}),
    ],
    ids=str,
)
def test_gradients_of_long_calls(layout, tokens, heads, past):
    """More queries, keys and heads than a block of the kernel has."""
    num_sinks, window = layout
    rope, value_dim = make_rope(heads["head_dim"]), heads.get("value_dim", heads["head_dim"])
    streams = make_qkv(past + tokens, batch=1, dtype=torch.float64, **heads)
    ring = RingKVCache(1, heads["kv_heads"], heads["head_dim"], *layout, value_dim=value_dim, dtype=torch.float64)
    options = {"rope": rope, "scale": 0.3, "softcap": 5.0}
    sink_attention(*(x[:, :, :past] for x in streams), ring, **options)
    ours, theirs = ([leaf(x[:, :, past:]) for x in streams] for _ in range(2))
    weights = torch.randn(1, heads["heads"], tokens, value_dim, dtype=torch.float64)
    (sink_attention(*ours, ring, **options) * weights).sum().backward()
    whole = [torch.cat((x[:, :, :past], y), dim=2) for x, y in zip(streams, theirs, strict=True)]
    out = reference.streaming_attention(*whole, num_sinks=num_sinks, window=window, **options)
    (out[:, :, past:] * weights).sum().backward()
    assert_gradients(ours, theirs)


def test_gradients_do_not_depend_on_threads(backward):
    """Bit for bit, where the work is our own."""
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            streams = [leaf(x) for x in make_qkv(300, **HEADS)]
            sink_attention(*streams, RingKVCache(2, 2, 8, S, 100), rope=make_rope(8)).square().sum().backward()
            results.append([x.grad for x in streams])
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) if backward == "fused" else torch.allclose(x, y, atol=1e-5)


def test_rows_of_different_lengths():
    options, lengths = make_options("all"), torch.tensor([4, 11])
    streams = make_qkv(11, dtype=torch.float64, **HEADS)
    ring = RingKVCache(2, 2, 8, S, W, dtype=torch.float64)
    more = make_qkv(13, dtype=torch.float64, **HEADS)
    new = torch.tensor([13, 6])
    sink_attention(*streams, ring, lengths=lengths, **options)
    ours = [leaf(x) for x in more]
    out = sink_attention(*ours, ring, lengths=new, **options)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    for row in range(2):
        past, count = int(lengths[row]), int(new[row])
        theirs = [leaf(x[row : row + 1, :, :count]) for x in more]
        whole = [torch.cat((x[row : row + 1, :, :past], y), dim=2) for x, y in zip(streams, theirs, strict=True)]
        (expected(past, whole, options) * weights[row, :, :count]).sum().backward()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x.grad[row, :, :count], y.grad[0], rtol=1e-10, atol=1e-12)
            assert not x.grad[row, :, count:].any()


def test_padding_of_any_value_has_no_effect():
    results = []
    for padding in (0.0, torch.nan):
        ring = RingKVCache(2, 2, 8, S, W, dtype=torch.float64)
        torch.manual_seed(0)
        streams = [x.clone() for x in make_qkv(6, dtype=torch.float64, **HEADS)]
        for x in streams:
            x[0, :, 4:] = padding
        leaves = [leaf(x) for x in streams]
        out = sink_attention(*leaves, ring, rope=make_rope(8), lengths=torch.tensor([4, 6]))
        out[:, :, :4].sum().backward()
        results.append([x.grad for x in leaves])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_autocast_does_not_change_the_backward():
    """Called within it, as by a learner."""
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        leaves = [leaf(x) for x in make_qkv(40, **HEADS)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sink_attention(*leaves, RingKVCache(2, 2, 8, S, W), rope=make_rope(8)).sum().backward()
        results.append([x.grad for x in leaves])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_no_rows_and_no_tokens():
    for batch, tokens in ((0, 4), (2, 0)):
        leaves = [leaf(torch.zeros(batch, heads, tokens, 8)) for heads in (6, 2, 2)]
        ring, seen = (torch.zeros(batch, 2, S + W, 8) for _ in range(2)), torch.zeros(batch, dtype=torch.int64)
        layout = {"num_sinks": S, "window": W, "scale": 1.0}
        attention.sink_attention_(*ring, *leaves, seen, None, None, **layout).sum().backward()
        assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_gradcheck():
    options = make_options("all")
    streams = [leaf(x) for x in make_qkv(14, batch=1, dtype=torch.float64, heads=2, kv_heads=1, head_dim=4)]
    logits, slopes = (leaf(x[:2]) for x in (options.pop("sink_logits"), options.pop("alibi_slopes")))
    options["rope"] = make_rope(4)

    def attend(query, key, value, sink_logits):
        ring = RingKVCache(1, 1, 4, 1, 5, dtype=torch.float64)
        return sink_attention(query, key, value, ring, sink_logits=sink_logits, alibi_slopes=slopes.detach(), **options)

    assert torch.autograd.gradcheck(attend, (*streams, logits))


@pytest.mark.parametrize("wrong", ["sink rotation", "past", "own keys"])
def test_the_comparison_notices_mistakes(wrong, backward, monkeypatch):
    options, first = make_options("plain"), 20
    streams = make_qkv(40, dtype=torch.float64, **HEADS)
    ring = RingKVCache(2, 2, 8, S, W, dtype=torch.float64)
    sink_attention(*(x[:, :, :first] for x in streams), ring, **options)
    if backward == "fused":
        operator = gradients._operator

        def mistaken(*arguments):
            arguments = list(arguments)
            if wrong == "sink rotation":
                arguments[9:11] = (x[:1].expand(2, -1, -1, -1) for x in arguments[9:11])
            dquery, dkey, dvalue, dlogits = operator(*arguments)
            return dquery, dkey * (wrong != "own keys"), dvalue, dlogits

        monkeypatch.setattr(gradients, "_operator", mistaken)
    elif wrong == "sink rotation":
        turned = gradients._Rotated._turned
        monkeypatch.setattr(gradients._Rotated, "_turned", lambda self, x, index, sign=1: turned(self, x, 0, sign))
    elif wrong == "own keys":
        others = gradients._Products._others
        monkeypatch.setattr(
            gradients._Products,
            "_others",
            lambda self, query, rows: replace(others(self, query, rows), new=slice(rows.stop, rows.stop)),
        )
    ours = [leaf(x[:, :, first:]) for x in streams]
    weights = torch.randn_like(streams[0][:, :, first:])
    (sink_attention(*ours, ring, **options) * weights).sum().backward()
    theirs = [leaf(x[:, :, first:]) for x in streams]
    past = [leaf(x[:, :, :first]) for x in streams]
    whole = [torch.cat(pair, dim=2) for pair in zip(past, theirs, strict=True)]
    (expected(first, whole, options) * weights).sum().backward()
    if wrong == "past":
        # The gradient that the past would get is not small: the cut is one that counts.
        assert all(x.grad.norm() > 0.1 * y.grad.norm() for x, y in zip(past[1:], theirs[1:], strict=True))
        assert_gradients(ours, theirs)
    else:
        with pytest.raises(AssertionError):
            assert_gradients(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_rounding(dtype):
    """At most twice the error of PyTorch's own attention in this dtype, where it computes the same."""
    tokens, options = S + W, make_options("no rotation")
    exact = make_qkv(tokens, dtype=torch.float64, **HEADS)
    weights = torch.randn_like(exact[0])

    def gradients_of(attend, streams) -> list[Tensor]:
        leaves = [leaf(x) for x in streams]
        (attend(*leaves) * weights.to(streams[0].dtype)).sum().backward()
        return [x.grad.double() for x in leaves]

    def ours(query, key, value):
        return sink_attention(query, key, value, RingKVCache(2, 2, 8, S, W, dtype=query.dtype), **options)

    def sdpa(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )

    rounded = [x.to(dtype) for x in exact]
    want = gradients_of(sdpa, [x.double() for x in rounded])
    for x, y, z in zip(gradients_of(ours, rounded), gradients_of(sdpa, rounded), want, strict=True):
        assert (x - z).norm() <= max(2 * (y - z).norm(), 1e-7 * z.norm())


def test_memory_is_that_of_the_call():
    """What autograd keeps does not grow with the stream."""
    kept = []
    ring = RingKVCache(2, 2, 8, S, W)
    for _ in range(4):
        streams = [leaf(x) for x in make_qkv(100, **HEADS)]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.untyped_storage().nbytes()) or x, lambda x: x
        ):
            sink_attention(*streams, ring, rope=make_rope(8)).sum().backward()
        kept.append(sum(sizes))
    assert kept[1] == kept[2] == kept[3]


def test_nothing_is_recorded_without_need():
    ring = RingKVCache(2, 2, 8, S, W)
    streams = make_qkv(5, **HEADS)
    assert not sink_attention(*streams, ring).requires_grad
    with torch.no_grad():
        assert not sink_attention(*map(leaf, streams), ring).requires_grad
    assert sink_attention(leaf(streams[0]), *streams[1:], ring).requires_grad
    with pytest.raises(RuntimeError, match="computes no gradients for this input"):
        sink_attention(*streams, ring, alibi_slopes=torch.rand(6, requires_grad=True))
