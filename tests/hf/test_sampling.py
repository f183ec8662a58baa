"""The ids in sight, and sampling by them: what `generate` would choose, for streams that go on."""

import pytest
import torch
from hf_models import enabled, random_ids
from plain_sampling import Drawn, processors
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

import sinkattn
from sinkattn.hf.cache.id_history import UNKNOWN_ID
from sinkattn.hf.sampling.batch_sampler import ScoredToken
from sinkattn.hf.sampling.in_sight import IdsInSight
from sinkattn.hf.stream import stream_tokens
from sinkattn.hf.versions import forward_cache

SINKS, WINDOW = 2, 9
CPU = torch.device("cpu")


def visible(ids, num_sinks=SINKS, window=WINDOW):
    """Of all ids of a stream, those that the last token sees."""
    return ids[:, [i for i in range(ids.shape[1]) if i < num_sinks or i >= ids.shape[1] - window]]


class PenaltyInSight(LogitsProcessor):
    def __init__(self, penalty):
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty)

    def __call__(self, input_ids, scores):
        return self.penalty(visible(input_ids), scores)


class SeenIds(LogitsProcessor):
    """Records what a processor is called with; changes nothing."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids, scores))
        return scores


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("prompt_tokens", [1, 30])
def test_penalties_are_those_of_generate_over_the_tokens_in_sight(family, prompt_tokens):
    model, ids = enabled(family, SINKS, WINDOW), random_ids(1, prompt_tokens)
    for sampling in ({}, {"temperature": 0.7, "min_p": 0.2, "seed": 3}):
        custom = [PenaltyInSight(20.0)]
        if sampling:
            custom = [*custom, *processors(temperature=0.7, min_p=0.2), Drawn(3)]
        made = model.generate(ids, max_new_tokens=50, do_sample=False, logits_processor=custom)
        tokens = list(stream_tokens(model, ids, max_new_tokens=50, repetition_penalty=20.0, **sampling))
        assert tokens == made[0, prompt_tokens:].tolist()
        assert tokens != list(stream_tokens(model, ids, max_new_tokens=50, **sampling))


def test_all_of_sampling_is_that_of_generate():
    model, ids = enabled("llama", SINKS, WINDOW), random_ids(1, 5)
    sampling = {"temperature": 3.0, "top_k": 50, "top_p": 0.99, "min_p": 0.5}
    custom = [*processors(**sampling), Drawn(7)]
    made = model.generate(ids, max_new_tokens=50, do_sample=False, logits_processor=custom)[0, 5:].tolist()
    assert list(stream_tokens(model, ids, max_new_tokens=50, **sampling, seed=7)) == made
    params = sinkattn.SamplingParams(**sampling, seed=7)
    assert list(stream_tokens(model, ids, max_new_tokens=50, sampling=params)) == made
    greedy = list(stream_tokens(model, ids, max_new_tokens=20))
    assert list(stream_tokens(model, ids, max_new_tokens=20, temperature=3.0, min_p=1.0, seed=0)) == greedy
    assert list(stream_tokens(model, ids, max_new_tokens=20, temperature=3.0, min_p=0.0, seed=0)) != greedy


def test_processors_are_called_with_the_ids_in_sight():
    model, ids, seen = enabled("llama", SINKS, WINDOW), random_ids(1, 5), SeenIds()
    params = sinkattn.SamplingParams(processors=[seen])
    tokens = list(stream_tokens(model, ids, max_new_tokens=20, sampling=params))
    assert tokens == list(stream_tokens(model, ids, max_new_tokens=20))
    whole = torch.cat((ids, torch.tensor([tokens])), dim=1)
    assert len(seen.calls) == 20
    for number, (in_sight, scores) in enumerate(seen.calls):
        assert torch.equal(in_sight, visible(whole[:, : 5 + number]))
        assert int(scores.argmax()) == tokens[number]
        assert (scores.shape, scores.dtype) == ((1, model.config.vocab_size), torch.float32)


def test_log_probabilities_of_a_stream():
    model = enabled("llama", SINKS, WINDOW)
    params = sinkattn.SamplingParams(temperature=2.0, seed=1, logprobs=3)
    tokens = list(stream_tokens(model, [5], max_new_tokens=4, sampling=params))
    assert tokens == list(stream_tokens(model, [5], max_new_tokens=4, temperature=2.0, seed=1))
    for number, token in enumerate(tokens):
        assert isinstance(token, ScoredToken)
        with torch.no_grad():
            expected = model(torch.tensor([[5, *tokens[:number]]])).logits[0, -1].log_softmax(dim=0)
        assert token.logprob == pytest.approx(float(expected[token]), abs=1e-5)
        assert [*token.top_logprobs] == expected.topk(3).indices.tolist()


def test_one_way_of_giving_parameters_at_a_time():
    model = enabled("llama", SINKS, WINDOW)
    with pytest.raises(ValueError, match="sampling: expected no other sampling argument beside it"):
        stream_tokens(model, [5], sampling=sinkattn.SamplingParams(), top_k=3)
    with pytest.raises(ValueError, match="logit_bias: expected ids below 97, got 128"):
        stream_tokens(model, [5], sampling=sinkattn.SamplingParams(logit_bias={128: 1.0}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [3, 10, 40])
def test_a_stream_that_goes_on_remembers_what_is_in_sight(family, first):
    model = enabled(family, SINKS, WINDOW)
    sampling = {"repetition_penalty": 3.0}
    whole = list(stream_tokens(model, [5, 6], max_new_tokens=60, **sampling))
    cache = sinkattn.SinkCache(model)
    begun = list(stream_tokens(model, [5, 6], cache, max_new_tokens=first, **sampling))
    assert begun + list(stream_tokens(model, begun[-1:], cache, max_new_tokens=60 - first, **sampling)) == whole


@pytest.mark.parametrize("parts", [[1], [5, 6], [11, 1, 1], [3, 30, 2], [200]])
def test_ids_in_sight(parts):
    model = enabled("llama", SINKS, WINDOW)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, sum(parts))
    in_sight = IdsInSight(cache, CPU)
    for part in ids.split(parts, dim=1):
        with torch.no_grad():
            model(part, **{forward_cache(model): cache})
        in_sight.append(part)
    assert torch.equal(in_sight.ids, visible(ids))
    assert torch.equal(IdsInSight(cache, CPU).ids, visible(ids))
    cache.reset()
    assert IdsInSight(cache, CPU).ids.shape == (1, 0)


def test_sinks_whose_ids_are_not_recorded_stay_unknown():
    model = enabled("llama", 80, 20)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 300)
    with torch.no_grad():
        model(ids, **{forward_cache(model): cache})
    expected = visible(ids, 80, 20)
    expected[:, 64:80] = UNKNOWN_ID
    assert torch.equal(IdsInSight(cache, CPU).ids, expected)


def test_tokens_that_came_as_embeddings_are_not_penalized():
    model = enabled("llama", SINKS, WINDOW)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 6)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), **{forward_cache(model): cache})
    assert (IdsInSight(cache, CPU).ids == UNKNOWN_ID).all()
    sampling = {"repetition_penalty": 1e6, "max_new_tokens": 1}
    [token] = stream_tokens(model, [5], cache, **sampling)
    with torch.no_grad():
        logits = model(torch.cat((ids, torch.tensor([[5]])), dim=1)).logits[0, -1]
    logits[5] = -torch.inf
    assert token == int(logits.argmax())
