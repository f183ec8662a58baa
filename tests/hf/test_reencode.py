"""Models with absolute positions: every token's output is the unpatched model's on its context."""

import copy
import io
import threading

import pytest
import torch
from hf_models import ABSOLUTE, build, interrupted, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import rms_error
from transformers import BertConfig, BertLMHeadModel, DynamicCache, GPTJConfig, GPTJForCausalLM

import sinkattn
from sinkattn.hf import UnsupportedModelError, stream_tokens
from sinkattn.hf.reencode import lanes, trial
from sinkattn.hf.reencode.cache import ReencodeCache
from sinkattn.hf.reencode.lanes import Lane, context_start, kept_tokens, rebuild_period
from sinkattn.hf.versions import cache_name, forward_cache
from sinkattn.ops import RingLayout

S, W = 3, 12
LENGTH = 60


@pytest.fixture(params=ABSOLUTE, scope="module")
def absolute(request) -> str:
    return request.param


def oracle(model, ids: torch.Tensor, num_sinks: int = S, window: int = W) -> torch.Tensor:
    """Logits of the unpatched model for each token, on its sinks and window at positions from 0 on."""
    layout, logits = RingLayout(num_sinks, window, 0), []
    for token in range(ids.shape[1]):
        start = context_start(token, layout)
        context = torch.cat((ids[:, : min(num_sinks, token + 1)], ids[:, start : token + 1]), dim=1)
        assert context.shape[1] <= num_sinks + window
        logits.append(model(context, use_cache=False).logits[:, -1])
    return torch.stack(logits, dim=1)


def feed(model, cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, cache=cache).logits


def stream(model, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    cache = sinkattn.SinkCache(model)
    assert sum(chunks) == ids.shape[1]
    return torch.cat([feed(model, cache, part) for part in ids.split(chunks, dim=1)], dim=1)


@pytest.fixture
def gpt2():
    return build("gpt2")


@pytest.fixture(scope="module")
def streaming():
    """An enabled GPT-2, the unpatched model's logits for a stream, and its ids."""
    model, ids = build("gpt2"), random_ids(2, LENGTH)
    with torch.no_grad():
        want = oracle(model, ids)
    return sinkattn.enable(model, S, W), want, ids


def test_contexts_start_where_they_should():
    layout = RingLayout(2, 5, 0)
    assert (kept_tokens(layout), rebuild_period(layout)) == (2, 3)
    assert [context_start(token, layout) for token in range(15)] == [2] * 7 + [5] * 3 + [8] * 3 + [11] * 2
    assert [context_start(token, RingLayout(1, 1, 0)) for token in range(5)] == [1, 1, 2, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[60], [1] * 60, [7] * 8 + [4]], ids=["one call", "1", "7"])
def test_outputs_are_those_of_the_unpatched_model(absolute, chunks):
    model, ids = build(absolute), random_ids(2, LENGTH)
    want = oracle(model, ids)
    assert rms_error(stream(sinkattn.enable(model, S, W), ids, chunks), want) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(("num_sinks", "window"), [(0, 1), (3, 1), (0, 2), (1, 2), (0, 9), (5, 3)], ids=str)
def test_small_layouts(gpt2, num_sinks, window):
    ids = random_ids(2, 25)
    want = oracle(gpt2, ids, num_sinks, window)
    sinkattn.enable(gpt2, num_sinks, window)
    assert rms_error(stream(gpt2, ids, [25]), want) < 2e-6
    assert rms_error(stream(gpt2, ids, [1] * 10 + [4, 1, 10]), want) < 2e-6


