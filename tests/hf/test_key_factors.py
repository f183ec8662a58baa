"""Factors between keys and queries for rings of 8 bits: scores stay the same, large elements of keys do no harm.

A stream keeps those that its keys were divided by, in whatever model, row or file it goes on.
"""

import copy
import pickle
from functools import cache

import pytest
import torch
from factories import make_rope
from hf_models import build, random_ids
from pool_streams import some_ids
from recorded_graph import REPLAYED, WARM, Graphs
from safetensors.torch import load_file
from test_led_pool import OtherRank
from torch import nn

import sinkattn
from sinkattn import StreamPool
from sinkattn.hf.cache.stream_file import write_streams
from sinkattn.hf.fingerprint import fingerprint
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.probe.result import Rotation
from sinkattn.hf.swap.key_factors import apply_factors, key_factors
from sinkattn.hf.trial.agreement import relative_error
from sinkattn.hf.versions import forward_cache
from sinkattn.rope import rotate

LARGE = 2.0**6
SIZES = (2, 12, 4)


def made(large: list[int], kv_heads: int = 2, heads: int = 6, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of which some elements are large in keys and small in queries."""
    query, key = torch.randn(2, heads, 200, dim), torch.randn(2, kv_heads, 200, dim)
    query[..., large] /= LARGE
    key[..., large] *= LARGE
    return query, key


@pytest.mark.parametrize(
    ("large", "rotation"),
    [
        ([3], None),
        ([3, 11], Rotation(make_rope(16), 0)),
        ([6, 7], Rotation(make_rope(16, style="interleaved"), 0)),
        ([1, 5, 9], Rotation(make_rope(8), 4)),  # elements 4 to 11 are rotated
    ],
)
def test_factors_undo_large_elements(large, rotation):
    query, key = made(large)
    factors = key_factors(query, key, rotation)
    expected = torch.ones(2, 16)
    expected[:, large] = LARGE
    assert torch.equal(factors, expected)
    scaled_query, scaled_key = apply_factors(query, key, factors.expand(2, -1, -1))
    assert torch.equal(scaled_key[..., large] * LARGE, key[..., large])
    scores, scaled = (
        q.unflatten(1, (2, 3)).double() @ k[:, :, None].double().transpose(3, 4)
        for q, k in ((query, key), (scaled_query, scaled_key))
    )
    assert torch.equal(scores, scaled)  # powers of two change no digit
    if rotation is not None:
        tables = rotation.rope.tables(torch.arange(200))
        at = slice(rotation.offset, rotation.offset + rotation.rope.rotary_dim)
        before, after = (rotate(x[..., at], *tables, interleaved=rotation.rope.interleaved) for x in (key, scaled_key))
        assert torch.equal(before / factors[:, None, at], after)  # the rotation may come before or after


def test_elements_of_a_pair_have_one_factor():
    query, key = made([3])
    factors = key_factors(query, key, Rotation(make_rope(16), 0))
    assert torch.equal(factors[:, :8], factors[:, 8:])
    assert (factors[:, 3] > 4).all()


def test_layers_that_gain_little_get_none():
    assert key_factors(*made([]), None) is None
    query, key = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    key[..., 0] *= 1.5
    assert key_factors(query, key, None) is None


def test_elements_that_are_zero_get_finite_factors():
    query, key = made([3])
    query[..., 5], key[..., 7] = 0, 0
    factors = key_factors(query, key, None)
    assert factors.isfinite().all()
    assert (factors > 0).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_factors_let_nothing_overflow_in_float16(swapped):
    """An element of usual products where all others are large in one of the two and small in the other."""
    query, key = torch.randn(1, 4, 100, 8) / 256, torch.randn(1, 2, 100, 8) * 256
    query[..., 3] = key[..., 3] = 300
    if swapped:
        query, key = key.repeat_interleave(2, dim=1), query[:, ::2]
    query, key = query.half(), key.half()
    factors = key_factors(query, key, None)
    exponent = 3 if swapped else -3  # 2,400 is the largest of 300 * 2^n below 4,096
    assert torch.equal(factors[:, 3].log2(), torch.full((2,), float(exponent)))
    assert all(x.isfinite().all() for x in apply_factors(query, key, factors.unsqueeze(0)))


def model_with_large_elements(factor: float) -> nn.Module:
    """A llama whose scores are the same for every factor."""
    model = build("llama")
    dim = model.config.head_dim
    for layer in model.model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            for projection, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                rows = projection.weight.unflatten(0, (-1, dim))
                rows[:, [1, 1 + dim // 2]] *= by
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **{forward_cache(model): sinkattn.SinkCache(model)}).logits


def test_large_elements_of_keys_do_no_harm():
    errors = {}
    for factor in (1.0, LARGE):
        ids = random_ids(1, 60)
        whole = logits(sinkattn.enable(model_with_large_elements(factor), 3, 40), ids)
        model = sinkattn.enable(model_with_large_elements(factor), 3, 40, cache_dtype="int8")
        patch = get_patch(model)
        assert bool(patch.key_factors) == (factor > 1)
        errors[factor] = relative_error(logits(model, ids), whole)
    patch.key_factors = {}
    without = relative_error(logits(model, ids), whole)
    assert errors[LARGE] < 1.5 * errors[1.0]
    assert without > 3 * errors[1.0]


@cache
def model_with(factors: str) -> nn.Module:
    """The same weights, with factors as measured, or as another machine may measure them. Shared: do not change it."""
    model = sinkattn.enable(model_with_large_elements(LARGE), *SIZES, cache_dtype="int8")
    measured = get_patch(model).key_factors
    first, second = measured
    if factors == "of a layer":
        del measured[second]
    elif factors == "none":
        measured.clear()
    elif factors == "one exponent less":
        measured[first] = measured[first].clone()
        measured[first][1, [1, 5]] /= 2
    return model


@torch.no_grad()
def feed(model: nn.Module, cache: sinkattn.SinkCache, ids: torch.Tensor, *, step: int = 64) -> torch.Tensor:
    calls = [model(input_ids=x, **{forward_cache(model): cache}).logits for x in ids.split(step, dim=1)]
    return torch.cat(calls, dim=1)


def fed(model: nn.Module, ids: torch.Tensor) -> sinkattn.SinkCache:
    cache = sinkattn.SinkCache(model)
    feed(model, cache, ids)
    return cache


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Of what files have."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def test_steps_convert_no_factors():
    """They have the dtype of the model, in which they are exact."""
    model = sinkattn.enable(model_with_large_elements(LARGE).bfloat16(), *SIZES, cache_dtype="int8")
    for layer, measured in zip(fed(model, random_ids(2, 3)).layers, get_patch(model).key_factors.values(), strict=True):
        assert layer.key_factors.dtype == torch.bfloat16
        assert torch.equal(layer.key_factors.double(), measured.expand(2, -1, -1).double())
        assert torch.equal(layer.key_factors.double(), layer.key_exponents.double().exp2())


def test_layers_without_factors_hold_none():
    layers = fed(model_with("of a layer"), random_ids(1, 3)).layers
    assert [layer.key_factors is None for layer in layers] == [False, True]
    assert "key_factors" not in layers[1].tensors


@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [("measured", "one exponent less"), ("measured", "none"), ("none", "measured"), ("of a layer", "measured")],
)
def test_saved_streams_go_on_with_their_own_factors(saved_with, loaded_with, tmp_path):
    """Bit for bit in a model that has measured others, which are those of its new streams."""
    model, other, path = model_with(saved_with), model_with(loaded_with), tmp_path / "stream"
    cache, new = fed(model, random_ids(2, 30)), random_ids(2, 40, seed=1)
    cache.save(path)
    loaded, ignored = (sinkattn.load_stream(other, path) for _ in range(2))
    assert_same(loaded.state_tensors(), cache.state_tensors())
    for layer in ignored.layers:
        layer.set_factors(slice(None), layer.model_factors)
    for step in (40, 1):
        want = feed(model, cache, new, step=step)
        assert torch.equal(feed(other, loaded, new, step=step), want)
        assert not torch.allclose(feed(other, ignored, new, step=step), want, atol=1e-3)
    assert_same(loaded.state_tensors(), cache.state_tensors())
    loaded.reset()
    own = sinkattn.SinkCache(other)
    assert torch.equal(feed(other, loaded, new), feed(other, own, new))
    assert_same(loaded.state_tensors(), own.state_tensors())


def test_rows_have_factors_of_their_own(tmp_path):
    models, ids, new = [model_with("measured"), model_with("none")], random_ids(2, 30), random_ids(2, 9, seed=1)
    model = models[0]
    cache = fed(model, ids)
    cache.reset()
    for layer in cache.layers:
        layer.set_factors(1, None)
    alone = [feed(each, sinkattn.SinkCache(each), ids)[row] for row, each in enumerate(models)]
    assert torch.equal(feed(model, cache, ids), torch.stack(alone))
    cache.save(tmp_path / "stream")
    forks = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), sinkattn.load_stream(model, tmp_path / "stream")]
    swapped = [copy.deepcopy(cache) for _ in range(2)]
    swapped[0].reorder_cache(torch.tensor([1, 0]))
    swapped[1].batch_select_indices(torch.tensor([1, 0]))
    one = copy.deepcopy(cache)
    one.batch_select_indices(torch.tensor([False, True]))
    assert all(layer.key_factors.shape == (1, 2, 8) and (layer.key_factors == 1).all() for layer in one.layers)
    want = feed(model, cache, new)
    for fork in forks:
        assert torch.equal(feed(model, fork, new), want)
    for each in swapped:
        assert torch.equal(feed(model, each, new.flip(0)), want.flip(0))


def test_factors_of_another_shape_or_dtype_are_refused(tmp_path):
    model, path = model_with("measured"), tmp_path / "stream"
    cache, name = fed(model, random_ids(1, 30)), "layers.1.key_exponents"
    tensors = cache.state_tensors()
    for x, message in [
        (None, r"expected \[1, 2, 8\], got none"),
        (tensors[name][:, :1], r"expected \[1, 2, 8\], got \[1, 1, 8\]"),
        (tensors[name].float(), r"expected torch.int8, got torch.float32"),
    ]:
        others = {key: y for key, y in {**tensors, name: x}.items() if y is not None}
        write_streams(path, others, fingerprint(get_patch(model)), cache.state_fields())
        with pytest.raises(ValueError, match=f"^path: {name}: {message}"):
            sinkattn.load_stream(model, path)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(("saved_with", "loaded_with"), [("measured", "none"), ("of a layer", "measured")])
def test_streams_of_a_pool_keep_their_factors(num_rows, saved_with, loaded_with, tmp_path):
    """In rows that streams with others have had; in a step of one stream, sums have the order that they have alone."""

    def layers_of(stream):
        stream.save(tmp_path / "compared")
        return {name: x for name, x in load_file(tmp_path / "compared").items() if name.startswith("layers")}

    def played(model):
        stream = StreamPool(model, 1).open()
        stream.feed(some_ids(20))
        stream.save(tmp_path / saved_with)
        return [*stream.generate(12)], layers_of(stream)

    want_other, want_loaded = played(model_with(loaded_with)), played(model_with(saved_with))
    pool = StreamPool(model_with(loaded_with), num_rows, max_parked=3)
    other, loaded, said = pool.open(), pool.load(tmp_path / saved_with), ([], [])
    other.feed(some_ids(20))
    for _ in range(3):
        for stream, tokens in zip((other, loaded), said, strict=True):
            tokens += stream.generate(4)
    assert said == (want_other[0], want_loaded[0])
    fork = loaded.fork()
    for stream, (_, layers) in ((other, want_other), (loaded, want_loaded), (fork, want_loaded)):
        assert_same(layers_of(stream), layers)
    assert want_other[1]["layers.1.key_exponents"].any() != want_loaded[1]["layers.1.key_exponents"].any()
    for stream in (other, loaded, fork):
        [*stream.generate(1)]  # has a row then
        stream.close()
    new = pool.open()
    new.feed(some_ids(20))
    assert [*new.generate(12)] == want_other[0]
    assert_same(layers_of(new), want_other[1])


def test_ranks_have_factors_of_their_own(tmp_path):
    """In different layers, and other ones than the ranks that load what they have saved."""
    ends = []
    for own, other in (("measured", "of a layer"), ("none", "measured")):
        with OtherRank(model_with(other)).in_this_process(), StreamPool(model_with(own), 2, leads=True) as pool:
            if not ends:
                stream = pool.open()
                stream.feed(some_ids(20))
                stream.save(tmp_path / "begun")
            stream = pool.load(tmp_path / "begun")
            tokens = [*stream.generate(5)]
            stream.save(tmp_path / "end")
        layers = {name: x for name, x in load_file(tmp_path / "end").items() if "layers" in name}
        ends.append((tokens, layers))
    assert ends[0][0] == ends[1][0]
    assert_same(ends[1][1], ends[0][1])
    assert not layers["rank1.layers.1.key_exponents"].any()
    assert layers["layers.1.key_exponents"].any()


def test_steps_in_graphs_have_the_factors_of_their_streams(tmp_path):
    """Of a cache, and of a pool whose model has none, into which a stream with some comes."""
    source, plain = model_with("measured"), model_with("none")
    captured = copy.deepcopy(plain)
    get_patch(captured).capture_steps(graphs := Graphs())
    fed(source, random_ids(1, 30)).save(tmp_path / "cache")
    stream = StreamPool(source, 1).open()
    stream.feed(some_ids(20))
    stream.save(tmp_path / "stream")
    new, logits, tokens = random_ids(1, WARM + 4, seed=1), [], []
    for model in (plain, captured):
        loaded = sinkattn.load_stream(model, tmp_path / "cache")
        logits.append(feed(model, loaded, new, step=1))
        pool = StreamPool(model, 3, max_prefix=4)
        streams = [pool.open(some_ids(n)) for n in (2, 3)]
        begun = [stream.generate() for stream in streams]
        tokens.append([next(each) for _ in range(2 * WARM) for each in begun])
        begun[1].close()
        streams[1] = pool.load(tmp_path / "stream")
        begun[1] = streams[1].generate()
        tokens[-1] += [next(each) for _ in range(4 * WARM) for each in begun]
    assert sinkattn.hf.decode_steps(captured, loaded) == REPLAYED
    assert torch.equal(*logits)
    assert tokens[0] == tokens[1]
    assert graphs.num_replays > 10


def test_compiled_steps_have_the_factors_of_their_streams(tmp_path, monkeypatch):
    """As inputs of a graph, which here runs as it was traced."""
    graphs = []

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr("sinkattn.hf.swap.step_backend.compile_graph", compile_graph)
    plain = model_with("of a layer")
    compiled = copy.deepcopy(plain)
    get_patch(compiled).compile_step()
    for factors in ("one exponent less", "measured", "none"):
        fed(model_with(factors), random_ids(1, 30)).save(tmp_path / factors)
        caches = (sinkattn.load_stream(model, tmp_path / factors) for model in (plain, compiled))
        want, got = (
            feed(model, cache, random_ids(1, 3, seed=1), step=1)
            for model, cache in zip((plain, compiled), caches, strict=True)
        )
        assert torch.equal(got, want), factors
    assert len(graphs) == 2  # with factors, and without
