"""`enable(model, cache_dtype=...)`: unpatched models that see rounded keys and values, and the contract of streams."""

import copy
import sys

import pytest
import torch
from hf_models import build, random_ids
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import sinkattn
from sinkattn import BackgroundLearner, OnlineLearner
from sinkattn.hf import UnsupportedModelError
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.swap.captured_step import erase_newest_tokens, newest_tokens, ring_addresses
from sinkattn.hf.swap.step_graphs import _compare
from sinkattn.hf.trial.agreement import relative_error
from sinkattn.hf.versions import forward_cache
from sinkattn.reference import dequantise_keys, hadamard, quantise

S, W, R = 3, 12, 4
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Full attention; windows of the model's own beside it; these and sink logits; ALiBi by an adapter; states beside it.
FAMILIES = [
    ("llama", "int8"),
    ("llama", "fp8"),
    ("gemma3_text", "int8"),
    ("gpt_oss", "fp8"),
    ("bloom", "int8"),
    ("falcon_h1", "fp8"),
]


def assert_agrees(got: torch.Tensor, want: torch.Tensor, whole: torch.Tensor) -> None:
    """Logits agree but for what another order of sums may do: it lets a few elements become their neighbours.

    That is well below what rounding changes, from the logits of full precision, ``whole``.
    """
    effect = relative_error(want, whole)
    assert effect > 1e-3
    assert relative_error(got, want) < effect / 2


def enabled(family, cache_dtype, sizes=(S, W, R), **options) -> nn.Module:
    return sinkattn.enable(build(family, **options), *sizes, cache_dtype=cache_dtype)


@torch.no_grad()
def feed(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **{forward_cache(model): cache}).logits


def fed(model, *calls: torch.Tensor) -> tuple[sinkattn.SinkCache, torch.Tensor]:
    cache = sinkattn.SinkCache(model)
    return cache, torch.cat([feed(model, cache, ids) for ids in calls], dim=1)


def contents(cache) -> dict[str, bytes]:
    """What layers keep of the streams, as bytes: torch compares no numbers of float8."""
    tensors = {name: x for name, x in cache.state_tensors().items() if name.startswith("layers")}
    return {name: x.contiguous().view(torch.uint8).numpy().tobytes() for name, x in tensors.items()}


def rounded(x: torch.Tensor, dtype: torch.dtype, num_sinks: int, *, are_keys: bool) -> torch.Tensor:
    q, scale = quantise(hadamard(x) if are_keys else x, dtype)
    seen = dequantise_keys(q, scale, torch.float32) if are_keys else q.float() * scale
    return torch.cat((x[:, :, :num_sinks], seen[:, :, num_sinks:]), dim=2)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "sizes", "options"),
    [
        ("llama", (3, 40), {}),
        ("mistral", (0, 10), {"sliding_window": 10}),  # evicts
        ("gemma3_text", (3, 40), {}),
        ("gpt_oss", (3, 40), {}),
    ],
    ids=["llama", "mistral", "gemma3", "gpt_oss"],
)
def test_layers_are_those_of_the_original_on_rounded_keys_and_values(family, sizes, options, cache_dtype):
    """Keys are rounded after the rotation, where transformers' attention function gets them."""
    dtype, ids = DTYPES[cache_dtype], random_ids(2, 43)

    def attention(module, query, key, value, *args, **kwargs):
        num_sinks = 0 if getattr(module, "sliding_window", None) else sizes[0]
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(
            module, query, *(rounded(x, dtype, num_sinks, are_keys=x is key) for x in (key, value)), *args, **kwargs
        )

    AttentionInterface.register("rounded", attention)
    AttentionMaskInterface.register("rounded", AttentionMaskInterface()["eager"])
    original = build(family, **options)
    whole = original(ids, use_cache=False).logits.detach()
    original.set_attn_implementation("rounded")
    want = original(ids, use_cache=False).logits.detach()
    _, got = fed(enabled(family, cache_dtype, sizes, **options), *ids.split([20, 1, 22], dim=1))
    assert_agrees(got, want, whole)


