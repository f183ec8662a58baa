"""The probe finds the rotary embedding and mask of each layer, and refuses models that it cannot explain."""

import pytest
import torch
from hf_models import build, random_ids
from transformers import CohereConfig, CohereForCausalLM

from sinkattn.hf import UnsupportedModelError, enable
from sinkattn.hf.probe.probe import probe


@pytest.mark.parametrize(
    ("family", "style", "rotary_dim"), [("llama", "half", 8), ("qwen3", "half", 16), ("gpt_neox", "half", 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conventions_are_found(family, style, rotary_dim, dtype):
    probe_result = probe(build(family, dtype))
    rotations = [layer.rotation for layer in probe_result.layers.values()]
    assert [(rope.style, rope.rotary_dim, offset) for rope, offset in rotations] == [(style, rotary_dim, 0)] * 2
    assert [layer.index for layer in probe_result.layers.values()] == [0, 1]


def test_scaling_is_found():
    layers = probe(build("llama-yarn")).layers.values()
    assert [round(layer.rotation.rope.scaling, 4) for layer in layers] == [
        1.1386,
        1.1386,
    ]  # 0.1 ln 4 + 1 (YaRN, equation 22)


def test_interleaved_rotary_is_found():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = CohereForCausalLM(CohereConfig(**sizes, num_attention_heads=4, pad_token_id=0, eos_token_id=1)).eval()
    assert [layer.rotation.rope.style for layer in probe(model).layers.values()] == ["interleaved"]


def test_sliding_windows_are_found():
    probe_result = probe(build("mistral"))
    assert [layer.mask for layer in probe_result.layers.values()] == [("window", 64)] * 2


def test_a_probe_leaves_no_trace():
    model, ids = build("llama"), random_ids(1, 20)
    with torch.no_grad():
        want = model(ids).logits
        hooks = [len(module._forward_hooks) for module in model.modules()]
        probe(model)
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert model.config._attn_implementation == "eager"
        assert torch.equal(model(ids).logits, want)


def spoil_rotation(monkeypatch):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def weighted(q, k, cos, sin, **kwargs):  # like a weighted norm after the rotation
        q, k = original(q, k, cos, sin, **kwargs)
        weight = torch.linspace(0.5, 1.5, q.shape[-1])
        return q * weight * (1 + cos[:, None] * 0.1), k * weight

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", weighted)


def test_an_unknown_rotation_is_refused(monkeypatch):
    spoil_rotation(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="layer 0 changes queries and keys by position"):
        enable(build("llama"), 4, 28)


def test_unknown_options_are_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        modeling_llama.LlamaAttention, "forward", lambda *args, **kwargs: forward(*args, **kwargs, position_bias=1.0)
    )
    with pytest.raises(UnsupportedModelError, match=r"layer 0 passes \['position_bias'\] to its attention function"):
        enable(build("llama"), 4, 28)


def test_a_layer_that_is_not_causal_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="layer 1 is not causal"):
        enable(model, 4, 28)


def test_a_layer_that_attends_elsewhere_is_refused(monkeypatch):
    model = build("llama")
    model.model.layers[1].self_attn.config = build("llama").config  # stays on eager attention
    with pytest.raises(UnsupportedModelError, match="its rotary embedding changes more than the queries and keys"):
        enable(model, 4, 28)


def test_a_last_layer_that_rotates_more_than_it_hands_on_is_refused():
    model = build("llama")
    attention = model.model.layers[-1].self_attn
    attention.register_forward_hook(
        lambda module, args, kwargs, output: (output[0] + kwargs["position_embeddings"][1].mean(), *output[1:]),
        with_kwargs=True,
    )
    with pytest.raises(UnsupportedModelError, match="its rotary embedding changes more than the queries and keys"):
        enable(model, 4, 28)
