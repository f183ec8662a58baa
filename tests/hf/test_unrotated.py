"""Attention forwards without the model's rotation: used where nothing else changes, for this model alone."""

import copy
import functools
import pickle

import pytest
import torch
from families import build
from hf_models import random_ids

import sinkattn
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.probe.unrotated import unrotated_forward

S, W = 2, 14


@torch.no_grad()
def logits(model) -> torch.Tensor:
    cache = sinkattn.SinkCache(model)
    return torch.cat([model(part, cache=cache).logits for part in random_ids(1, 30).split([9] + [1] * 21, 1)], 1)


def forwards(model) -> dict:
    return get_patch(model).probe_result.unrotated_forwards


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "is_left_out"),
    [
        ("llama", True),
        ("gpt_neox", True),
        ("phi", True),
        ("deepseek_v3", False),
        ("bloom", False),
        ("gemma3n_text", False),
    ],
)
def test_families(family, is_left_out):
    """Where the function that rotates also moves elements, or takes one tensor, or there is none, forwards stay."""
    model = build(family)
    other = build(family)
    want = other(random_ids(1, S + W)).logits
    sinkattn.enable(model, S, W)
    assert bool(forwards(model)) == is_left_out
    torch.testing.assert_close(model(random_ids(1, S + W)).logits, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(other(random_ids(1, S + W)).logits, want)  # rotates as before


def steered(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        output, weights = forward(self, *args, **kwargs)
        return output + getattr(self, "steering", 0), weights

    return wrapper


def test_wrappers_of_others_stay(monkeypatch):
    model = build("llama")
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", steered(attention.forward))
    assert unrotated_forward(model.model.layers[0].self_attn) is None
    sinkattn.enable(model, S, W)
    before = logits(model)
    model.model.layers[0].self_attn.steering = 5
    assert (logits(model) - before).abs().max() > 0.1


def test_a_class_that_is_patched_later_is_used(monkeypatch):
    model, other = (sinkattn.enable(build("llama"), S, W) for _ in range(2))
    want = logits(model)
    attention = type(model.model.layers[0].self_attn)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", steered(attention.forward))
        torch.testing.assert_close(logits(model), want)
        for layer in model.model.layers:
            layer.self_attn.steering = 5
        assert (logits(model) - want).abs().max() > 0.1
    assert torch.equal(logits(other), want)


def test_a_forward_of_the_users_stays():
    model = build("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    sinkattn.enable(model, S, W)
    assert not forwards(model)
    torch.testing.assert_close(logits(model), logits(sinkattn.enable(build("llama"), S, W)))


def test_copies_run_their_own():
    model = sinkattn.enable(build("llama"), S, W)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(forward.module is module for module, forward in forwards(twin).items())
        assert torch.equal(logits(twin), want)
