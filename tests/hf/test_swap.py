"""`enable` and `disable`: the outputs of an enabled model, and a model that is restored exactly."""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from functools import cache

import families
import pytest
import torch
from hf_models import build, enabled, random_ids
from measures import rms_error
from transformers import (
    DynamicCache,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sinkattn
from sinkattn.hf import UnsupportedModelError
from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.reference import visible

S, W = 4, 28


def stream(model, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache, parts, start = sinkattn.SinkCache(model), [], 0
    for chunk in chunks:
        parts.append(model(input_ids=ids[:, start : start + chunk], cache=cache).logits)
        start += chunk
    assert start == ids.shape[1]
    return torch.cat(parts, dim=1)


def without_sink_rotation(monkeypatch) -> None:
    """Negative control: rotate queries for sink keys as for window keys."""
    tables = sinkattn.Rope.stream_tables
    monkeypatch.setattr(
        sinkattn.Rope,
        "stream_tables",
        lambda *args, **kwargs: tuple(table[[0, 0]] for table in tables(*args, **kwargs)),
    )


@torch.no_grad()
@pytest.mark.parametrize(("family", "groups"), [("llama", 1), ("gemma2", 2), ("gemma3_text", 2), ("gpt_oss", 2)])
def test_rotary_tables_are_computed_once_per_forward_and_layer_group(family, groups, monkeypatch):
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if groups == 2 else {}
    model, computed = sinkattn.enable(families.build(family, num_hidden_layers=4, **mixed), 4, 12), []
    tables = sinkattn.Rope.stream_tables
    monkeypatch.setattr(sinkattn.Rope, "stream_tables", lambda *a, **k: computed.append(1) or tables(*a, **k))
    cache = sinkattn.SinkCache(model)
    for tokens in (7, 1, 1):
        computed.clear()
        model(random_ids(1, tokens), cache=cache)
        assert len(computed) == groups
    assert len(cache.layers) > groups


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_short_input_equals_the_unpatched_model(family, dtype):
    model, ids = build(family, dtype), random_ids(2, S + W)
    want = model(ids).logits
    got = sinkattn.enable(model, S, W)(ids).logits
    # The model's own angles are fp32 whatever its dtype.
    assert rms_error(got, want) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks", [[1] * 300, [7] * 42 + [6], [64] * 4 + [44], [30, 1, 100, 3, 2, 150, 14]], ids=["1", "7", "64", "mixed"]
)
def test_the_cut_into_calls_does_not_matter(family, chunks):
    model, ids = enabled(family, S, W), random_ids(2, 300)
    exact = exact_logits(family)
    one_call = model(ids).logits
    rounding = rms_error(one_call, exact)
    assert rounding < 2e-6
    assert rms_error(stream(model, ids, chunks), exact) <= 2 * rounding


@cache
def exact_logits(family: str) -> torch.Tensor:
    """Logits of the stream above, by the model in fp64."""
    return sinkattn.enable(build(family, torch.float64), S, W)(random_ids(2, 300)).logits


@torch.no_grad()
def test_one_layer_equals_the_unpatched_model_on_gathered_tokens(family, monkeypatch):
    model, ids = build(family, num_hidden_layers=1), random_ids(2, 300)
    tokens = [0, 3, 4, 31, 32, 33, 59, 60, 61, 100, 251, 299]
    want = torch.stack([model(ids[:, visible(token, S, W)]).logits[:, -1] for token in tokens], dim=1)
    sinkattn.enable(model, S, W)
    assert rms_error(model(ids).logits[:, tokens], want) < 4e-6
    without_sink_rotation(monkeypatch)
    assert rms_error(model(ids).logits[:, tokens], want) > 1e-2


@torch.no_grad()
def test_without_sinks_equals_the_unpatched_model_under_a_sliding_mask(family):
    if family == "mistral":
        model = build(family, sliding_window=None)
    else:
        model = build(family)
    ids, length = random_ids(2, 200), 200
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.where((distance >= 0) & (distance < W), 0.0, torch.finfo(torch.float32).min)
    want = model(ids, attention_mask=mask.expand(2, 1, length, length)).logits
    got = sinkattn.enable(model, 0, W)(ids).logits
    # The unpatched model's angles are in fp32, with an error of 2e-5 at position 200.
    assert rms_error(got, want) < 5e-5
    sinkattn.disable(model)
    assert rms_error(sinkattn.enable(model, 0, W - 1)(ids).logits, want) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_like_the_unpatched_model(family, dtype):
    exact_model, ids = build(family, torch.float64), random_ids(2, S + W)
    exact, model = exact_model(ids).logits, build(family, dtype)
    own = rms_error(model(ids).logits, exact)
    sinkattn.enable(model, S, W)
    assert rms_error(model(ids).logits, exact) <= 2 * own
    long_ids = random_ids(2, 300)
    long_exact = sinkattn.enable(exact_model, S, W)(long_ids).logits
    assert rms_error(stream(model, long_ids, [1] * 40 + [7] * 30 + [50]), long_exact) <= 2 * own


@torch.no_grad()
def test_the_reference_backend_agrees(family, monkeypatch):
    model, ids = build(family, torch.float64), random_ids(2, 60)
    got = sinkattn.enable(model, S, W)(ids).logits
    sinkattn.disable(model)
    want = sinkattn.enable(model, S, W, backend="reference")(ids).logits
    assert rms_error(got, want) < 1e-12


@torch.no_grad()
def test_disable_restores_everything(family):
    model, ids = build(family), random_ids(2, 40)
    plain = model(ids).logits

    def snapshot():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return (
            model.config.to_dict(),
            model.config._attn_implementation,
            [sorted(m.__dict__) for m in model.modules()],
            hooks,
        )

    before = snapshot()
    assert sinkattn.enable(model, S, W) is model
    assert snapshot() != before
    model(ids)
    assert sinkattn.disable(model) is model
    assert snapshot() == before
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="not enabled"):
        sinkattn.disable(model)


