"""Sampling for a batch: the distributions of transformers' processors, whoever shares the batch, and what it costs."""

import random

import pytest
import torch
from plain_sampling import processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

from sinkattn.hf.sampling.batch_sampler import BatchSampler, ScoredToken
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.random_numbers import Draws
from sinkattn.hf.sampling.stages import STAGES
from sinkattn.hf.sampling.stream_sampler import StreamSampler

CPU = torch.device("cpu")
VOCABULARY = 50


def stream_of(vocabulary=VOCABULARY, end_ids=(), **params):
    return StreamSampler(SamplingParams(**params), vocabulary=vocabulary, end_ids=end_ids)


def scores_of(logits, ids=None, **params):
    """What one stream's stages make of logits ``[1, vocabulary]``."""
    stream, scores = stream_of(logits.shape[1], **params), logits.clone()
    for stage in STAGES:
        if stage.wanted(stream.params):
            scores = stage.prepare([stream], CPU)(scores, ids)
    return scores


def random_options(rng):
    options = {"temperature": rng.choice([0.3, 1.0, 2.5])}
    if rng.random() < 0.5:
        options["top_k"] = rng.choice([1, 3, 10, 1000])
    if rng.random() < 0.5:
        options["top_p"] = rng.uniform(0.01, 0.99)
    if rng.random() < 0.5:
        options["min_p"] = rng.choice([0.05, 0.5, 1.0])
    if rng.random() < 0.5:
        options["repetition_penalty"] = rng.choice([0.7, 1.3])
    return options


@pytest.mark.parametrize("ties", [False, True])
def test_distributions_are_those_of_transformers(ties):
    """The same tokens with the same probabilities, ties included."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(300):
        options, vocabulary = random_options(rng), rng.choice([1, 2, 7, 50])
        logits = torch.randn(1, vocabulary, generator=generator) * 3
        if ties:
            logits = logits.round()
        ids = torch.randint(vocabulary, (1, 6), generator=generator)
        expected = processors(**options)(ids, logits)
        scores = scores_of(logits, ids, **options)
        if "top_p" in options:  # which of equally likely tokens transformers leaves out is up to its sort
            scores, expected = scores.sort(dim=1).values, expected.sort(dim=1).values
        assert torch.equal(scores.isfinite(), expected.isfinite()), options
        torch.testing.assert_close(scores.softmax(dim=1), expected.softmax(dim=1), atol=1e-6, rtol=1e-5)
        sizes.add(int(scores.isfinite().sum()))
    assert len(sizes) > 10, "filters have left different numbers of tokens"


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 2.0, 1.0, -4.0]]).expand(4000, -1)
    streams = [stream_of(6, temperature=1.5, min_p=0.1, seed=seed) for seed in range(4000)]
    ids = BatchSampler().choose(logits, streams).ids
    expected = scores_of(logits[:1], temperature=1.5, min_p=0.1).softmax(dim=1)[0]
    counts = ids.bincount(minlength=6)
    assert counts[expected == 0].sum() == 0
    error = (counts / 4000 - expected).abs()
    assert (error <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_draw_is_where_the_sum_of_probabilities_passes_it():
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    stream, sampler = stream_of(temperature=1.0, seed=5), BatchSampler()
    draws = Draws([5], [0], CPU)
    sums = logits[0].double().softmax(dim=0).cumsum(dim=0)
    for number in range(50):
        expected = int((sums <= draws.uniform()).sum())
        assert sampler.choose(logits, [stream]).read() == [expected]
        assert stream.draws == number + 1


SORTS = [
    {},
    {"repetition_penalty": 1.4},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8, "presence_penalty": 1.0},
    {"temperature": 1.5, "top_p": 0.3, "frequency_penalty": 0.5},
    {"temperature": 2.0, "min_p": 0.1, "logit_bias": {3: 5.0, 4: -torch.inf}},
    {"temperature": 2.0, "logit_bias": {9: 1.0}, "processors": [NoRepeatNGramLogitsProcessor(1)]},
    {"logit_bias": {0: 100.0}, "logprobs": 2},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "logprobs": 0},
]


def test_tokens_do_not_depend_on_the_batch():
    """Streams join and leave, and others share the batch; each gets what it gets alone."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    options = [{**rng.choice(SORTS), "seed": seed} for seed in range(12)]
    batched, alone = ([stream_of(**each, end_ids=[7]) for each in options] for _ in range(2))
    sampler, samplers = BatchSampler(), [BatchSampler() for _ in options]
    members = []
    for step in range(60):
        if step % 7 == 0:
            members = rng.sample(range(12), rng.randint(1, 12))
        logits = torch.randn(len(members), VOCABULARY, generator=generator) * 3
        ids = torch.randint(-2, VOCABULARY, (len(members), 8), generator=generator)
        ids[:, -1] = ids[:, -1].clamp(min=0)
        tokens = sampler.choose(logits, [batched[member] for member in members], ids).read()
        for row, member in enumerate(members):
            one = samplers[member].choose(logits[row : row + 1], [alone[member]], ids[row : row + 1]).read()
            assert tokens[row] == one[0]
            assert isinstance(tokens[row], ScoredToken) == isinstance(one[0], ScoredToken)
            if isinstance(tokens[row], ScoredToken):
                assert (tokens[row].logprob, tokens[row].top_logprobs) == (one[0].logprob, one[0].top_logprobs)


