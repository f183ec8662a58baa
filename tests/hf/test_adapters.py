"""Families with an adapter: Falcon, MPT, BLOOM, GPT-J, CodeGen, GPT-NeoX-Japanese."""

import copy

import pytest
import torch
from hf_models import VOCABULARY, build_model, random_ids
from measures import rms_error
from test_generate import greedy
from test_swap import stream, without_sink_rotation
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import sinkattn
from sinkattn.cli.info import model_facts
from sinkattn.hf import UnsupportedModelError
from sinkattn.hf.adapters import probe_by_adapter
from sinkattn.reference import visible

S, W = 4, 28
FALCON, MPT, BLOOM = (FalconForCausalLM, FalconConfig), (MptForCausalLM, MptConfig), (BloomForCausalLM, BloomConfig)
GPTJ, CODEGEN = (GPTJForCausalLM, GPTJConfig), (CodeGenForCausalLM, CodeGenConfig)
# Slopes for a number of heads that is not a power of two follow another formula.
SIX_HEADS = {"num_attention_heads": 6, "hidden_size": 48}
MHA = {"multi_query": False, "parallel_attn": False, "bias": True}
ALIBI = {**SIX_HEADS, "alibi": True, "attn_implementation": "sdpa", "max_position_embeddings": 16}
# Tables of sines that end soon after num_sinks + window.
SHORT_TABLE = {"rotary_dim": 4, "max_position_embeddings": 40}
VARIANTS = {
    "falcon-multi-query": (*FALCON, {}),
    "falcon-new": (
        *FALCON,
        {"new_decoder_architecture": True, "num_kv_heads": 2, "attn_implementation": "sdpa"},
    ),
    "falcon-all-heads": (*FALCON, MHA),
    "falcon-alibi": (*FALCON, {**ALIBI, **MHA}),
    "mpt": (*MPT, {**SIX_HEADS, "max_seq_len": 48}),
    "mpt-clip": (*MPT, {"max_seq_len": 48, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.6}}),
    "bloom": (*BLOOM, SIX_HEADS),
    "bloom-slices": (
        *BLOOM,
        {"pretraining_tp": 2, "slow_but_exact": True, "apply_residual_connection_post_layernorm": True},
    ),
    "gptj": (*GPTJ, SHORT_TABLE),
    "codegen": (*CODEGEN, SHORT_TABLE),
    "gpt_neox_japanese": (GPTNeoXJapaneseForCausalLM, GPTNeoXJapaneseConfig, {"max_position_embeddings": 40}),
}
HAVE_ALIBI = {name for name in VARIANTS if "alibi" in name or name.startswith(("mpt", "bloom"))}


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


def build(variant: str, dtype: torch.dtype = torch.float32, **overrides):
    model_class, config_class, options = VARIANTS[variant]
    return build_model(model_class, config_class, dtype, **{**options, **overrides})


@torch.no_grad()
def test_short_input_equals_the_unpatched_model(variant):
    model, ids = build(variant), random_ids(2, S + W)
    want = model(ids).logits
    assert rms_error(sinkattn.enable(model, S, W)(ids).logits, want) < 2e-6


@torch.no_grad()
def test_one_layer_equals_the_unpatched_model_on_gathered_tokens(variant, monkeypatch):
    model, ids = build(variant, num_hidden_layers=1), random_ids(2, 300)
    tokens = [0, 3, 4, 31, 32, 33, 60, 100, 251, 299]
    want = torch.stack([model(ids[:, visible(token, S, W)]).logits[:, -1] for token in tokens], dim=1)
    sinkattn.enable(model, S, W)
    assert rms_error(model(ids).logits[:, tokens], want) < 2e-6
    if variant in HAVE_ALIBI:
        for layer in model._sinkattn.probe_result.layers.values():
            layer.alibi_slopes = 2 * layer.alibi_slopes
    else:
        without_sink_rotation(monkeypatch)
    assert rms_error(model(ids).logits[:, tokens], want) > 1e-2


@torch.no_grad()
def test_the_cut_into_calls_does_not_matter(variant):
    model, ids = sinkattn.enable(build(variant), S, W), random_ids(2, 130)
    one_call = model(ids).logits
    for chunks in ([1] * 130, [7] * 18 + [4], [30, 1, 70, 3, 2, 24]):
        assert rms_error(stream(model, ids, chunks), one_call) < 2e-6


@torch.no_grad()
def test_greedy_equals_the_plain_loop(variant):
    model, ids = sinkattn.enable(build(variant), S, W), random_ids(2, 20)
    got = model.generate(ids, max_new_tokens=100, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 100))


@torch.no_grad()
def test_rows_with_padding_equal_rows_without(variant):
    model, ids = sinkattn.enable(build(variant), S, W), random_ids(3, 50)
    mask = torch.ones_like(ids)
    padding = (0, 9, 45)
    for row, length in enumerate(padding):
        ids[row, :length] = mask[row, :length] = 0
    got = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row, length in enumerate(padding):
        assert torch.equal(got[row : row + 1, length:], greedy(model, ids[row : row + 1, length:], 30))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_like_the_unpatched_model(variant, dtype):
    exact_model, ids, long_ids = build(variant, torch.float64), random_ids(2, S + W), random_ids(2, 150)
    exact, model = exact_model(ids).logits, build(variant, dtype)
    own = rms_error(model(ids).logits, exact)
    sinkattn.enable(model, S, W)
    assert rms_error(model(ids).logits, exact) <= 2 * own
    long_exact = sinkattn.enable(exact_model, S, W)(long_ids).logits
    assert rms_error(stream(model, long_ids, [1] * 10 + [7] * 12 + [56]), long_exact) <= 2 * own