@torch.no_grad()
def test_models_do_not_share_anything():
    streaming, plain = build("llama"), build("llama")
    ids = random_ids(1, 60)
    want = plain(ids).logits
    sinkattn.enable(streaming, S, W)
    assert torch.equal(plain(ids).logits, want)
    other = sinkattn.enable(build("llama", seed=1), S, W)
    with pytest.raises(ValueError, match="made for another model"):
        other(ids, cache=sinkattn.SinkCache(streaming))


@torch.no_grad()
@pytest.mark.parametrize("of", ["llama", "gpt_neox", "falcon", "gpt2"])
def test_models_that_share_a_configuration_do_not_share_the_swap(of):
    model, ids = families.build(of), random_ids(1, 30)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    want = other(ids).logits
    sinkattn.enable(model, S, W)
    assert torch.equal(other(ids).logits, want)
    sinkattn.enable(other, S, W)
    sinkattn.disable(model)
    assert rms_error(other(ids).logits, want) < 2e-6
    sinkattn.disable(other)
    assert torch.equal(model(ids).logits, want)
    assert torch.equal(other(ids).logits, want)


@torch.no_grad()
def test_a_deep_copy_streams_by_itself():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 60)
    want = model(ids).logits
    twin = copy.deepcopy(model)
    sinkattn.disable(model)
    assert torch.equal(twin(ids).logits, want)
    assert twin.generate.args == (twin,)
    sinkattn.disable(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_settings_are_checked_and_the_model_is_left_alone():
    model = build("llama")
    keys = sorted(model.__dict__)
    for arguments, message in [
        ({"num_sinks": -1}, "num_sinks: expected 0 or more"),
        ({"window": 0}, "window: expected 1 or more"),
        ({"headroom": -1}, "headroom: expected 0 or more"),
        ({"num_sinks": 4, "window": 509}, "must not exceed the 512 positions it was trained for, got 513"),
        ({"window": 28, "backend": "fast"}, "backend: expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            sinkattn.enable(model, **arguments)
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        sinkattn.enable(torch.nn.Linear(2, 2))
    assert sorted(model.__dict__) == keys
    sinkattn.enable(model, S, W)
    with pytest.raises(ValueError, match="is enabled already"):
        sinkattn.enable(model, S, W)


def test_unsupported_models_are_refused_and_left_alone():
    sizes = {"vocab_size": 97, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 64}
    config = RoFormerConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    roformer = RoFormerForCausalLM(config).eval()
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    narrow = build("mistral", sliding_window=16)
    with torch.device("meta"):
        meta = build("llama")
    for model, message in [
        (roformer, "none of its modules calls transformers' attention function"),
        (t5, "encoder-decoder"),
        (narrow, "layer 0 sees a window of 16 tokens; num_sinks .* must not exceed it, got 32"),
        (meta, "on one device, loaded, got .*'meta'"),
    ]:
        keys, implementation = sorted(model.__dict__), model.config._attn_implementation
        with pytest.raises(UnsupportedModelError, match=message):
            sinkattn.enable(model, S, W)
        assert sorted(model.__dict__) == keys
        assert model.config._attn_implementation == implementation


def test_a_model_that_differs_on_a_short_input_is_refused_and_restored(monkeypatch):
    model, ids = build("llama"), random_ids(1, 20)
    with torch.no_grad():
        want = model(ids).logits
    attend = sinkattn.ops.sink_attention_
    monkeypatch.setattr(sinkattn.ops, "sink_attention_", lambda *a, **k: attend(*a, **{**k, "scale": 2 * k["scale"]}))
    with pytest.raises(UnsupportedModelError, match="differs from the original"):
        sinkattn.enable(model, S, W)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_calls_that_would_be_wrong_are_refused():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 10)
    with pytest.raises(ValueError, match="expected at least one token that the cache has not seen"):
        model(ids[:, :0])
    for kwargs, error, message in [
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"cache": DynamicCache()}, TypeError, "expected a sinkattn.SinkCache or None, got DynamicCache"),
        (
            {"attention_mask": torch.ones(2, 1, 10, 10)},
            ValueError,
            r"expected \[2, 10\], or None, got \[2, 1, 10, 10\]",
        ),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, r"expected \[2, 10\], or None, got \[2, 3\]"),
        (
            {"position_ids": torch.arange(5, 15)[None]},
            ValueError,
            "position_ids: expected consecutive positions from \\[0\\] on",
        ),
        ({"position_ids": torch.zeros(3, 2, 10)}, ValueError, r"position_ids: expected \[batch, 10\]"),
    ]:
        with pytest.raises(error, match=message):
            model(ids, **kwargs)
    for flag, message in [
        ("output_attentions", "expected False, got True; sinkattn never forms attention weights"),
        ("output_hidden_states", "was changed in the model's configuration after sinkattn.enable"),
    ]:
        setattr(model.config, flag, True)
        with pytest.raises(ValueError, match=f"{flag}: {message}"):
            model(ids)
        setattr(model.config, flag, False)
    assert model(ids, attention_mask=torch.ones(2, 10)).logits.shape == (2, 10, 97)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 32)
    with pytest.raises(RuntimeError, match="run only as part of the model"):
        attention(hidden, model.model.rotary_emb(hidden, torch.arange(3)[None]))
    by_hand = build("llama")
    by_hand.set_attn_implementation("sinkattn")
    with pytest.raises(RuntimeError, match=r"is set by sinkattn\.enable"):
        by_hand(ids)