@torch.no_grad()
def test_low_precision_errs_like_the_unpatched_model():
    exact_model, model, ids = build("gpt2", torch.float64), build("gpt2", torch.bfloat16), random_ids(2, LENGTH)
    exact = oracle(exact_model, ids)
    own = rms_error(oracle(model, ids), exact)
    assert rms_error(stream(sinkattn.enable(model, S, W), ids, [1] * 20 + [40]), exact) <= 1.5 * own


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_of_the_model(gpt2, implementation):
    gpt2.set_attn_implementation(implementation)
    ids = random_ids(2, LENGTH)
    want = oracle(gpt2, ids)
    assert rms_error(stream(sinkattn.enable(gpt2, S, W), ids, [10, 1, 1, 30, 18]), want) < 2e-6
    assert gpt2.config._attn_implementation == implementation


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_streams_of_any_cuts_and_rollbacks(data):
    headroom = data.draw(st.integers(0, 9))
    ids, other = random_ids(1, LENGTH), random_ids(1, LENGTH, seed=1)
    model = build("gpt2", num_hidden_layers=1)
    with torch.no_grad():
        want = oracle(model, ids)
    sinkattn.enable(model, S, W, headroom)
    cache, at, peak = sinkattn.SinkCache(model), 0, 0
    for _ in range(10):
        if at == LENGTH:
            break
        count = data.draw(st.integers(1, LENGTH - at))
        assert rms_error(feed(model, cache, ids[:, at : at + count]), want[:, at : at + count]) < 2e-6
        at += count
        wrong = data.draw(st.integers(0, headroom))
        if wrong:
            feed(model, cache, other[:, :wrong])
        peak = max(peak, at + wrong)
        right = data.draw(st.integers(0, min(at, at + headroom - peak)))
        cache.crop(-wrong - right)
        at -= right
        assert cache.get_seq_length() == at
        assert cache.lanes[0].ids.shape[1] <= S + W - 1 + headroom


@torch.no_grad()
def test_a_wrong_number_of_kept_tokens_is_noticed(streaming, monkeypatch):
    model, want, ids = streaming
    assert rms_error(model(ids).logits, want) < 2e-6
    monkeypatch.setattr(lanes, "kept_tokens", lambda layout: layout.window // 2 - 1)
    assert rms_error(model(ids).logits, want) > 1e-2


@torch.no_grad()
def test_sinks_are_seen_and_old_tokens_are_not(streaming):
    model, _, ids = streaming
    last = model(ids).logits[:, -1]
    for token, seen in [(0, True), (S, False), (LENGTH - W, False), (LENGTH - 2, True)]:
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 1) % 97
        assert torch.equal(model(changed).logits[:, -1], last) is not seen


@torch.no_grad()
def test_memory_is_constant(gpt2):
    model = sinkattn.enable(gpt2, S, W, headroom=2)
    cache, ids = sinkattn.SinkCache(model), random_ids(2, 500)
    assert cache.nbytes == 0
    feed(model, cache, ids[:, :30])
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.lanes[0].context.layers]
    layers, heads, head_dim = 2, 4, 8
    states = 2 * layers * 2 * heads * (S + W) * head_dim * 4
    for token in range(30, 500):
        feed(model, cache, ids[:, token : token + 1])
        assert states < cache.nbytes <= states + 2 * (S + W + 1) * 8
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.lanes[0].context.layers] == places
    assert cache.get_seq_length() == 500
    assert cache.get_max_length() == -1


@torch.no_grad()
def test_two_tokens_run_for_one_token_of_the_stream(gpt2):
    model, count = sinkattn.enable(gpt2, S, W), 0

    def add(module, args, output):
        nonlocal count
        count += output.shape[1]

    gpt2.transformer.wte.register_forward_hook(add)
    feed(model, sinkattn.SinkCache(model), random_ids(1, S + W + 20 * rebuild_period(model._sinkattn.layout)))
    assert count == S + W + 20 * W


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding with the unpatched model on each token's context."""
    layout = RingLayout(S, W, 0)
    for _ in range(count):
        start = context_start(ids.shape[1] - 1, layout)
        context = torch.cat((ids[:, :S], ids[:, start:]), dim=1)
        ids = torch.cat((ids, model(context).logits[:, -1:].argmax(dim=-1)), dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("prompt", [5, 40])
def test_greedy_is_the_plain_loop_over_the_unpatched_model(absolute, prompt):
    model, ids = build(absolute), random_ids(2, prompt)
    want = greedy(model, ids, 40)
    sinkattn.enable(model, S, W, headroom=10)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), want)
    assert list(stream_tokens(model, ids[:1], max_new_tokens=40, prefill_chunk=7)) == want[0, prompt:].tolist()
    options = {"do_sample": False, "max_new_tokens": 40}
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=8, **options), want[:1])
    sinkattn.disable(model)


