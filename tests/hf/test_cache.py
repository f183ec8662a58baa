"""SinkCache through transformers' Cache interface: memory, rollback, reordering, forks, batches, failed forwards."""

import copy

import families
import pytest
import torch
from hf_models import build, enabled, random_ids

import sinkattn
from sinkattn.hf.versions import forward_cache

S, W = 4, 28


def feed(model, cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **{forward_cache(model): cache}).logits


def replay(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of a new stream that is fed token by token."""
    cache = sinkattn.SinkCache(model)
    for i in range(ids.shape[1]):
        logits = feed(model, cache, ids[:, i : i + 1])
    return logits


def test_memory_is_constant_and_allocated_once():
    model = enabled("llama", S, W, headroom=2)
    cache, ids = sinkattn.SinkCache(model), random_ids(3, 400)
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    feed(model, cache, ids[:, :1])
    layers, kv_heads, head_dim, slots = 2, 2, 8, S + W + 2
    assert cache.nbytes == 2 * layers * 3 * kv_heads * slots * head_dim * 4
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for i in range(1, 400):
        feed(model, cache, ids[:, i : i + 1])
    assert cache.get_seq_length() == 400
    assert cache.layers[1].ring.seen.tolist() == [400] * 3
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places
    assert cache.get_max_length() == -1


def test_rollback_and_replay():
    model = enabled("llama", S, W, headroom=5)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 150)
    feed(model, cache, ids[:, :100])
    feed(model, cache, random_ids(1, 5, seed=9))
    assert cache.is_croppable
    cache.crop(-5)
    assert cache.get_seq_length() == 100
    got = [feed(model, cache, ids[:, i : i + 1]) for i in range(100, 150)]
    whole = feed(model, sinkattn.SinkCache(model), ids)
    torch.testing.assert_close(torch.cat(got, dim=1), whole[:, 100:])
    with pytest.raises(RuntimeError, match=r"can roll back 5 tokens more \(headroom 5\), got 6"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="expected a negative number"):
        cache.crop(10)
    assert cache.get_seq_length() == 150
    cache.crop(0)
    feed(model, cache, ids[:, :1])


def test_without_headroom_nothing_can_be_taken_back():
    model = enabled("llama", S, W)
    cache = sinkattn.SinkCache(model)
    cache.crop(-3)  # transformers may crop an empty cache
    feed(model, cache, random_ids(1, S + W + 1))
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="headroom 0"):
        cache.crop(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_until_a_ring_is_full_everything_can_be_taken_back(family):
    """The smallest ring is the limit: a layer with a sliding window of its own may have fewer slots than the others."""
    model = sinkattn.enable(families.build(family), S, W)
    smallest = min(layer.layout.slots for layer in sinkattn.SinkCache(model).layers)
    ids, new = random_ids(2, smallest), random_ids(2, 60, seed=3)
    cache = sinkattn.SinkCache(model)
    feed(model, cache, ids)
    cache.crop(-(smallest - 5))
    want = feed(model, sinkattn.SinkCache(model), torch.cat((ids[:, :5], new), dim=1))[:, 5:]
    torch.testing.assert_close(feed(model, cache, new), want)
    cache.reset()
    feed(model, cache, random_ids(2, smallest + 1))
    with pytest.raises(RuntimeError, match="headroom 0"):
        cache.crop(-1)


def test_reorder_equals_replay():
    model = enabled("llama", S, W)
    cache, ids = sinkattn.SinkCache(model), random_ids(4, 90)
    feed(model, cache, ids)
    source = torch.tensor([2, 0, 0, 1], dtype=torch.int32)
    cache.reorder_cache(source)
    new = random_ids(4, 1, seed=5)
    want = replay(model, torch.cat((ids[source.long()], new), dim=1))
    torch.testing.assert_close(feed(model, cache, new), want)


def test_reset_and_fork():
    model = enabled("llama", S, W)
    cache, ids, new = sinkattn.SinkCache(model), random_ids(2, 90), random_ids(2, 3, seed=5)
    feed(model, cache, ids)
    fork = copy.deepcopy(cache)
    want = feed(model, cache, new)
    assert torch.equal(feed(model, fork, new), want)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(model, cache, ids), feed(model, sinkattn.SinkCache(model), ids))
    assert fork.get_seq_length() == 93


@pytest.mark.parametrize("family", ["llama", "lfm2", "gpt2"])
def test_after_a_reset_another_batch_may_come(family):
    model = sinkattn.enable(families.build(family), 4, 12)
    cache = sinkattn.SinkCache(model)
    for batch in (3, 1, 2):
        ids = random_ids(batch, 30)
        assert torch.equal(feed(model, cache, ids), feed(model, sinkattn.SinkCache(model), ids))
        with pytest.raises(ValueError, match=f"holds {batch} streams, got a batch of 5"):
            feed(model, cache, random_ids(5, 2))
        cache.reset()


def test_batches_are_checked():
    model = enabled("llama", S, W)
    cache = sinkattn.SinkCache(model, max_batch_size=2)
    with pytest.raises(ValueError, match="max_batch_size is 2, got a batch of 3"):
        feed(model, cache, random_ids(3, 4))
    feed(model, cache, random_ids(2, 4))
    with pytest.raises(ValueError, match="holds 2 streams, got a batch of 1"):
        feed(model, cache, random_ids(1, 4))
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="max_batch_size: expected 1 or more, got 0"):
        sinkattn.SinkCache(model, max_batch_size=0)
    with pytest.raises(ValueError, match=r"prepared by sinkattn\.enable"):
        sinkattn.SinkCache(build("llama"))


@pytest.mark.parametrize(
    ("before", "tokens", "layer", "needs_reset"),
    [
        (0, 60, 1, False),
        (100, 1, 1, False),
        (100, 3, 1, False),
        (100, 4, 1, True),
        (100, 60, 0, False),
        (20, 10, 1, False),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_a_stream_right_or_refused(before, tokens, layer, needs_reset, error):
    """Interrupted in layer 1, after layer 0 has written to its ring, or in layer 0, before anything is written."""
    model = enabled("llama", S, W, headroom=2)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 120)
    if before:
        feed(model, cache, ids[:, :before])

    def interrupt(*args):
        raise error("stop")

    handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(error, match="stop"):
        feed(model, cache, random_ids(1, tokens, seed=7))
    handle.remove()
    assert cache.get_seq_length() == before
    if needs_reset:
        with pytest.raises(RuntimeError, match=r"interrupted .* call reset\(\)"):
            feed(model, cache, ids[:, before : before + 1])
        cache.reset()
        before = 0
    whole = feed(model, sinkattn.SinkCache(model), ids)
    torch.testing.assert_close(feed(model, cache, ids[:, before:]), whole[:, before:])


def test_a_stream_begun_in_inference_mode_goes_on_outside():
    model, ids = enabled("llama", S, W), random_ids(1, 60)
    cache = sinkattn.SinkCache(model)
    with torch.inference_mode():
        model(ids[:, :50], cache=cache)
    got = feed(model, cache, ids[:, 50:])
    torch.testing.assert_close(got, feed(model, sinkattn.SinkCache(model), ids)[:, 50:])


def test_what_an_interrupted_forward_wrote_limits_a_rollback():
    model = enabled("llama", S, W, headroom=4)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 120)
    feed(model, cache, ids[:, :100])
    handle = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, ids[:, :3])
    handle.remove()
    with pytest.raises(RuntimeError, match="can roll back 1 tokens more"):
        cache.crop(-2)
    cache.crop(torch.tensor(-1))
    whole = feed(model, sinkattn.SinkCache(model), ids)
    torch.testing.assert_close(feed(model, cache, ids[:, 99:]), whole[:, 99:])


def test_a_failed_first_forward_does_not_fix_the_batch():
    model = enabled("llama", S, W)
    cache, ids = sinkattn.SinkCache(model), random_ids(2, 20)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, ids)
    handle.remove()
    assert cache.nbytes == 0
    assert torch.equal(feed(model, cache, ids[:1]), feed(model, sinkattn.SinkCache(model), ids[:1]))


def test_a_cache_works_in_its_model_only():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    cache = sinkattn.SinkCache(model)
    feed(model, cache, ids)
    with pytest.raises(TypeError, match=r"copy\.deepcopy makes an independent fork"):
        copy.copy(cache)
    with pytest.raises(RuntimeError, match=r"works only in the model that sinkattn\.enable prepared"):
        feed(build("llama"), cache, ids)
    sinkattn.disable(model)
    with pytest.raises(RuntimeError, match=r"works only in the model that sinkattn\.enable prepared"):
        feed(model, cache, ids)
    sinkattn.enable(model, S, W)
    with pytest.raises(ValueError, match="before the last enable"):
        feed(model, cache, ids)


@torch.no_grad()
def test_a_hybrid_recovers_from_a_failed_first_forward():
    model = sinkattn.enable(families.build("lfm2"), 4, 12)
    cache, ids = sinkattn.SinkCache(model), random_ids(2, 40)

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, random_ids(3, 9))
    handle.remove()
    assert torch.equal(feed(model, cache, ids[:, :30]), feed(model, sinkattn.SinkCache(model), ids[:, :30]))
    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids[:, 30:])
    handle.remove()
    with pytest.raises(RuntimeError, match="interrupted"):
        feed(model, cache, ids[:, 30:])
    cache.reset()
    assert torch.equal(feed(model, cache, ids), feed(model, sinkattn.SinkCache(model), ids))


def refuse(*args, **kwargs) -> None:
    raise TypeError("refused")


@pytest.mark.parametrize("tokens", [1, 2, 5, 10])
@pytest.mark.parametrize("family", ["llama", "falcon_h1"])
def test_a_call_that_is_refused_loses_nothing(family, tokens, monkeypatch):
    model, ids = sinkattn.enable(families.build(family), S, W, headroom=2), random_ids(1, 2 * (S + W) + 10)
    past, new = ids[:, :-10], ids[:, -10:][:, :tokens]
    cache, untouched = sinkattn.SinkCache(model), sinkattn.SinkCache(model)
    for each in (cache, untouched):
        feed(model, each, past)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(new, cache=cache, output_attentions=True)
    if family == "llama":
        with monkeypatch.context() as patch:
            patch.setattr(sinkattn.ops, "sink_attention_", refuse)
            with pytest.raises(TypeError, match="refused"):
                feed(model, cache, new)
        cache.crop(-2)
        untouched.crop(-2)
    assert torch.equal(feed(model, cache, new), feed(model, untouched, new))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_stream_may_have_sinks_of_its_own(family):
    model, ids = enabled(family, S, W, headroom=2), random_ids(1, 120)
    got = feed(model, cache := sinkattn.SinkCache(model, num_sinks=11), ids)
    assert (cache.layout.num_sinks, cache.layout.window) == (11, W)
    want = feed(other := enabled(family, 11, W, headroom=2), sinkattn.SinkCache(other), ids)
    assert torch.equal(got, want)
    assert not torch.allclose(got, feed(model, sinkattn.SinkCache(model), ids), atol=1e-4)
    most = 512 - W
    sinkattn.SinkCache(model, num_sinks=most)
    for refused in (-1, most + 1):
        with pytest.raises(ValueError, match=f"num_sinks: expected 0 to {most}, as the model sees at most 512 tokens"):
            sinkattn.SinkCache(model, num_sinks=refused)


def test_sinks_of_a_stream_stay_within_the_window_of_all_layers():
    model, most = enabled("mistral", 2, 60), 4
    sinkattn.SinkCache(model, num_sinks=most)
    with pytest.raises(ValueError, match=f"num_sinks: expected 0 to {most}, as the model sees at most 64 tokens"):
        sinkattn.SinkCache(model, num_sinks=most + 1)


def test_a_window_of_the_models_own_gets_no_sinks():
    window = families.NATIVE_WINDOW  # the same layout by chance, but the window of some layers is the model's own
    model, ids = enabled("gemma2", 0, window), random_ids(1, 60)
    got = feed(model, sinkattn.SinkCache(model, num_sinks=3), ids)
    want = feed(other := enabled("gemma2", 3, window), sinkattn.SinkCache(other), ids)
    assert torch.equal(got, want)