@torch.no_grad()
def test_dropout_in_training_mode_is_refused():
    model = sinkattn.enable(build("llama", attention_dropout=0.1), S, W)
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)"):
        model.train()(random_ids(1, 5))
    assert model.eval()(random_ids(1, 5)).logits.isfinite().all()


@torch.no_grad()
def test_enable_keeps_every_module_in_its_mode():
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sinkattn.enable(model, S, W)
    assert [module.training for module in model.modules()] == modes


@torch.no_grad()
def test_a_mask_over_the_past_is_read():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 8)
    cache = sinkattn.SinkCache(model)
    model(ids[:, :6], cache=cache)
    with pytest.raises(ValueError, match="attention_mask: expected 1 in row 0, column 2, as when that column was fed"):
        model(ids[:, 6:7], cache=cache, attention_mask=torch.tensor([[1, 1, 0, 0, 0, 1, 1]]))
    model(ids[:, 6:7], cache=cache, attention_mask=torch.ones(1, 7), position_ids=torch.tensor([[6]]))
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_threads_and_nested_forwards_keep_apart():
    model, ids, other = sinkattn.enable(build("llama"), S, W), random_ids(1, 40), random_ids(1, 7, seed=3)
    want, want_other = model(ids).logits, model(other).logits
    cache, inside, leave, nested = sinkattn.SinkCache(model), threading.Event(), threading.Event(), []

    def pause(*args):
        if threading.current_thread() is worker:
            inside.set()
            leave.wait(10)
        elif not nested:
            nested.append(None)
            nested[0] = model(other).logits

    results = []
    worker = threading.Thread(target=lambda: results.append(torch.no_grad()(model)(ids, cache=cache).logits))
    handle = model.model.layers[0].register_forward_hook(pause)
    worker.start()
    inside.wait(10)
    assert torch.equal(model(other).logits, want_other)
    with pytest.raises(RuntimeError, match="in the middle of a forward already"):
        model(ids, cache=cache)
    leave.set()
    worker.join()
    handle.remove()
    assert torch.equal(results[0], want)
    assert torch.equal(nested[0], want_other)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_models_can_be_saved_whole_and_do_not_keep_caches_alive(tmp_path):
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 60)
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=40, do_sample=False), want)
    gc.collect()
    gc.disable()
    try:
        cache = sinkattn.SinkCache(model)
        model(ids, cache=cache)
        alive = weakref.ref(cache.layers[0].keys)
        del cache
        assert alive() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_generate_of_the_instance_comes_back():
    model = build("llama")
    own = model.generate = lambda: None
    sinkattn.disable(sinkattn.enable(model, S, W))
    assert model.generate is own