@torch.no_grad()
def test_assisted_decoding_equals_greedy(gpt2):
    ids = random_ids(1, 30)
    want = greedy(gpt2, ids, 40)
    assistant = build("gpt2", num_hidden_layers=1, seed=5)
    sinkattn.enable(gpt2, S, W, headroom=25)
    assert torch.equal(gpt2.generate(ids, assistant_model=assistant, max_new_tokens=40, do_sample=False), want)


@torch.no_grad()
def test_turns_on_one_cache_equal_one_long_run(gpt2):
    ids, more = random_ids(1, 20), random_ids(1, 15, seed=1)
    want = greedy(gpt2, torch.cat((greedy(gpt2, ids, 25), more), dim=1), 25)
    cache = sinkattn.SinkCache(sinkattn.enable(gpt2, S, W))
    text = gpt2.generate(ids, cache=cache, max_new_tokens=25, do_sample=False)
    text = torch.cat((text, more), dim=1)
    assert torch.equal(gpt2.generate(text, cache=cache, max_new_tokens=25, do_sample=False), want)
    assert cache.get_seq_length() == want.shape[1] - 1


@torch.no_grad()
def test_reorder_equals_replay(streaming):
    model, _, ids = streaming
    cache, source, new = sinkattn.SinkCache(model), torch.tensor([1, 1], dtype=torch.int32), random_ids(2, 20, seed=5)
    feed(model, cache, ids[:, :29])
    cache.reorder_cache(source)
    want = model(torch.cat((ids[source.long(), :29], new), dim=1)).logits[:, 29:]
    assert rms_error(stream_on(model, cache, new), want) < 2e-6


def stream_on(model, cache, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([feed(model, cache, token) for token in ids.split(1, dim=1)], dim=1)


@torch.no_grad()
def test_beam_search_equals_one_that_encodes_everything_anew(gpt2, monkeypatch):
    ids = random_ids(2, 8)
    options = {"num_beams": 3, "do_sample": False}
    want = gpt2.generate(ids, max_new_tokens=S + W - 8, **options)
    sinkattn.enable(gpt2, S, W)
    assert torch.equal(gpt2.generate(ids, max_new_tokens=S + W - 8, **options), want)
    got = gpt2.generate(ids, max_new_tokens=40, **options)

    def encode_anew(self, beam_idx):  # reuses no keys and values
        (lane,) = self.lanes
        lane.ids, lane.encoded = lane.ids[beam_idx], (S, 0)

    monkeypatch.setattr(ReencodeCache, "reorder_cache", encode_anew)
    assert got.shape == (2, 48)
    assert torch.equal(gpt2.generate(ids, max_new_tokens=40, **options), got)


def test_rollback_limits(streaming):
    """A stream can go back by the headroom, and to any token whose context is still in the ids."""
    model = sinkattn.enable(build("gpt2"), S, W, headroom=5)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 40)
    cache.crop(-3)  # an empty cache, which transformers may crop
    feed(model, cache, ids)
    assert cache.is_croppable
    cache.crop(torch.tensor(-2))
    # The earliest next token is 35. Its context starts at 27, like those of tokens 33 to 38.
    with pytest.raises(RuntimeError, match=r"can roll back 5 tokens more \(headroom 5\), got 6"):
        cache.crop(-6)
    cache.crop(-5)
    with pytest.raises(RuntimeError, match="can roll back 0 tokens more"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="expected a negative number"):
        cache.crop(1)
    assert cache.get_seq_length() == 33
    fixed = sinkattn.SinkCache(streaming[0])
    feed(streaming[0], fixed, ids)
    assert not fixed.is_croppable


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [0, 10, S + W - 1, S + W, 33])
@pytest.mark.parametrize(("tokens", "run"), [(1, 0), (20, 0), (20, 1), (25, 2)])
def test_an_interrupted_forward_does_not_count(streaming, before, tokens, run, error):
    model, want, ids = streaming
    cache = sinkattn.SinkCache(model)
    if before:
        feed(model, cache, ids[:, :before])
    with interrupted(model.transformer.h[1], run, error):
        feed(model, cache, random_ids(2, tokens, seed=7))
    assert cache.get_seq_length() == before
    got = torch.cat((feed(model, cache, ids[:, before : before + 1]), feed(model, cache, ids[:, before + 1 :])), dim=1)
    assert rms_error(got, want[:, before:]) < 2e-6


