"""Ways to run a stream: their losses against a model in plain PyTorch that gathers and recomputes."""

from copy import deepcopy

import families
import naive
import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from sinkattn.evaluate.methods import CacheSize, Dense, OneShot, Recomputed, Streamed, copy_sharing_weights, dense_limit


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
    size, ids = CacheSize.parse(size), ids[:601]
    expected = naive.losses(deepcopy(model).double(), ids, size.num_sinks, size.window)
    losses, _ = fed_in_pieces(Streamed(model, size), ids)
    assert losses.shape == (600,)
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
    scores = OneShot(model, [0]).feed(ids[50:90], ids[51:91], torch.ones(40, dtype=torch.bool))
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


@pytest.mark.parametrize(
    "make", [lambda m: Streamed(m, CacheSize(1, 9)), lambda m: Recomputed(m, 10, 0)], ids=["sink", "new"]
)
def test_a_step_takes_a_token_in(make, model, ids):
    method = make(model)
    first, _ = fed_in_pieces(method, ids[:40])
    method.reset()
    for token in ids[:30].tolist():
        method.step(token)
    rest = method.feed(ids[30:39], ids[31:40], torch.ones(9, dtype=torch.bool)).losses
    torch.testing.assert_close(rest, first[30:], atol=1e-4, rtol=0)


def test_dense_takes_the_token_of_a_step_back(model, ids):
    method = Dense(model)
    first, _ = fed_in_pieces(method, ids[:40])
    method.reset()
    method.feed(ids[:30], ids[1:31], torch.ones(30, dtype=torch.bool))
    kept = method.kv_bytes
    for token in (5, 6, 7):
        method.step(token)
    assert method.kv_bytes == kept == 30 * 2048
    rest = method.feed(ids[30:39], ids[31:40], torch.ones(9, dtype=torch.bool)).losses
    torch.testing.assert_close(rest, first[30:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "tokens", "seen"),
    [
        (lambda m: Streamed(m, CacheSize(1, 9)), 1, 10),
        (lambda m: Streamed(m, CacheSize(0, 7)), 1, 7),
        (Dense, 1, 41),
        (lambda m: Recomputed(m, 10, 0), 10, 10),
    ],
    ids=["sinks", "window", "dense", "recomputed"],
)
def test_a_step_is_the_work_that_its_name_says(make, tokens, seen, model, ids):
    method = make(model)
    fed_in_pieces(method, ids[:41])
    shapes = []
    hook = method.model.model.embed_tokens.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    method.step(3)
    hook.remove()
    assert shapes == [tokens]
    if not isinstance(method, Recomputed):
        # A token more is in the dense cache while it is read.
        assert method.kv_bytes == (seen - isinstance(method, Dense)) * 2048


@pytest.mark.parametrize("family", ["bamba", "mistral", "gpt2", "opt", "falcon-alibi", "gemma3_text", "lfm2"])
def test_dense_fed_in_pieces_is_one_forward(family):
    tiny = families.build(family)
    ids = families.random_ids(1, 60)[0]
    losses, _ = fed_in_pieces(Dense(tiny), ids)
    with torch.no_grad():
        logits = tiny(input_ids=ids[None, :-1], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
    torch.testing.assert_close(losses, expected.double(), atol=2e-4, rtol=0)


def test_methods_do_not_disturb_each_other():
    """Frequencies of dynamic scaling grow with the longest stream that a module has seen."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters=rope,
    )
    tiny = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 90, (80,), generator=torch.Generator().manual_seed(1))
    alone, _ = fed_in_pieces(Recomputed(tiny, 32, None), ids)
    fed_in_pieces(Dense(tiny), ids)
    after, _ = fed_in_pieces(Recomputed(tiny, 32, None), ids)
    assert torch.equal(alone, after)
    assert not any("long" in name or "original" in name for name in tiny.state_dict())


def test_losses_that_are_no_numbers_are_refused(model, ids):
    other = deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight[ids[20]] = torch.nan
    with pytest.raises(ValueError, match="loss: the model returned one that is not finite"):
        fed_in_pieces(Dense(other), ids[:40])


def test_questions_longer_than_a_model_has_positions_are_refused(model):
    one = torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ValueError, match="questions: expected at most 19 tokens, the positions of this model, got 20"):
        OneShot(model, [0], 19).feed(one, one, one > 0)


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
    other = copy_sharing_weights(model)
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
