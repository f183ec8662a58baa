"""`generate` of an enabled model, with and without a cache passed, against a plain decoding loop."""

import pytest
import torch
from hf_models import build, enabled, random_ids
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sinkattn

S, W = 4, 28


def greedy(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding in a plain loop over the model."""
    cache, inputs = sinkattn.SinkCache(model), ids
    with torch.no_grad():
        for _ in range(count):
            inputs = model(inputs, cache=cache).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat((ids, inputs), dim=1)
    return ids


@pytest.mark.parametrize("prompt", [1, 20, 32, 33, 200], ids=lambda n: f"prompt{n}")
def test_greedy_equals_the_plain_loop(family, prompt):
    model, ids = enabled(family, S, W), random_ids(2, prompt)
    got = model.generate(ids, max_new_tokens=100, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 100))


def test_short_generation_equals_the_unpatched_model(family):
    model, ids = build(family), random_ids(2, 10)
    want = model.generate(ids, max_new_tokens=22, do_sample=False)
    sinkattn.enable(model, S, W)
    assert torch.equal(model.generate(ids, max_new_tokens=22, do_sample=False), want)
    sinkattn.disable(model)
    assert torch.equal(model.generate(ids, max_new_tokens=22, do_sample=False), want)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_sampling_equals_the_plain_loop(options):
    model, ids = enabled("llama", S, W), random_ids(1, 50)
    torch.manual_seed(3)
    got = model.generate(ids, max_new_tokens=90, do_sample=True, **{"top_k": 0, **options})
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    torch.manual_seed(3)
    cache, inputs, want = sinkattn.SinkCache(model), ids, ids
    with torch.no_grad():
        for _ in range(90):
            logits = model(inputs, cache=cache).logits[:, -1]
            for name, value in options.items():
                logits = warpers[name](value)(want, logits)
            inputs = torch.multinomial(logits.softmax(dim=-1), 1)
            want = torch.cat((want, inputs), dim=1)
    assert torch.equal(got, want)


def test_turns_on_one_cache_equal_one_long_run():
    model, ids = enabled("llama", S, W), random_ids(1, 40)
    cache = sinkattn.SinkCache(model)
    text = ids
    for turn in range(3):
        text = model.generate(text, cache=cache, max_new_tokens=30, do_sample=False)
        text = torch.cat((text, random_ids(1, 15, seed=turn + 1)), dim=1)
        assert cache.get_seq_length() == text.shape[1] - 16  # the last token of a turn is not fed yet
    want = text[:, :40]
    for turn in range(3):
        want = torch.cat((greedy(model, want, 30), random_ids(1, 15, seed=turn + 1)), dim=1)
    assert torch.equal(text, want)


def test_prompts_are_cut_by_prefill_chunk_size():
    model, ids = enabled("llama", S, W), random_ids(2, 200)
    got = model.generate(ids, max_new_tokens=40, do_sample=False, prefill_chunk_size=64)
    assert torch.equal(got, greedy(model, ids, 40))


def test_beam_search_equals_the_unpatched_model_on_short_inputs():
    model, ids = build("llama"), random_ids(2, 8)
    want = model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False)
    sinkattn.enable(model, S, W)
    assert torch.equal(model.generate(ids, max_new_tokens=20, num_beams=3, do_sample=False), want)


def test_streamers_and_stopping_criteria_work():
    class TokenCollector(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class StopAtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 90)

    model, ids = enabled("llama", S, W), random_ids(1, 50)
    streamer = TokenCollector()
    stop = StoppingCriteriaList([StopAtLength()])
    out = model.generate(ids, streamer=streamer, stopping_criteria=stop, do_sample=False, max_new_tokens=100)
    assert out.shape == (1, 90)
    assert streamer.tokens == [*out[0].tolist(), "end"]


def test_what_would_be_wrong_is_refused():
    model, ids = enabled("llama", S, W), random_ids(2, 10)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(TypeError, match="got DynamicCache"):
        model.generate(ids, max_new_tokens=3, cache=DynamicCache())
    with pytest.raises(ValueError, match=r"use_cache: .* got False"):
        model.generate(ids, max_new_tokens=3, use_cache=False)


def test_a_configuration_without_cache_does_not_matter():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 10)
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(ids, max_new_tokens=50, do_sample=False), greedy(model, ids, 50))