@torch.no_grad()
def test_a_failed_first_forward_does_not_fix_the_batch(streaming):
    model, want, ids = streaming
    cache = sinkattn.SinkCache(model)
    handle = model.transformer.h[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, random_ids(3, 8))
    handle.remove()
    assert cache.nbytes == 0
    assert rms_error(feed(model, cache, ids), want) < 2e-6
    with pytest.raises(ValueError, match="holds 2 streams, got a batch of 1"):
        feed(model, cache, ids[:1])


@torch.no_grad()
def test_forks_pickles_and_reset(streaming):
    model, want, ids = streaming
    cache = sinkattn.SinkCache(model)
    assert type(cache) is ReencodeCache
    feed(model, cache, ids[:, :25])
    fork, file = copy.deepcopy(cache), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for other in (fork, torch.load(file, weights_only=False), cache):
        assert type(other) is ReencodeCache
        assert rms_error(feed(model, other, ids[:, 25:]), want[:, 25:]) < 2e-6
        other.reset()
        assert other.get_seq_length() == 0
        assert rms_error(feed(model, other, ids), want) < 2e-6
    with pytest.raises(TypeError, match="cannot be copied shallowly"):
        copy.copy(cache)


def test_a_stream_begun_in_inference_mode_goes_on_outside(streaming):
    model, want, ids = streaming
    cache = sinkattn.SinkCache(model)
    with torch.inference_mode():
        model(ids[:, :31], cache=cache)
        cache.reorder_cache(torch.arange(2))
    assert rms_error(feed(model, cache, ids[:, 31:]), want[:, 31:]) < 2e-6


@torch.no_grad()
def test_hidden_states_and_tuples(gpt2):
    ids = random_ids(2, S + W)
    want = gpt2(ids, output_hidden_states=True)
    plain = gpt2.transformer(ids)[0]
    sinkattn.enable(gpt2, S, W)
    got = gpt2(ids, output_hidden_states=True)
    assert all(torch.equal(x, y) for x, y in zip(got.hidden_states, want.hidden_states, strict=True))
    assert [x.shape for x in gpt2(random_ids(2, 50), output_hidden_states=True).hidden_states] == [(2, 50, 32)] * 3
    output = gpt2.transformer(ids, return_dict=False)
    assert type(output) is tuple
    assert torch.equal(output[0], plain)
    assert type(output[1]) is ReencodeCache
    assert cache_name(gpt2(ids, use_cache=False)) is None