@pytest.mark.parametrize(("family", "cache_dtype"), FAMILIES)
def test_the_contract_of_streams(family, cache_dtype):
    """One call, chunks and single tokens; rollback and replay; forks and rows."""
    model, ids = enabled(family, cache_dtype), random_ids(2, 40)
    cache, want = fed(model, ids)
    assert cache.layers[0].ring.cache_dtype == cache_dtype
    full_cache, whole = fed(sinkattn.enable(build(family), S, W, R), ids)
    assert cache.nbytes < 0.6 * full_cache.nbytes  # of float32, and few elements for each scale
    for calls in ([7, 1, 1, 20, 11], [1] * 40):
        assert_agrees(fed(model, *ids.split(calls, dim=1))[1], want, whole)
    fork, kept = copy.deepcopy(cache), contents(cache)
    new = random_ids(2, R, seed=1)
    logits = feed(model, fork, new)
    assert contents(cache) == kept
    if not cache.has_states:
        written = contents(fork)
        fork.crop(-R)
        feed(model, fork, random_ids(2, R, seed=2))
        fork.crop(-R)
        assert torch.equal(feed(model, fork, new), logits)
        assert contents(fork) == written
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 0]))
    for row in feed(model, cache, new[1:].expand(3, -1)):
        torch.testing.assert_close(row, logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "cache_dtype"), [("gpt_oss", "int8"), ("falcon_h1", "fp8")])
def test_saved_streams_go_on_bit_for_bit(family, cache_dtype, tmp_path):
    model, path = enabled(family, cache_dtype), tmp_path / "stream"
    cache, _ = fed(model, random_ids(2, 30))
    cache.save(path)
    loaded, new = sinkattn.load_stream(model, path), random_ids(2, 64, seed=1)
    assert torch.equal(feed(model, loaded, new), feed(model, cache, new))
    assert contents(loaded) == contents(cache)
    others = {None: "None", "int8": "int8", "fp8": "fp8"}
    del others[cache_dtype]
    for other, name in others.items():
        with pytest.raises(ValueError, match=f"path: cache_dtype: expected {name}, .* got {cache_dtype}$"):
            sinkattn.load_stream(enabled(family, other), path)


def test_a_file_is_as_large_as_its_cache(tmp_path):
    model = enabled("llama", "int8", (4, 1000, 20), head_dim=64, max_position_embeddings=2048)
    cache, _ = fed(model, random_ids(4, 1))
    cache.save(tmp_path / "stream")
    assert cache.nbytes == 4 * 2 * 2 * 2 * (1020 * (64 + 4) + 4 * 64 * 4)  # rows, layers, heads; keys and values
    assert (tmp_path / "stream").stat().st_size < 1.01 * cache.nbytes


def test_sinks_of_a_saved_stream_are_converted_to_another_dtype(tmp_path):
    cache, _ = fed(enabled("llama", "int8"), random_ids(1, 30))
    cache.save(tmp_path / "stream")
    half = enabled("llama", "int8", dtype=torch.bfloat16)
    loaded = sinkattn.load_stream(half, tmp_path / "stream", accept=("dtype",))
    want, got = (each.layers[0].ring.tensors for each in (cache, loaded))
    for name, x in want.items():
        assert torch.equal(got[name], x.to(torch.bfloat16) if name.startswith("sink_") else x), name
    assert feed(half, loaded, random_ids(1, 3)).isfinite().all()


