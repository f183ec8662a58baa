"""The trial of `enable` accepts deep models in half precision and refuses attention that is off by one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import families
import pytest
import torch
from hf_models import build, random_ids
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import eager_attention_forward

import sinkattn
from sinkattn import ops
from sinkattn.hf import UnsupportedModelError
from sinkattn.hf.reencode import lanes
from sinkattn.hf.trial.agreement import MAX_FP32_ERROR, AttentionRecord, relative_error

S, W = 4, 28
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def deep(family: str, dtype: torch.dtype, layers: int = 12):
    """A model as deep as pretrained ones, with two channels of the residual stream 30 times larger than the others."""
    model = build(family, num_hidden_layers=layers)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :2] *= 30
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 3
            if name.endswith(("down_proj.weight", "mlp.c_proj.weight")):
                parameter[:2] *= 30
    return model.to(dtype)


def relative_rounding(model, exact) -> float:
    with torch.no_grad():
        return relative_error(model(random_ids(2, 8)).logits, exact(random_ids(2, 8)).logits)


def a_window_too_short(monkeypatch) -> None:
    attend = ops.sink_attention_
    monkeypatch.setattr(ops, "sink_attention_", lambda *a, **k: attend(*a, **{**k, "window": k["window"] - 1}))


def queries_one_position_on(monkeypatch) -> None:
    tables = sinkattn.Rope.stream_tables

    def shifted(rope, seen, tokens, **options):
        here, there = (tables(rope, seen + ahead, tokens, **options) for ahead in (0, 1))
        return tuple(torch.stack((x[0], y[1])) for x, y in zip(here, there, strict=True))  # only for sink keys

    monkeypatch.setattr(sinkattn.Rope, "stream_tables", shifted)


def positions_that_end_too_early(monkeypatch) -> None:
    tables = sinkattn.Rope.stream_tables
    monkeypatch.setattr(
        sinkattn.Rope,
        "stream_tables",
        lambda *args, window, **options: tables(*args, window=window - 1, **options),
    )


FAULTS: dict[str, Callable] = {
    fault.__name__: fault for fault in (a_window_too_short, queries_one_position_on, positions_that_end_too_early)
}


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_deep_models_with_outliers_are_taken_in_half_precision(family, dtype):
    model = deep(family, dtype)
    # The original's rounding changes its outputs so much that a bound on outputs could not detect a fault.
    assert relative_rounding(model, deep(family, torch.float32)) > 8 * torch.finfo(dtype).eps or family == "gpt2"
    sinkattn.enable(model, S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("layers", [2, 12])
def test_one_token_off_is_refused_in_any_dtype(layers, fault, dtype, monkeypatch):
    model = deep("llama", dtype, layers)
    sinkattn.disable(sinkattn.enable(model, S, W))
    fault(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"patched model differs from the original by .* in the attention"):
        sinkattn.enable(model, S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_model_that_rotates_one_position_off_is_refused_in_any_dtype(dtype, monkeypatch):
    """Nearly all of the norm is in a pair that hardly turns, so a wrong angle would not show over all channels."""
    model = build("llama", num_hidden_layers=2, head_dim=16)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.unflatten(0, (-1, 2, 8))[:, :, :7] /= 300
    sinkattn.disable(sinkattn.enable(model.to(dtype), S, W))
    rotate = modeling_llama.apply_rotary_pos_emb

    def off(q, k, cos, sin, **options):
        ahead = (torch.roll(x, -1, dims=1) for x in (cos, sin))
        return rotate(q, k, *ahead, **options)[0], rotate(q, k, cos, sin, **options)[1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", off)
    with pytest.raises(UnsupportedModelError, match="in a way that is not a known rotary embedding"):
        sinkattn.enable(model, S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_context_that_begins_one_token_off_is_refused(dtype, monkeypatch):
    model = deep("gpt2", dtype)
    segments = lanes.Lane.segments

    def off(lane, new):
        for segment in segments(lane, new):
            ids = segment.ids
            if segment.first_position and ids.shape[1] > segment.num_new:
                ids = torch.cat((ids[:, 1:2], ids[:, 1:]), dim=1)
            yield segment._replace(ids=ids)

    monkeypatch.setattr(lanes.Lane, "segments", off)
    with pytest.raises(UnsupportedModelError, match="the patched model differs from the original"):
        sinkattn.enable(model, S, W)


@pytest.mark.parametrize(
    "head", [LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
def test_any_head_streams(head):
    plain = build("llama")
    model = head(plain.config).eval()
    model.base_model.load_state_dict(plain.model.state_dict())
    ids = random_ids(1, 50)
    sinkattn.enable(plain, S, W)
    sinkattn.enable(model, S, W)
    cache = sinkattn.SinkCache(model)
    with torch.no_grad():
        want = plain.model(ids).last_hidden_state[:, -5:]
        for part in ids.split(45, dim=1):
            got = model(part, cache=cache, output_hidden_states=True)
    torch.testing.assert_close(got.hidden_states[-1], want)


def test_values_that_are_not_finite_are_the_models_own():
    model = build("llama").to(torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(UnsupportedModelError, match=r"in torch\.float16 its own values in layer 1 are not finite"):
        sinkattn.enable(model, S, W)


def twice_the_scale(module, query, key, value, mask, scaling, **options):
    return eager_attention_forward(module, query, key, value, mask, scaling=2 * scaling, **options)


def softcapped(module, query, key, value, mask, scaling, dropout=0.0, softcap=None, **options):
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scaling
    weights = ((scores / softcap).tanh() * softcap + mask).softmax(dim=-1)
    out = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return out.transpose(1, 2).contiguous(), weights


class OwnAttention(modeling_llama.LlamaAttention):
    """Like models with custom code, which pass an attention function of their own as the default."""

    function: Callable
    options: ClassVar = {}

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **options):
        cache = next((options.pop(name) for name in ("cache", "past_key_values") if name in options), None)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, type(self).function)
        out, weights = function(self, query, key, value, attention_mask, scaling=self.scaling, **self.options)
        return self.o_proj(out.flatten(2)), weights


class Doubled(OwnAttention):
    function = staticmethod(twice_the_scale)


class Capped(OwnAttention):
    function = staticmethod(softcapped)
    options: ClassVar = {"softcap": 2.0}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_model_is_compared_in_its_own_attention_function(dtype):
    """A change inside the function is detected; one by an argument that sinkattn applies is accepted."""
    for attention, right in ((Doubled, False), (Capped, True)):
        model = build("llama", dtype)
        for layer in model.model.layers:
            layer.self_attn.__class__ = attention
        if right:
            sinkattn.enable(model, S, W)
        else:
            with pytest.raises(UnsupportedModelError, match="patched model differs from the original"):
                sinkattn.enable(model, S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_model_is_compared_in_the_function_that_is_registered_for_it(dtype):
    AttentionInterface.register("twice_the_scale", twice_the_scale)
    AttentionMaskInterface.register("twice_the_scale", eager_mask)
    model = build("llama", dtype)
    model.set_attn_implementation("twice_the_scale")
    with pytest.raises(UnsupportedModelError, match="patched model differs from the original"):
        sinkattn.enable(model, S, W)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_fault_in_half_precision_alone_is_refused(family, dtype, monkeypatch):
    attend = ops.sink_attention_

    def off(keys, values, query, *args, scale, **options):
        return attend(keys, values, query, *args, scale=scale * (1 + (query.dtype == dtype)), **options)

    monkeypatch.setattr(ops, "sink_attention_", off)
    with pytest.raises(UnsupportedModelError, match="patched model differs from the original"):
        sinkattn.enable(families.build(family, dtype), S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_fault_in_a_decode_step_alone_is_refused(dtype, monkeypatch):
    attend = ops.sink_attention_

    def off(keys, values, query, *args, scale, **options):
        return attend(keys, values, query, *args, scale=scale * (1 + (query.shape[2] == 1)), **options)

    monkeypatch.setattr(ops, "sink_attention_", off)
    with pytest.raises(UnsupportedModelError, match="patched model differs from the original"):
        sinkattn.enable(build("llama", dtype), S, W)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_neither_a_large_residual_nor_other_heads_hide_a_fault(dtype, monkeypatch):
    bloom, llama = families.build("bloom", dtype), build("llama", dtype)
    with torch.no_grad():
        bloom.transformer.word_embeddings_layernorm.weight *= 300
        for layer in llama.model.layers:
            layer.self_attn.v_proj.weight[: layer.self_attn.head_dim] /= 3000
    attend = ops.sink_attention_

    def first_heads_turned(keys, values, query, *args, **options):
        signs = torch.where(torch.arange(query.shape[1]) < query.shape[1] // keys.shape[1], -1, 1).to(query.dtype)
        return attend(keys, values, query * signs[:, None, None], *args, **options)

    monkeypatch.setattr(ops, "sink_attention_", first_heads_turned)
    for model in (bloom, llama):
        with pytest.raises(UnsupportedModelError, match="patched model differs from the original"):
            sinkattn.enable(model, S, W)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_trial_leaves_no_trace(implementation):
    model = build("llama", attn_implementation=implementation)
    keys = [sorted(module.__dict__) for module in model.modules()]
    state, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    sinkattn.disable(sinkattn.enable(model, S, W))
    assert [sorted(module.__dict__) for module in model.modules()] == keys
    assert model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_records_keep_what_came_first_and_measure_what_differs():
    record, module, x = AttentionRecord(), torch.nn.Identity(), torch.randn(2, 8, 3)
    for record.first_token in (0, 4):
        record.num_tokens = 4
        seen = record.first_token + 4
        assert record.record_or_replay_with_past(module, "keys", x[:, :seen]).shape[1] == seen
    record.end_recording()
    record.first_token, record.num_tokens = 4, 4
    assert torch.equal(record.record_or_replay_with_past(module, "keys", x[:, 4:] * 1.5), x[:, 4:])
    assert record.errors[module, "keys"] == pytest.approx(0.5)
    record.first_token, record.num_tokens = 0, 8
    assert torch.equal(record.record_or_replay(module, "keys", x), x)
    record.pop_errors()
    assert not record.errors


def test_relative_errors():
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(x * (1 + MAX_FP32_ERROR), x) == pytest.approx(MAX_FP32_ERROR, rel=1e-3)
    assert relative_error(torch.tensor([3.0, torch.nan]), x) == torch.inf
    assert relative_error(x, torch.zeros(2)) == torch.inf