@torch.no_grad()
def test_disable_restores_everything(absolute):
    model, ids = build(absolute), random_ids(2, 40)
    plain = model(ids).logits
    before = [sorted(module.__dict__) for module in model.modules()]
    assert sinkattn.enable(model, S, W) is model
    with pytest.raises(ValueError, match="is enabled already"):
        sinkattn.enable(model, S, W)
    twin = copy.deepcopy(model)
    assert rms_error(model(ids).logits, plain) > 1e-2
    sinkattn.disable(model)
    assert [sorted(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(ids).logits, plain)
    assert rms_error(twin(ids).logits, plain) > 1e-2


@torch.no_grad()
def test_calls_that_would_be_wrong_are_refused(streaming):
    model, _, ids = streaming
    ids, embeddings = ids[:, :10], torch.zeros(2, 10, 32)
    for kwargs, error, message in [
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"cache": DynamicCache()}, TypeError, "expected a sinkattn.SinkCache or None, got DynamicCache"),
        (
            {"position_ids": torch.arange(5, 15)[None]},
            ValueError,
            "position_ids: expected consecutive positions",
        ),
        ({"inputs_embeds": embeddings}, ValueError, "inputs_embeds: .* takes input_ids only"),
        ({"token_type_ids": ids}, ValueError, "token_type_ids: .* takes input_ids only"),
        ({"encoder_hidden_states": embeddings}, ValueError, "encoder_hidden_states: .* takes input_ids only"),
    ]:
        with pytest.raises(error, match=message):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match=r"inputs_embeds: .* takes input_ids only"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="expected at least one token that the cache has not seen"):
        model(ids[:, :0])
    other = sinkattn.enable(build("gpt2"), S, W)
    with pytest.raises(ValueError, match="made for another model"):
        other(ids, cache=sinkattn.SinkCache(model))
    cache = sinkattn.SinkCache(model)
    feed(model, cache, ids)
    plain = build("gpt2")
    with pytest.raises(RuntimeError, match=r"works only in the model that sinkattn\.enable prepared"):
        plain(ids, **{forward_cache(plain): cache})
    assert model(ids, attention_mask=torch.ones(2, 10), position_ids=torch.arange(10)[None]).logits.shape == (2, 10, 97)


@torch.no_grad()
def test_a_cache_takes_one_forward_at_a_time(streaming):
    model, want, ids = streaming
    cache, inside, leave, results = sinkattn.SinkCache(model), threading.Event(), threading.Event(), []

    def pause(*args):
        if not inside.is_set():
            inside.set()
            leave.wait(10)

    handle = model.transformer.h[0].register_forward_hook(pause)
    worker = threading.Thread(target=lambda: results.append(feed(model, cache, ids)))
    worker.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="in the middle of a forward already"):
        feed(model, cache, ids)
    assert rms_error(model(ids).logits, want) < 2e-6
    leave.set()
    worker.join()
    handle.remove()
    assert rms_error(results[0], want) < 2e-6


def test_what_cannot_stream_this_way_is_refused(gpt2, monkeypatch):
    with pytest.raises(UnsupportedModelError, match="must not exceed the 512 positions it was trained for, got 513"):
        sinkattn.enable(gpt2, 4, 509)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    bert = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=4)).eval()  # attends to later tokens
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel: is not causal"):
        sinkattn.enable(bert, S, W)
    rotating = GPTJForCausalLM(GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, rotary_dim=8)).eval()
    assert not trial.has_absolute_positions(rotating)
    segments = Lane.segments

    def forgetful(self, new):
        for segment in segments(self, new):
            segment.ids[:, : -segment.num_new] = 0
            yield segment

    monkeypatch.setattr(Lane, "segments", forgetful)
    keys = [sorted(module.__dict__) for module in gpt2.modules()]
    with pytest.raises(UnsupportedModelError, match="differs from the original"):
        sinkattn.enable(gpt2, S, W)
    assert [sorted(module.__dict__) for module in gpt2.modules()] == keys


@torch.no_grad()
def test_all_positions_of_the_table_can_be_used():
    model, ids = build("gpt2", max_position_embeddings=S + W), random_ids(2, LENGTH)
    want = oracle(model, ids)
    assert rms_error(sinkattn.enable(model, S, W)(ids).logits, want) < 2e-6