def test_ways_to_generate():
    model = enabled("llama", "int8")
    ids = random_ids(2, 20)
    greedy = model.generate(ids, max_new_tokens=20, do_sample=False)
    drafted = model.generate(ids[:1], max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=R)
    assert torch.equal(drafted, greedy[:1])
    cache = sinkattn.SinkCache(model)
    best = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, cache=cache)
    _, want = fed(model, best)
    torch.testing.assert_close(feed(model, cache, best[:, -1:])[:, -1], want[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_decode_step():
    ids = random_ids(1, 40).split([3] + [1] * 37, dim=1)
    whole, want, got = (
        fed(sinkattn.enable(build("llama"), S, W, **options), *ids)[1]
        for options in ({}, {"cache_dtype": "fp8"}, {"cache_dtype": "fp8", "compile": True})
    )
    assert_agrees(got, want, whole)


@pytest.mark.parametrize(("tokens", "cache_dtype"), [(2, "int8"), (3, "fp8"), (30, "int8"), (30, "fp8")])
def test_what_captured_steps_compare_and_erase(tokens, cache_dtype):
    """The newest token is a sink, the first in the ring, or has overwritten another one; windows have no sinks."""
    model = enabled("gemma3_text", cache_dtype)
    cache, _ = fed(model, random_ids(2, tokens + 1))
    rings = [(layer.ring, layer.layout) for layer in cache.layers]
    assert {layout.num_sinks for _, layout in rings} == {0, S}
    assert len(ring_addresses(cache)[0]) == 8
    written = [{name: x.clone() for name, x in ring.tensors.items()} for ring, _ in rings]
    cache.rollback(1)  # as within the step
    want = newest_tokens(cache)
    assert _compare(newest_tokens(cache), want) == (True, True)
    erase_newest_tokens(cache, torch.tensor([1, 0]))
    assert _compare(newest_tokens(cache), want) == (True, False)
    for (ring, layout), tensors in zip(rings, written, strict=True):
        is_sink = tokens < layout.num_sinks
        slot = tokens if is_sink else (tokens - layout.num_sinks) % layout.ring
        for name, x in tensors.items():
            if name.startswith("sink_") == is_sink:
                assert x[0, :, slot].float().any()
                x[0, :, slot] = 0
            assert torch.equal(ring.tensors[name].float(), x.float()), name


def test_the_cache_dtype_is_that_of_all_caches_of_a_model():
    model = build("llama")
    sinkattn.enable(torch.compile(model), S, W, cache_dtype="fp8")
    cache, _ = fed(model, random_ids(1, 3))
    assert [layer.ring.cache_dtype for layer in cache.layers] == ["fp8", "fp8"]
    sinkattn.disable(model)
    cache, _ = fed(sinkattn.enable(model, S, W), random_ids(1, 3))
    assert [layer.ring.cache_dtype for layer in cache.layers] == [None, None]


@pytest.mark.parametrize(
    ("build_options", "options", "error", "message"),
    [
        (
            {},
            {"cache_dtype": "int4"},
            ValueError,
            r"cache_dtype: expected one of \('int8', 'fp8'\), or None, got 'int4'",
        ),
        (
            {"dtype": torch.float64},
            {},
            ValueError,
            "cache_dtype: expected None for a model in torch.float64, got 'int8'",
        ),
        ({"family": "gpt2"}, {}, UnsupportedModelError, "with absolute positions has no rings, .* cache_dtype='int8'"),
    ],
)
def test_what_is_refused(build_options, options, error, message):
    model = build(**{"family": "llama", **build_options})
    with pytest.raises(error, match=message):
        sinkattn.enable(model, S, W, **{"cache_dtype": "int8", **options})
    assert get_patch(model) is None


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(sinkattn.ops, "select_backend", lambda *_: "triton")
    monkeypatch.setattr(sinkattn.ops, "lacks_fp8", lambda device: True)
    model = build("llama")
    with pytest.raises(ValueError, match=r"cache_dtype: expected 'int8' on cpu, .* capability 8.9 for fp8, got 'fp8'"):
        sinkattn.enable(model, cache_dtype="fp8")
    assert get_patch(model) is None


def test_gradients_are_refused_before_anything_is_written():
    model = enabled("llama", "int8")
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 3)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM: has no gradients with cache_dtype='int8'; call it under"):
        model(ids, cache=cache)
    assert cache.tokens_seen == 0
    model.requires_grad_(False)(ids, cache=cache)  # nothing is recorded
    assert cache.tokens_seen == 3
    for learner in (OnlineLearner, BackgroundLearner):
        with pytest.raises(ValueError, match=r"model: expected one that was enabled without cache_dtype, got .*'int8'"):
            learner(model, learn="all")