class Sizes(TorchDispatchMode):
    """Record the shapes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        self.shapes += [tuple(x.shape) for x in outs if isinstance(x, torch.Tensor)]
        return out


@torch.no_grad()
def test_nothing_grows_with_the_stream_and_no_mask_is_made(variant):
    model, ids = sinkattn.enable(build(variant), S, W), random_ids(1, 700)
    cache, sizes = sinkattn.SinkCache(model), []
    for begin, end in ((0, 70), (70, 71), (71, 650), (650, 651)):  # after the prefix ids have been recorded
        with Sizes() as mode:
            model(ids[:, begin:end], cache=cache)
        sizes.append(mode.shapes)
    assert sizes[1] == sizes[3]
    linear = 4 * 48 * (579 + S + W)  # the widest layer, or the bias of a block of tokens for its visible keys
    assert max(torch.Size(shape).numel() for shape in sizes[2]) <= linear < 579**2


@torch.no_grad()
def test_disable_restores_everything(variant):
    model, ids = build(variant), random_ids(2, 40)
    plain = model(ids).logits

    def snapshot():
        states = [{name: id(x) for name, x in module.__dict__.items()} for module in model.modules()]
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
        return states, hooks, model.config.to_dict(), model.config._attn_implementation

    before = snapshot()
    sinkattn.enable(model, S, W)
    model(ids)
    twin = copy.deepcopy(model)
    sinkattn.disable(model)
    assert snapshot() == before
    assert torch.equal(model(ids).logits, plain)
    sinkattn.enable(model, S, W)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert torch.equal(sinkattn.disable(twin)(ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["falcon-multi-query", "mpt", "bloom", "gptj", "codegen"])
def test_a_model_that_shares_its_configuration_is_left_alone(variant):
    model, ids = build(variant), random_ids(1, 40)
    other = type(model)(model.config).eval()
    want = other(ids).logits
    sinkattn.enable(model, S, W)
    assert torch.equal(other(ids).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["falcon-new", "falcon-alibi", "codegen"])
def test_models_can_be_saved_whole(variant, tmp_path):
    model, ids = sinkattn.enable(build(variant), S, W), random_ids(1, 60)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["falcon-alibi", "mpt", "bloom"])
def test_with_alibi_any_window_is_taken(variant):
    model, ids = sinkattn.enable(build(variant), 4, 500), random_ids(1, 20)
    assert model(ids).logits.shape == (1, 20, VOCABULARY)


@pytest.mark.parametrize("variant", ["falcon-multi-query", "gptj", "codegen", "gpt_neox_japanese"])
def test_rotary_windows_end_with_the_trained_length(variant):
    model = build(variant, max_position_embeddings=40)
    with pytest.raises(UnsupportedModelError, match="must not exceed the 40 positions"):
        sinkattn.enable(model, 4, 37)
    sinkattn.enable(model, 4, 36)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("falcon-alibi", {"attention_dropout": 0.1}),
        ("mpt", {"attn_config": {"attn_pdrop": 1}}),
        ("bloom", {"attention_dropout": 0.1}),
        ("gptj", {"attn_pdrop": 0.1}),
        ("codegen", {"attn_pdrop": 0.1}),
        ("gpt_neox_japanese", {"attention_dropout": 0.1}),
    ],
)
def test_dropout_and_attention_weights_are_refused(variant, options):
    model, ids = sinkattn.enable(build(variant, **options), S, W), random_ids(1, 5)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(RuntimeError, match=r"dropout: expected 0 in attention; .* call model\.eval\(\)"):
        model.train()(ids)
    assert model.eval()(ids).logits.isfinite().all()


def test_eager_falcon_with_alibi_is_refused():
    model = build("falcon-alibi", attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match=r"only attn_implementation='sdpa' .* got 'eager'"):
        sinkattn.enable(model, S, W)


@torch.no_grad()
def test_falcon_keeps_one_key_for_each_group_of_queries():
    model = sinkattn.enable(build("falcon-new"), S, W)
    cache = sinkattn.SinkCache(model)
    model(random_ids(1, 3), cache=cache)
    assert cache.layers[0].keys.shape == (1, 2, S + W, 8)


@torch.no_grad()
def test_frequencies_of_short_inputs_are_taken():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model, ids = build("falcon-multi-query", rope_parameters=rope, max_position_embeddings=40), random_ids(1, 32)
    want = model(ids).logits
    model(random_ids(1, 100))  # stretches the frequencies
    assert rms_error(sinkattn.enable(model, S, W)(ids).logits, want) < 2e-6


def test_a_look_leaves_no_trace_and_info_names_alibi():
    model = build("mpt")
    keys = [sorted(module.__dict__) for module in model.modules()]
    probe_result = probe_by_adapter(model)
    assert [layer.index for layer in probe_result.layers.values()] == [0, 1]
    assert list(probe_result.adapter_forwards) == [block.attn for block in model.transformer.blocks]
    facts = model_facts(model, S, W)
    assert facts["rotary_by_layer"] == ["ALiBi"] * 2
    assert model_facts(build("gptj"), S, W)["rotary_by_layer"] == ["interleaved, 4 of 8 elements"] * 2
    assert [sorted(module.__dict__) for module in model.modules()] == keys
