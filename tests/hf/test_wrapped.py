"""Models that are wrapped, quantised, dispatched or partly loaded: they stream, or an error says why not."""

import families
import pytest
import torch
from hf_models import build, random_ids
from test_generate import S, W, greedy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import sinkattn
from sinkattn.cli.info import model_facts
from sinkattn.hf import UnsupportedModelError
from sinkattn.hf.trial.agreement import relative_error

NEW = 60


def assert_streams(model) -> None:
    ids = random_ids(1, 40)
    got = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, greedy(model, ids, NEW))


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain, ids = build("llama"), random_ids(1, S + W)
    model = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        adapted = model(ids).logits
        assert sinkattn.enable(model, S, W) is model
        torch.testing.assert_close(model(ids).logits, adapted)
        with model.disable_adapter():
            assert (model(ids).logits - adapted).abs().max() > 0.1
    assert_streams(model)
    cache = sinkattn.SinkCache(model)
    model.generate(input_ids=ids, cache=cache, max_new_tokens=5, do_sample=False)
    assert cache.get_seq_length() == S + W + 4
    for again in (model, plain):
        with pytest.raises(ValueError, match="is enabled already"):
            sinkattn.enable(again, S, W)
    sinkattn.disable(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted)


def test_a_refused_model_in_peft_is_left_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="must not exceed the 512 positions"):
        sinkattn.enable(model, S, 600)
    assert not any("_sinkattn" in module.__dict__ for module in model.modules())


def prompt_learning(peft) -> list:
    task = {"task_type": "CAUSAL_LM"}
    tokens = {"num_virtual_tokens": 3, **task}
    return [
        peft.PrefixTuningConfig(**tokens),
        peft.PromptTuningConfig(**tokens),
        peft.PromptEncoderConfig(encoder_hidden_size=16, **tokens),
        peft.MultitaskPromptTuningConfig(num_tasks=2, **tokens),
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **task),
    ]


@pytest.mark.parametrize("kind", range(5), ids=["prefix", "prompt", "encoder", "multitask", "adaption"])
def test_prompts_of_peft_are_refused(kind):
    """They put virtual tokens before the tokens of every call, which does not fit a stream."""
    peft = pytest.importorskip("peft")
    config = prompt_learning(peft)[kind]
    plain, ids = build("llama"), random_ids(1, 20)
    model = peft.get_peft_model(plain, config).eval()
    options = {"task_ids": torch.zeros(1, dtype=torch.int64)} if kind == 3 else {}
    with torch.no_grad():
        want = model(ids, **options).logits
        with pytest.raises(UnsupportedModelError, match=f"adapters of type {config.peft_type.value} are not supported"):
            sinkattn.enable(model, S, W)
        assert torch.equal(model(ids, **options).logits, want)


@torch.no_grad()
def test_prefix_tuning_around_an_enabled_model_is_named():
    peft = pytest.importorskip("peft")
    plain, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    model = peft.get_peft_model(plain, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=r"expected a sinkattn\.SinkCache .*, got DynamicCache; .* prefix tuning"):
            call(input_ids=ids)
    assert plain(ids).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_activations_quantised_over_a_whole_call(family):
    """In such a model the output for a token depends on the other tokens of the call, with or without sinkattn."""
    model = torch.ao.quantization.quantize_dynamic(build(family), {torch.nn.Linear}, dtype=torch.qint8)
    ids = random_ids(1, S + W)
    with torch.no_grad():
        want = model(ids).logits
        assert relative_error(model(ids[:, :9]).logits, want[:, :9]) > 3e-3
        assert relative_error(sinkattn.enable(model, S, W)(ids).logits, want) < 1e-1


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert_streams(sinkattn.enable(model, S, W))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_decoder_alone(family):
    """Its outer model generates only with a SinkCache passed to it; either model can be enabled and disabled."""
    model, ids = build(family), random_ids(1, 40)
    decoder = sinkattn.enable(model.base_model, S, W)
    with pytest.raises(TypeError, match=r"got DynamicCache; .* enable the outer model instead, or give it a SinkCache"):
        model.generate(ids, max_new_tokens=NEW)
    got = model.generate(ids, cache=sinkattn.SinkCache(model), max_new_tokens=NEW, do_sample=False)
    sinkattn.disable(decoder)
    sinkattn.enable(model, S, W)
    assert torch.equal(got, model.generate(ids, max_new_tokens=NEW, do_sample=False))
    with pytest.raises(ValueError, match="is enabled already"):
        sinkattn.enable(decoder, S, W)
    with torch.no_grad():
        decoder(ids, cache=sinkattn.SinkCache(decoder))
    assert not any("_sinkattn" in module.__dict__ for module in sinkattn.disable(decoder).modules())
    assert "generate" not in model.__dict__


