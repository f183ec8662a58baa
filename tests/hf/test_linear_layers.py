"""Linear layers of an enabled model on a CPU: few tokens take the operator made for them, all else PyTorch's."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hf_models import build, random_ids
from torch.autograd import forward_ad

import sinkattn
from sinkattn.hf.quantize import quantize_weights
from sinkattn.hf.swap import linear_layers

S, W = 2, 14

pytestmark = pytest.mark.skipif(not linear_layers.DTYPES, reason="needs x86-64")


def linear_modules(model) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if type(module) is torch.nn.Linear]


@pytest.fixture
def calls(monkeypatch):
    """Inputs of the operator."""
    inputs, linear = [], sinkattn.ops.linear_operator

    def counted(input, *args):
        inputs.append(input)
        return linear(input, *args)

    monkeypatch.setattr(linear_layers.ops, "linear_operator", counted)
    return inputs


@pytest.mark.parametrize("dtype", linear_layers.DTYPES, ids=str)
def test_few_tokens_take_the_operator(dtype, calls):
    original = build("qwen2", dtype)
    model = sinkattn.enable(copy.deepcopy(original), S, W)
    modules = linear_modules(model)
    assert any(module.bias is not None for module in modules)
    ids, errors = random_ids(2, 9), []
    with torch.no_grad():
        exact = copy.deepcopy(original).double()(ids).logits
        for each in (original, model):
            for split in ([1] * 9, [2] * 4 + [1]):  # two and four tokens, with two streams
                cache = sinkattn.SinkCache(each) if each is model else None
                outs = []
                for part in ids.split(split, dim=1):
                    output = each(part, cache=cache, use_cache=True)
                    cache = output.cache
                    outs.append(output.logits)
                errors.append((torch.cat(outs, dim=1) - exact).norm() / exact.norm())
    assert max(errors[2:]) < 2 * max(errors[:2])
    assert len(calls) == len(modules) * (9 + 5)
    calls.clear()
    with torch.no_grad():
        model(ids[:, :3], cache=sinkattn.SinkCache(model))
        assert not calls  # six tokens
        with torch.autocast("cpu", dtype):
            model(ids[:, :1], cache=sinkattn.SinkCache(model))
    model(ids[:, :1]).logits.sum().backward()
    assert not calls
    assert all(module.weight.grad is not None for module in modules)


def test_disable_restores_every_forward():
    model = build("llama", torch.bfloat16)
    attributes = [sorted(module.__dict__) for module in model.modules()]
    sinkattn.enable(model, S, W)
    assert all("forward" in module.__dict__ for module in linear_modules(model))
    sinkattn.disable(model)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes


@torch.no_grad()
def test_a_layer_that_others_wrap_is_its_own_after_disable(calls):
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama", torch.bfloat16)
    sinkattn.enable(model, S, W)
    other = build("llama", torch.bfloat16)
    other.lm_head = model.lm_head
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    sinkattn.enable(other, S, W)
    sinkattn.disable(model)
    x = torch.randn(1, 1, model.lm_head.in_features, dtype=torch.bfloat16)
    model.lm_head(x)
    assert not calls
    hooks.remove_hook_from_module(model.lm_head)
    model.lm_head(x)
    assert not calls
    layer = other.model.layers[0].mlp.up_proj
    assert "forward" in layer.__dict__
    model.lm_head = layer
    sinkattn.disable(sinkattn.enable(model, S, W))  # it is that of the other model
    layer(x)
    assert len(calls) == 1


@torch.no_grad()
def test_transforms_are_those_of_pytorch(calls):
    layer = sinkattn.enable(build("llama", torch.bfloat16), S, W).lm_head
    x, v = torch.randn(2, 3, 1, layer.in_features, dtype=torch.bfloat16)
    want = torch.nn.functional.linear(v, layer.weight)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (v,))[1], want)
    torch.testing.assert_close(torch.vmap(layer)(v), want)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, want)
    assert not calls


def test_float32_stays_as_it_is():
    model = sinkattn.enable(build("llama"), S, W)
    assert not any("forward" in module.__dict__ for module in linear_modules(model))


@torch.no_grad()
def test_weights_are_those_that_the_layer_has_now(calls):
    layer = sinkattn.enable(build("llama", torch.bfloat16), S, W).model.layers[0].mlp.up_proj
    rows, columns = layer.weight.shape

    def check(num_calls, dtype=torch.bfloat16, device="cpu"):
        x = torch.randn(1, 3, columns, dtype=dtype, device=device)
        want = torch.nn.functional.linear(x, layer.weight)
        torch.testing.assert_close(layer(x), want, check_device=True)
        assert len(calls) == num_calls

    layer.weight.mul_(2)
    check(1)
    layer.weight = torch.nn.Parameter(torch.randn(rows, columns, dtype=torch.bfloat16))
    check(2)
    layer.weight = torch.nn.Parameter(torch.randn(columns, rows, dtype=torch.bfloat16).T)  # not contiguous
    check(2)
    layer.double()
    check(2, torch.float64)
    layer.bfloat16().to("meta")
    check(2, device="meta")


@torch.no_grad()
def test_weights_may_be_quantized_later(calls):
    pytest.importorskip("torchao")
    model = sinkattn.enable(build("llama", torch.bfloat16), S, W)
    quantize_weights(model, "int8")
    assert model(random_ids(1, 1)).logits.isfinite().all()
    assert not calls


def test_layers_that_are_replaced_leave_no_weights():
    model = sinkattn.enable(build("llama", torch.bfloat16), S, W)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(1, 1)
    gc.collect()
    assert weight() is None


def test_copies_have_forwards_of_their_own():
    model = sinkattn.enable(build("llama", torch.bfloat16), S, W)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.lm_head.weight.data.zero_()
        with torch.no_grad():
            assert not twin(random_ids(1, 1)).logits.any()
            assert model(random_ids(1, 1)).logits.any()


def test_a_product_of_quantized_weights_that_differs_is_not_used(monkeypatch):
    pytest.importorskip("torchao")
    linear, model = sinkattn.ops.linear, build("llama", torch.bfloat16)
    quantize_weights(model, "int8")
    quantized = [module for module in linear_modules(model) if linear_layers.is_quantized(module)]
    assert len(quantized) > 5
    monkeypatch.setattr(linear_layers.ops, "linear", lambda *args, **options: linear(*args, **options) * 1.05)
    sinkattn.enable(model, S, W)
    assert not any("forward" in module.__dict__ for module in quantized)
    monkeypatch.undo()
    sinkattn.enable(sinkattn.disable(model), S, W)
    assert all("forward" in module.__dict__ for module in quantized)
