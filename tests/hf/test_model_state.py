"""Changes of a model while its steps are replayed from a graph take effect; here on a stand-in for graphs."""

import pytest
import torch
from families import build
from hf_models import random_ids
from recorded_graph import REPLAYED, WARM_AGAIN, RecordedGraph, S, W, enabled_pair, logits, warm
from torch.nn.functional import linear

import sinkattn
from sinkattn.hf import decode_steps
from sinkattn.hf.model_patch import get_patch


def change_values(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


def change_data(model):
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data * 1.5


def change_parameter(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def change_module(model):
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()


def change_attribute(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def change_forward(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: linear(x, layer.weight) * 1.5


def change_hooks(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def change_dtype(model):
    model.double()


def change_tensor_in_a_list(model):
    model.model.layers[1].mlp.factors[0].data = torch.full((), 2.0)


CHANGES = [
    change_values, change_data, change_parameter, change_module, change_attribute, change_forward, change_hooks,
    change_dtype, change_tensor_in_a_list,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_model_take_effect(change):
    plain, model, graphs = enabled_pair()
    for each in (plain, model):
        mlp = each.model.layers[1].mlp
        mlp.factors = [torch.ones(())]
        mlp.forward = lambda x, mlp=mlp: type(mlp).forward(mlp, x) * mlp.factors[0]
    caches = warm(plain), warm(model)
    before = logits(plain, caches[0]), logits(model, caches[1])
    assert torch.equal(*before)
    assert decode_steps(model, caches[1]) == REPLAYED
    for each in (plain, model):
        change(each)
    after = logits(plain, caches[0], WARM_AGAIN + 1), logits(model, caches[1], WARM_AGAIN + 1)
    assert torch.equal(*after)
    assert (after[0][:, 0] - before[0][:, 0]).abs().max() > 1e-2
    description = decode_steps(model, caches[1])
    assert description == ("not captured: there is a hook on layers.1.mlp" if change is change_hooks else REPLAYED)
    assert len(graphs.made) == (1 if change in (change_values, change_hooks) else 2)


def test_adapters_are_switched():
    peft = pytest.importorskip("peft")
    plain, model = (
        peft.get_peft_model(
            build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
        for _ in range(2)
    )
    other = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    results = []
    for each in (plain, model):
        torch.manual_seed(0)
        each.add_adapter("other", other)
        for name, parameter in each.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter.data, std=0.2)
        sinkattn.enable(each, S, W)
        if each is model:
            get_patch(each).capture_steps(RecordedGraph)
        cache = warm(each.get_base_model())
        parts = [logits(each, cache, 2)]
        each.set_adapter("other")
        parts.append(logits(each, cache, 9))
        with each.disable_adapter():
            parts.append(logits(each, cache, 2))
        each.set_adapter("default")
        parts.append(logits(each, cache, 2))
        each.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 3.0)
        parts.append(logits(each, cache, 2))
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)


def test_without_the_comparison_changes_would_be_lost(monkeypatch):
    """The stand-in shows what a CUDA graph would do."""
    plain, model, _ = enabled_pair()
    caches = warm(plain), warm(model)
    monkeypatch.setattr("sinkattn.hf.swap.model_state.ModelState.is_same", lambda self: True)
    monkeypatch.setattr("sinkattn.hf.swap.model_state.ModelState.has_same_tensors", lambda self: True)
    for each in (plain, model):
        change_parameter(each)
    assert not torch.equal(logits(plain, caches[0]), logits(model, caches[1]))


def test_frequent_changes_are_captured_less_and_less():
    _, model, graphs = enabled_pair()
    cache = warm(model)
    for step in range(200):
        model.model.layers[0].note = step
        logits(model, cache)
    assert 3 <= len(graphs.made) <= 8
    logits(model, cache, 200)
    assert decode_steps(model, cache) == REPLAYED


class Counting(torch.nn.Module):
    """Changes in every call, and gives other results from the twelfth on."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x) * (2 if self.calls > 12 else 1)


def test_modules_that_change_in_every_step_are_not_captured():
    _, model, graphs = enabled_pair()
    model.model.layers[1].mlp = Counting(model.model.layers[1].mlp)
    cache = warm(model)
    assert decode_steps(model, cache) == "not captured: the modules of the model change in every step"
    logits(model, cache, 40)
    assert graphs.num_replays == 0


def test_settings_of_the_configuration_and_of_classes_take_effect(monkeypatch):
    plain, model, _ = enabled_pair()
    caches = warm(plain), warm(model)
    for each in (plain, model):
        each.config.output_hidden_states = each.model.config.output_hidden_states = True
    with torch.no_grad():
        outputs = [each(random_ids(1, 1), cache=cache) for each, cache in zip((plain, model), caches, strict=True)]
    assert all(len(output.hidden_states) == 3 for output in outputs)
    for each in (plain, model):
        each.config.output_hidden_states = each.model.config.output_hidden_states = False
    caches = warm(plain), warm(model)
    assert decode_steps(model, caches[1]) == REPLAYED
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "forward", lambda self, x, forward=norm.forward: 1.5 * forward(self, x))
    assert torch.equal(logits(plain, caches[0], 3), logits(model, caches[1], 3))


def test_other_products_are_another_graph():
    """Also by the setting with which torch refuses to return the older one."""
    plain, model, graphs = enabled_pair()
    caches = warm(plain), warm(model)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert torch.equal(logits(plain, caches[0], WARM_AGAIN), logits(model, caches[1], WARM_AGAIN))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(graphs.made) == 2


def test_quantized_weights_that_move_are_noticed():
    quantization = pytest.importorskip("torchao.quantization")
    results = []
    for graphs in (False, True):
        model = build("llama", hidden_size=64, intermediate_size=128)
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
        quantization.quantize_(model.model, config)
        sinkattn.enable(model, S, W)
        if graphs:
            get_patch(model).capture_steps(RecordedGraph)
        cache = warm(model)
        parts = [logits(model, cache, 2)]
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.scale.data = weight.scale * 1.5  # as `module.to` changes what a weight consists of
        parts.append(logits(model, cache, 3))
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)


def test_tensors_that_cannot_be_compared_are_not_captured():
    class State:
        def __init__(self):
            self.code = torch.ones(3)

    _, model, _ = enabled_pair()
    model.model.layers[1].mlp.quant_state = State()
    assert decode_steps(model, warm(model)) == "not captured: there are tensors inside layers.1.mlp.quant_state"


def test_autocast_and_global_hooks_end_replays():
    plain, model, graphs = enabled_pair()
    caches, seen = (warm(plain), warm(model)), []
    results = []
    for each, cache in zip((plain, model), caches, strict=True):
        parts = [logits(each, cache)]
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(logits(each, cache))
        parts.append(logits(each, cache, WARM_AGAIN + 1))
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        parts.append(logits(each, cache))
        hook.remove()
        results.append(torch.cat(parts, dim=1))
    assert torch.equal(*results)
    assert len(seen) % 2 == 0
    assert len(seen) > 20
    assert len(graphs.made) == 2
