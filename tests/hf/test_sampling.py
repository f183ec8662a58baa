"""The ids in sight, and penalties over them: those of `generate` with the same ids, for streams that go on."""

import pytest
import torch
from hf_models import enabled, random_ids
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

import sinkattn
from sinkattn.hf.cache.id_history import UNKNOWN_ID
from sinkattn.hf.sampling import IdsInSight, Sampler
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("prompt_tokens", [1, 30])
def test_penalties_are_those_of_generate_over_the_tokens_in_sight(family, prompt_tokens):
    model, ids = enabled(family, SINKS, WINDOW), random_ids(1, prompt_tokens)
    processors = LogitsProcessorList([PenaltyInSight(20.0)])
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "min_p": 0.2}):
        torch.manual_seed(3)
        made = model.generate(ids, max_new_tokens=50, logits_processor=processors, **options)
        sampling = {"temperature": 0.0} if not options.pop("do_sample") else options
        torch.manual_seed(3)
        tokens = list(stream_tokens(model, ids, max_new_tokens=50, repetition_penalty=20.0, **sampling))
        assert tokens == made[0, prompt_tokens:].tolist()
        assert tokens != list(stream_tokens(model, ids, max_new_tokens=50, seed=3, **sampling))


def test_min_p_is_that_of_generate():
    model, ids = enabled("llama", SINKS, WINDOW), random_ids(1, 5)
    sampling = {"temperature": 3.0, "top_k": 50, "top_p": 0.99, "min_p": 0.5}
    torch.manual_seed(3)
    made = model.generate(ids, max_new_tokens=50, do_sample=True, **sampling)
    torch.manual_seed(3)
    assert list(stream_tokens(model, ids, max_new_tokens=50, **sampling)) == made[0, 5:].tolist()
    greedy = list(stream_tokens(model, ids, max_new_tokens=20))
    assert list(stream_tokens(model, ids, max_new_tokens=20, temperature=3.0, min_p=1.0, seed=0)) == greedy
    assert list(stream_tokens(model, ids, max_new_tokens=20, temperature=3.0, min_p=0.0, seed=0)) != greedy


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


def test_ends_of_a_text_are_exempt():
    sampler_of = {
        exempt: Sampler(
            temperature=0,
            top_k=0,
            top_p=1,
            min_p=0,
            repetition_penalty=2,
            exempt_ids=exempt,
            seed=None,
            device=CPU,
        )
        for exempt in ((), (1,))
    }
    logits, ids = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0, 1]])
    assert sampler_of[()].choose(logits, ids).tolist() == [[2]]
    assert sampler_of[(1,)].choose(logits, ids).tolist() == [[1]]
    assert logits.tolist() == [[1.0, 3.0, 2.0]]
