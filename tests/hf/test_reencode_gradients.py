"""Gradients of models that stream by re-encoding: those of the unpatched model on each context, the past a constant."""

import copy
from contextlib import nullcontext
from itertools import groupby

import pytest
import torch
from hf_models import ABSOLUTE, build, interrupted, random_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import sinkattn
from sinkattn.hf.reencode.lanes import context_start
from sinkattn.hf.versions import forward_cache
from sinkattn.ops import RingLayout

S, W = 3, 12  # a rebuild every 6 tokens, the first one at token 15
LAYOUT = RingLayout(S, W, 0)


def gradients(model) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of ``want``."""
    assert got.keys() == want.keys()
    error = sum((got[name] - x).square().sum() for name, x in want.items())
    return (error / sum(x.square().sum() for x in want.values())).sqrt().item()


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def enabled(family: str = "gpt2", dtype: torch.dtype = torch.float64, headroom: int = 0, **options):
    return sinkattn.enable(build(family, dtype, **options), S, W, headroom)


def expected_logits(model, ids: Tensor, first: int, is_constant: bool = True) -> Tensor:
    """Logits of the unpatched model for the tokens from ``first`` on, each on its context at positions from 0 on.

    The tokens of a context from before ``first`` are encoded first, without gradients if ``is_constant``.
    """
    logits, name = [], forward_cache(model)
    for start, group in groupby(range(first, ids.shape[1]), key=lambda token: context_start(token, LAYOUT)):
        tokens = list(group)
        stop = tokens[-1] + 1
        context = [*range(min(S, stop)), *range(start, stop)]
        past, own = ([token for token in context if (token < first) == is_past] for is_past in (True, False))
        options = {name: DynamicCache(config=model.config), "use_cache": True}
        if past:
            with torch.no_grad() if is_constant else nullcontext():
                model(ids[:, past], **options)
        positions = torch.arange(len(past), len(context)).unsqueeze(0)
        logits.append(model(ids[:, own], position_ids=positions, **options).logits[:, -len(tokens) :])
    return torch.cat(logits, dim=1)


def expected_gradients(
    family: str, ids: Tensor, calls: list[int], dtype: torch.dtype = torch.float64, is_constant: bool = True
) -> dict[str, Tensor]:
    model, first = build(family, dtype), 0
    for part in ids.split(calls, dim=1):
        logits = expected_logits(model, ids[:, : first + part.shape[1]], first, is_constant)
        loss_of(logits, part).backward()
        first += part.shape[1]
    return gradients(model)


def streamed_gradients(model, ids: Tensor, calls: list[int]) -> dict[str, Tensor]:
    cache = sinkattn.SinkCache(model)
    for part in ids.split(calls, dim=1):
        loss_of(model(part, cache=cache).logits, part).backward()
    return gradients(model)


# Within the context; begun in the sinks; rebuilds at the beginning, in the middle, and several in one call.
CALLS = [[50], [2, 48], [10, 5, 5, 30], [15, 6, 6, 23], [13, 4, 4, 4, 4, 4, 17]]


@pytest.mark.parametrize("calls", CALLS, ids=str)
def test_gradients_are_those_of_the_unpatched_model(calls):
    ids = random_ids(2, sum(calls))
    assert difference(streamed_gradients(enabled(), ids, calls), expected_gradients("gpt2", ids, calls)) < 1e-10


@pytest.mark.parametrize("family", [*ABSOLUTE, "whisper", "ctrl", "bert"])
def test_families(family):
    # GPT-Neo computes attention in fp32 in any dtype, and XGLM does not run in fp64.
    dtype, tolerance = {"gpt_neo": (torch.float64, 1e-5), "xglm": (torch.float32, 1e-5)}.get(
        family, (torch.float64, 1e-10)
    )
    ids, calls = random_ids(2, 40), [10, 5, 25]
    got = streamed_gradients(enabled(family, dtype), ids, calls)
    assert difference(got, expected_gradients(family, ids, calls, dtype)) < tolerance


def test_the_comparison_notices_a_past_that_is_not_constant():
    ids, calls = random_ids(2, 50), [10, 5, 5, 30]
    got = streamed_gradients(enabled(), ids, calls)
    assert difference(got, expected_gradients("gpt2", ids, calls, is_constant=False)) > 1e-2


def test_tokens_of_the_call_that_are_encoded_again_are_not_constant():
    """One call has other gradients than its parts, and the same outputs."""
    model, ids = enabled(), random_ids(2, 40)
    whole = model(ids, use_cache=False).logits
    loss_of(whole, ids).backward()
    together, cache = gradients(model), sinkattn.SinkCache(model)
    model.zero_grad()
    parts = torch.cat([model(part, cache=cache).logits for part in ids.split([15, 6, 19], dim=1)], dim=1)
    loss_of(parts, ids).backward()
    torch.testing.assert_close(parts, whole)
    assert difference(gradients(model), together) > 1e-3


def test_calls_before_the_backward():
    """The losses of several calls may be added up first: what a call keeps for its backward does not change."""
    model, ids, calls = enabled(), random_ids(2, 50), [10, 5, 5, 30]
    cache = sinkattn.SinkCache(model)
    sum(loss_of(model(part, cache=cache).logits, part) for part in ids.split(calls, dim=1)).backward()
    assert difference(gradients(model), expected_gradients("gpt2", ids, calls)) < 1e-10


def test_what_autograd_keeps_does_not_grow_with_the_stream():
    model, kept = enabled(), []
    cache = sinkattn.SinkCache(model)
    for _ in range(12):  # two rebuilds in each call
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, total=total: total.append(x.nbytes), lambda x: None):
            model(random_ids(1, 2 * (W - W // 2)), cache=cache)
        kept.append(sum(total))
    assert kept[3:] == [kept[3]] * 9


def test_padded_batches():
    """Each row has the gradients that it has alone."""
    model = enabled()
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :11] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    (loss_of(logits[:1, 11:], ids[:1, 11:]) + loss_of(logits[1:], ids[1:])).backward()
    together = gradients(model)
    plain = build("gpt2", torch.float64)
    for row in (ids[:1, 11:], ids[1:]):
        loss_of(expected_logits(plain, row, 0), row).backward()
    assert difference(together, gradients(plain)) < 1e-10


def test_frozen_layers_and_a_rollback():
    """Keys without a graph under queries that have one; the stream goes on after what was recorded."""
    model, plain = enabled(headroom=4), build("gpt2", torch.float64)
    for each in (model, plain):
        for name, x in each.named_parameters():
            x.requires_grad = ".h.1.mlp." in name
    ids, other, cache = random_ids(1, 40), random_ids(1, 4, seed=1), sinkattn.SinkCache(model)
    model(ids[:, :20], cache=cache)
    loss = loss_of(model(other, cache=cache).logits, other)
    cache.crop(-4)
    copy.deepcopy(cache)  # has no graph
    logits = model(ids[:, 20:], cache=cache).logits
    (loss + loss_of(logits, ids[:, 20:])).backward()
    for text in (torch.cat((ids[:, :20], other), dim=1), ids):
        loss_of(expected_logits(plain, text, 20), text[:, 20:]).backward()
    assert difference(gradients(model), gradients(plain)) < 1e-10


def test_an_interrupted_call_leaves_no_graph():
    model, ids = enabled(), random_ids(2, 40)
    cache = sinkattn.SinkCache(model)
    model(ids[:, :10], cache=cache)
    with interrupted(model.transformer.h[1], 1, RuntimeError):
        model(random_ids(2, 20, seed=1), cache=cache)
    assert all(layer.recorded is None for lane in cache.lanes for layer in lane.context.layers)
    loss_of(model(ids[:, 10:], cache=cache).logits, ids[:, 10:]).backward()
    plain = build("gpt2", torch.float64)
    loss_of(expected_logits(plain, ids, 10), ids[:, 10:]).backward()
    assert difference(gradients(model), gradients(plain)) < 1e-10


def test_training_mode_has_the_dropout_of_the_model():
    """While nothing is encoded again the random numbers are the same, and so are losses and gradients."""
    ids, options = random_ids(2, S + W), {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    results, losses = [], []
    for streams in (False, True):
        model = enabled(**options) if streams else build("gpt2", torch.float64, **options)
        torch.manual_seed(7)
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        results.append(gradients(model))
    assert losses[0] == losses[1]
    assert difference(*results) < 1e-10
    assert model.eval()(ids, labels=ids).loss.item() != losses[0]


def test_what_cannot_be_exact_is_refused():
    ids = random_ids(1, 5)
    model = sinkattn.enable(build("opt", layerdrop=0.1), S, W)
    model(ids).logits.mean().backward()
    with pytest.raises(RuntimeError, match=r"layerdrop: expected 0 in training mode, got 0\.1"):
        model.train()(ids)
    model = sinkattn.enable(build("gpt2"), S, W).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient checkpointing runs layers again"):
        model(ids)
    model.gradient_checkpointing_disable()
    model(ids).logits.mean().backward()