def test_device_maps(tmp_path):
    pytest.importorskip("accelerate")
    build("llama").save_pretrained(tmp_path / "model")
    for one_device in ("auto", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=one_device)
        assert_streams(sinkattn.enable(model, S, W))
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=offloaded, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(UnsupportedModelError, match=r"on one device, loaded, got \['cpu', 'meta'\]"):
        sinkattn.enable(model, S, W)


def hook(model) -> None:
    """Add hooks as accelerate's dispatch does; a second call replaces its own hooks."""
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())


def unhook(model) -> None:
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(model, recurse=True)


def enable(model) -> None:
    sinkattn.enable(model, S, W)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize(
    "steps",
    [
        (hook, enable, sinkattn.disable, unhook, enable),
        (hook, enable, unhook, sinkattn.disable, enable),
        (enable, hook, sinkattn.disable, unhook, enable),
        (enable, hook, sinkattn.disable, enable, sinkattn.disable, unhook),
        (enable, hook, unhook, sinkattn.disable, hook),
    ],
)
def test_hooks_of_accelerate_come_and_go(steps, family):
    model, ids = (families.build if family == "falcon" else build)(family), random_ids(1, S + W)
    want = model(ids).logits
    for step in steps:
        step(model)
        if steps[:3] == (hook, enable, unhook) and step is unhook:
            # accelerate has restored the forwards that it found before the model was enabled.
            if family == "llama":
                with pytest.raises(RuntimeError, match=r"forward of its decoder was replaced after .*: call .*disable"):
                    model(ids)
            continue
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
        if "generate" in model.__dict__:
            assert_streams(model)


@torch.no_grad()
def test_a_forward_under_autocast_comes_and_goes():
    """Wrapped like accelerate wraps a model for mixed precision."""
    model, ids = sinkattn.enable(build("llama").model, S, W), random_ids(1, S + W)
    want, own = model(ids)[0], model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(own)
    assert 1e-4 < relative_error(model(ids)[0], want) < 1e-1
    sinkattn.disable(model)
    assert 1e-4 < relative_error(model(ids)[0], want) < 1e-1
    model.forward = own
    torch.testing.assert_close(model(ids)[0], want)


def test_training_mode_is_kept():
    model = build("llama").train()
    sinkattn.enable(model, S, W)
    assert model.training
    with torch.no_grad():
        logits = model(random_ids(1, 5)).logits
        assert torch.equal(model.eval()(random_ids(1, 5)).logits, logits)
    assert_streams(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_facts_of_a_model_in_training_mode(family):
    model = build(family)
    want = model_facts(model, S, W)
    model.train()
    model.base_model.calls = 0
    model.base_model.register_forward_hook(lambda module, *_: setattr(module, "calls", module.calls + 1))
    assert model_facts(model, S, W) == want
    assert want["accepted"]
    assert all(module.training for module in model.modules())
    assert model.base_model.calls == 0


def test_half_a_model_is_refused():
    model = build("llama")
    layer = model.model.layers[1].mlp
    layer.down_proj.weight = torch.nn.Parameter(torch.empty_like(layer.down_proj.weight, device="meta"))
    keys = [sorted(module.__dict__) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"on one device, loaded, got \['cpu', 'meta'\]"):
        sinkattn.enable(model, S, W)
    assert [sorted(module.__dict__) for module in model.modules()] == keys


def compile_whole(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def compile_decoder(model):
    model.model.forward = torch.compile(model.model.forward, backend="eager")
    return model


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_decoder])
def test_a_compiled_model(compiled):
    """Compiled, and run before it is enabled, while it is enabled, and after."""
    torch.compiler.reset()
    model, ids = compiled(build("llama", num_hidden_layers=1)), random_ids(1, 70)
    plain = build("llama", num_hidden_layers=1)
    want = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, want)
    assert sinkattn.enable(model, S, W) is model
    torch.testing.assert_close(model(ids).logits, sinkattn.enable(plain, S, W)(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 73)
    assert sinkattn.disable(model) is model
    torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.nn.Sequential])
def test_other_wrappers_are_refused(wrapper):
    with pytest.raises(TypeError, match=f"expected a transformers PreTrainedModel, got {wrapper.__name__}"):
        sinkattn.enable(wrapper(build("llama")), S, W)