def test_penalties_count_the_known_tokens_in_sight():
    logits = torch.tensor([[2.0, -2.0, 3.0, 1.0, 0.5, 4.0]])
    ids = torch.tensor([[-5, 0, 1, 0, 5, 5]])
    options = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    stream = stream_of(6, end_ids=[5], **options)
    [stage] = [stage for stage in STAGES if stage.wanted(stream.params)]
    scores = stage.prepare([stream], CPU)(logits.clone(), ids)
    assert scores.tolist() == [[2 / 2 - 0.25 - 2 * 0.5, -2 * 2 - 0.25 - 0.5, 3.0, 1.0, 0.5, 4.0]]
    unknown = torch.full((1, 6), -1)
    assert torch.equal(stage.prepare([stream], CPU)(logits.clone(), unknown), logits)


def test_biases_forbid_and_favour():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    streams = [stream_of(3, logit_bias=bias) for bias in ({1: -torch.inf}, {}, {0: 5.0, 2: 4.5})]
    assert BatchSampler().choose(logits, streams).read() == [2, 1, 2]


class Overwriting(LogitsProcessor):
    def __call__(self, input_ids, scores):
        assert input_ids.tolist() == [[4, 5]]
        return scores.fill_(0.0)


def test_a_processor_that_writes_into_its_scores_changes_no_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    before, ids = logits.clone(), torch.tensor([[-1, 4, 5], [1, 2, 3]])
    chosen = BatchSampler().choose(logits, [stream_of(3, processors=[Overwriting()], logprobs=1), stream_of(3)], ids)
    assert torch.equal(logits, before)
    [token, other] = chosen.read()
    assert (token, other) == (0, 1)
    logprobs = before[0].log_softmax(dim=0)
    assert token.logprob == pytest.approx(float(logprobs[0]))
    assert token.top_logprobs == {1: pytest.approx(float(logprobs[1]))}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_cannot_be_sampled_is_an_error(bad):
    logits = torch.zeros(2, VOCABULARY)
    logits[1] = bad
    chosen = BatchSampler().choose(logits, [stream_of(temperature=1.0, logprobs=0) for _ in range(2)])
    with pytest.raises(RuntimeError, match=r"logits: expected finite ones, .* got row 1"):
        chosen.read()


def test_a_stream_goes_on_from_its_state_and_as_a_fork():
    options = {"temperature": 1.0, "seed": -3}
    logits = torch.randn(20, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def go_on(stream, logits):
        sampler = BatchSampler()
        return [sampler.choose(each, [stream]).read()[0] for each in logits]

    whole, stream = go_on(stream_of(**options), logits), stream_of(**options)
    first = go_on(stream, logits[:8])
    other, fork = stream_of(temperature=1.0), stream.fork()
    other.restore(stream.state())
    for each in (stream, fork, other):
        assert first + go_on(each, logits[8:]) == whole
    assert stream.state() == {"seed": -3, "draws": 20, "grammar_ids": []}
    # A sampler that has seen the stream notices that it was moved.
    sampler, stream = BatchSampler(), stream_of(**options)
    assert [sampler.choose(each, [stream]).read()[0] for each in logits[:8]] == first
    stream.draws = 0
    assert [sampler.choose(each, [stream]).read()[0] for each in logits] == whole


def test_seeds_come_from_torch_unless_given():
    torch.manual_seed(0)
    first, second = (stream_of(temperature=1.0).seed for _ in range(2))
    assert first != second
    torch.manual_seed(0)
    stream_of()  # greedy: draws nothing
    stream_of(temperature=1.0, seed=2)
    assert stream_of(temperature=1.0).seed == first


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_greedy_streams_cost_an_argmax():
    sampler, logits = BatchSampler(), torch.randn(3, VOCABULARY, dtype=torch.bfloat16)
    streams = [stream_of() for _ in range(3)]
    sampler.choose(logits, streams)
    with Operators() as operators:
        ids = sampler.choose(logits, streams).ids
    assert operators.names == ["argmax"]
    assert torch.equal(ids, logits.argmax(dim=1))


def test_a_step_reads_nothing_from_the_device():
    """On a meta device nothing can be read."""
    sampler, device = BatchSampler(), torch.device("meta")
    streams = [stream_of(**options) for options in SORTS if not options.get("processors")]
    logits = torch.empty(len(streams), VOCABULARY, device=device)
    ids = torch.empty(len(streams), 8, dtype=torch.int64, device=device)
    chosen = sampler.choose(logits, streams, ids)
    assert (chosen.ids.shape, chosen.ids.dtype) == ((len(streams),), torch.int64)
