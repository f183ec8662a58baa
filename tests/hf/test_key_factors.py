"""Factors between keys and queries for rings of 8 bits: scores stay the same, large elements of keys do no harm."""

import pytest
import torch
from factories import make_rope
from hf_models import build, random_ids
from torch import nn

import sinkattn
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.probe.result import Rotation
from sinkattn.hf.swap.key_factors import apply_factors, digest, key_factors
from sinkattn.hf.trial.agreement import relative_error
from sinkattn.hf.versions import forward_cache
from sinkattn.rope import rotate

LARGE = 2.0**6


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
    scaled_query, scaled_key = apply_factors(query, key, factors)
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
    assert digest([None, None]) is None


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
    assert all(x.isfinite().all() for x in apply_factors(query, key, factors))


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


def test_steps_convert_no_factors():
    """They have the dtype of the model, in which they are exact."""
    model = sinkattn.enable(model_with_large_elements(LARGE).bfloat16(), 3, 40, cache_dtype="int8")
    factors = get_patch(model).key_factors.values()
    assert factors
    for x in factors:
        assert x.dtype == torch.bfloat16
        assert torch.equal(x.float().log2().round().exp2(), x.float())


def test_streams_with_other_factors_are_refused(tmp_path):
    model = sinkattn.enable(model_with_large_elements(LARGE), 3, 40, cache_dtype="int8")
    cache = sinkattn.SinkCache(model)
    with torch.no_grad():
        model(input_ids=random_ids(1, 20), past_key_values=cache)
    cache.save(tmp_path / "stream.safetensors")
    sinkattn.load_stream(model, tmp_path / "stream.safetensors")
    layer = next(iter(get_patch(model).key_factors))
    get_patch(model).key_factors[layer] = get_patch(model).key_factors[layer] * 2
    with pytest.raises(
        ValueError,
        match=r"path: key_factors: expected \w{16}, as this model has it, got \w{16}; enable.* measures them",
    ):
        sinkattn.load_stream(model, tmp_path / "stream.safetensors")