@pytest.mark.parametrize(("num_sinks", "window"), [(0, 1), (1, 1), (0, 2)])
def test_a_tiny_layout_hides_nothing(num_sinks, window):
    """Jamba restarts its state in a call of several tokens, which a trial with a single visible token cannot detect."""
    with pytest.raises(UnsupportedModelError, match="does not continue from its own cache"):
        sinkattn.enable(families.build("jamba"), num_sinks, window)
    model, ids = build("llama"), random_ids(1, 30)
    with torch.no_grad():
        last = model(ids[:, -1:]).logits[:, -1] if num_sinks + window == 1 else None
        got = sinkattn.enable(model, num_sinks, window)(ids).logits[:, -1]
    assert last is None or torch.allclose(got, last, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("family", "kinds"), [("llama", 1), ("gpt_neox", 1), ("gemma3_text", 2)])
def test_layers_that_rotate_alike_share_their_tables(family, kinds, monkeypatch):
    options = {"num_hidden_layers": 4}
    if family == "gemma3_text":
        options["layer_types"] = ["sliding_attention", "full_attention"] * 2
    model = (build if kinds == 1 else families.build)(family, **options)
    sinkattn.enable(model, 4, 12)
    calls, tables = [], sinkattn.Rope.stream_tables
    monkeypatch.setattr(
        sinkattn.Rope, "stream_tables", lambda *args, **kwargs: calls.append(None) or tables(*args, **kwargs)
    )
    model(random_ids(1, 20))
    assert len(calls) == kinds


def held(model) -> list:
    """Buffers and plain attributes of all modules."""
    return [
        (name, x.clone() if isinstance(x, torch.Tensor) else x)
        for module in model.modules()
        for name, x in (*sorted(module.__dict__.items()), *module._buffers.items())
        if isinstance(x, (bool, int, float, torch.Tensor))
    ]


def assert_same(got: list, want: list) -> None:
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, x), (_, y) in zip(got, want, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_a_long_input_has_changed_are_kept(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    model = build("llama", rope_parameters=rope, max_position_embeddings=64 if rope_type == "dynamic" else 256)
    short = held(model)
    model(random_ids(1, 200))
    long = held(model)
    assert str(short) != str(long)
    sinkattn.disable(sinkattn.enable(model, S, W))
    assert_same(held(model), long)
    with pytest.raises(UnsupportedModelError, match="must not exceed the 64 positions"):
        sinkattn.enable(model, S, 64)
    model.model.layers[1].self_attn.is_causal = False
    long = held(model)
    with pytest.raises(UnsupportedModelError, match="layer 1 is not causal"):
        sinkattn.enable(model, S, W)
    assert_same(held(model), long)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("persistent", [True, False])
def test_what_modules_count_is_put_back(family, persistent):
    model = build(family)
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    block.register_buffer("moved", torch.zeros(3), persistent=persistent)
    block.calls, block.last = 1, None

    def count(module, args, output):
        module.calls += 1
        module.moved += 1
        module.last = module.newest = torch.ones(2)

    block.register_forward_hook(count)
    before = held(model)
    with nullcontext() if family == "gpt2" else pytest.raises(UnsupportedModelError, match="state in its modules"):
        sinkattn.disable(sinkattn.enable(model, S, W))
    assert_same(held(model), before)
    assert block.last is None
    assert ("moved" in "".join(model.state_dict())) == persistent


def test_an_interrupted_enable_leaves_nothing_behind(monkeypatch):
    model = build("llama")
    keys = [sorted(module.__dict__) for module in model.modules()]
    put = ModelPatch.set_attribute

    def interrupt(self, module, name, value):
        if name == "config" and type(self) is RingPatch:
            raise KeyboardInterrupt
        put(self, module, name, value)

    monkeypatch.setattr(ModelPatch, "set_attribute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sinkattn.enable(model, S, W)
    assert [sorted(module.__dict__) for module in model.modules()] == keys
    assert not model.model.rotary_emb._forward_hooks
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread_of_weights", [0.05, 0.15])
def test_weighted_norms_after_the_rotation_are_refused_in_any_dtype(dtype, spread_of_weights):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = HunYuanDenseV1Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = HunYuanDenseV1ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * spread_of_weights
    with pytest.raises(UnsupportedModelError, match="in a way that is not a known rotary embedding"):
        sinkattn.enable(model.to(dtype), 4, 12)


def test_a_sliding_window_in_the_mask_alone_is_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = PhimoeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=10, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="layer 0 sees a window of 10 tokens"):
        sinkattn.enable(PhimoeForCausalLM(config).eval(), 4, 12)
