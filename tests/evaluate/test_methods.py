"""Ways to run a stream: their losses against a model in plain PyTorch that gathers and recomputes."""

from copy import deepcopy

import naive
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sinkattn.evaluate.methods import CacheSize, Dense, OneShot, Recomputed, Streamed, dense_limit, twin


def fed_in_pieces(method, ids, wanted=None):
    """Losses of a stream fed in pieces of several sizes."""
    wanted = torch.ones(len(ids) - 1, dtype=torch.bool) if wanted is None else wanted
    parts, begin, sizes = [], 0, [1, 300, 7, 256]
    while begin < len(ids) - 1:
        end = min(begin + sizes[len(parts) % 4], len(ids) - 1)
        parts.append(method.feed(ids[begin:end], ids[begin + 1 : end + 1], wanted[begin:end]))
        begin = end
    losses, hits = (torch.cat(each) for each in zip(*parts, strict=True))
    return losses, hits


@pytest.mark.parametrize("size", ["0+64", "1+63", "4+60", "4+124"])
def test_streamed_losses_are_those_of_gathering(size, model, ids):
    size = CacheSize.parse(size)
    expected = naive.losses(deepcopy(model).double(), ids, size.num_sinks, size.window)
    losses, _ = fed_in_pieces(Streamed(model, size), ids)
    assert losses.shape == (2000,)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
    assert abs(losses.mean() - expected.mean()) < 1e-5
    other = naive.losses(deepcopy(model).double(), ids[:200], size.num_sinks, size.window - 1)
    assert (losses[:199] - other).abs().max() > 1e-3


@pytest.mark.parametrize("start", [True, False])
def test_recomputed_losses_are_those_of_one_forward_each(start, model, ids):
    ids = ids[:400]
    expected = naive.recomputed_losses(model, ids, 64, start).double()
    losses, _ = fed_in_pieces(Recomputed(model, 64, int(ids[0]) if start else None), ids)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
    assert (losses[64:] - naive.recomputed_losses(model, ids, 64, not start)[64:]).abs().mean() > 0.1


def test_recomputation_makes_the_wanted_predictions_alone(model, ids):
    wanted = torch.arange(2000) % 16 == 0
    some, _ = fed_in_pieces(Recomputed(model, 64, 0), ids, wanted)
    every, _ = fed_in_pieces(Recomputed(model, 64, 0), ids)
    assert torch.equal(some.isnan(), ~wanted)
    torch.testing.assert_close(some[wanted], every[wanted], atol=1e-5, rtol=0)


def test_dense_losses_are_those_of_one_forward(model, ids):
    losses, hits = fed_in_pieces(Dense(model), ids[:400])
    with torch.no_grad():
        logits = model(input_ids=ids[None, :399], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:400], reduction="none")
    torch.testing.assert_close(losses, expected.double(), atol=1e-4, rtol=0)
    assert torch.equal(hits, logits.argmax(-1) == ids[1:400])


def test_one_shot_begins_anew_with_every_piece(model, ids):
    scores = OneShot(model, 0).feed(ids[50:90], ids[51:91], torch.ones(40, dtype=torch.bool))
    with torch.no_grad():
        logits = model(input_ids=torch.cat((ids[:1], ids[51:90]))[None]).logits[0]
    assert torch.equal(scores.hits, logits.argmax(-1) == ids[51:91])


@pytest.mark.parametrize(
    "make",
    [lambda m: Streamed(m, CacheSize(1, 9)), Dense, lambda m: Recomputed(m, 10, 0)],
    ids=["sinks", "dense", "new"],
)
def test_reset_begins_a_new_stream_and_a_step_takes_a_token(make, model, ids):
    method = make(model)
    first, _ = fed_in_pieces(method, ids[:40])
    method.reset()
    again, _ = fed_in_pieces(method, ids[:40])
    assert torch.equal(first, again)
    method.reset()
    for token in ids[:30].tolist():
        method.step(token)
    rest = method.feed(ids[30:39], ids[31:40], torch.ones(9, dtype=torch.bool)).losses
    torch.testing.assert_close(rest, first[30:], atol=1e-4, rtol=0)


def test_bytes_are_those_of_keys_and_values(model, ids):
    streamed, dense = Streamed(model, CacheSize(1, 9)), Dense(model)
    for method in (streamed, dense):
        fed_in_pieces(method, ids[:101])
    # Two layers, keys and values, four heads of 32, four bytes.
    assert (streamed.kv_bytes, dense.kv_bytes) == (10 * 2048, 100 * 2048)
    assert Recomputed(model, 10, 0).kv_bytes is None


def test_a_twin_shares_weights_and_leaves_the_model_alone(model, ids):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))
    fed_in_pieces(Streamed(model, CacheSize(4, 60)), ids[:200])
    assert modules == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("_sinkattn" in module.__dict__ for module in model.modules())


def test_dense_attention_ends_where_absolute_positions_end(model):
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    absolute = GPT2LMHeadModel(config).eval()
    assert dense_limit(Streamed(absolute, CacheSize(2, 20))) == 64
    assert dense_limit(Streamed(model, CacheSize(2, 20))) is None


@pytest.mark.parametrize("text", ["4", "4+", "+4", "4+0", "-1+4", "4 + 3", "4+3+2"])
def test_only_sinks_plus_window_is_a_size(text):
    with pytest.raises(ValueError, match=r"cache: expected sinks \+ window, such as 4\+1020, got"):
        CacheSize.parse(text)
