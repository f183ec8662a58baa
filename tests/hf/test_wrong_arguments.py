"""Arguments of the wrong kind, given to what takes an enabled model: one error that names them, nothing is changed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hf_models import build

import sinkattn
from sinkattn import BackgroundLearner, OnlineLearner, SamplingParams, SinkCache, StreamPool
from sinkattn.hf import stream_tokens

IDS = [1, 2, 3]


@pytest.fixture(scope="module")
def model():
    return sinkattn.enable(build("llama"), 2, 16)


@pytest.fixture
def made(model, tmp_path):
    with StreamPool(model, 2) as pool:
        stream = pool.open()
        stream.feed(IDS)
        stream.save(tmp_path / "saved")
        yield SimpleNamespace(model=model, pool=pool, stream=stream, path=tmp_path / "saved")


CALLS = {
    "max_streams: expected a whole number, got 2.5": lambda x: StreamPool(x.model, 2.5),
    "max_parked: expected a whole number, got nan": lambda x: StreamPool(x.model, max_parked=float("nan")),
    "tokenizer: expected a tokenizer of transformers or None, got str": lambda x: StreamPool(x.model, tokenizer="gpt2"),
    "sampling: expected SamplingParams, got dict": lambda x: x.pool.open(sampling={"temperature": 1}),
    "sampling: expected SamplingParams, got float": lambda x: x.stream.generate(sampling=0.8),
    "sampling: expected SamplingParams, got str": lambda x: x.pool.load(x.path, sampling="greedy"),
    "sampling: expected SamplingParams, got list": lambda x: stream_tokens(x.model, IDS, sampling=[0.8]),
    "path: expected a path, got float": lambda x: x.pool.load(2.5),
    "path: expected a path, got NoneType": lambda x: sinkattn.load_stream(x.model, None),
    "path: expected a path, got int": lambda x: x.stream.save(1),
    "max_new_tokens: expected a whole number, got 'a'": lambda x: x.stream.generate("a"),
    "stop: expected a collection of ids and texts, got int": lambda x: x.stream.generate(stop=2),
    "count: expected a whole number, got 2.5": lambda x: x.stream.rollback(2.5),
    "count: expected a whole number, got None": lambda x: x.stream.rollback(None),
    "num_sinks: expected a whole number, got 2.5": lambda x: SinkCache(x.model, num_sinks=2.5),
    "num_sinks: expected a whole number, got '4'": lambda x: sinkattn.enable(build("llama"), "4"),
    "max_batch_size: expected a whole number, got 2.5": lambda x: SinkCache(x.model, 2.5),
    "prompt_ids: expected ids [tokens], got str:": lambda x: stream_tokens(x.model, "text"),
    "prompt_ids: expected ids [tokens], got torch.float32": lambda x: stream_tokens(x.model, torch.ones(2)),
    "max_new_tokens: expected a whole number, got 2.5": lambda x: stream_tokens(x.model, IDS, max_new_tokens=2.5),
    "stop_ids: expected ids, got 'x'": lambda x: stream_tokens(x.model, IDS, stop_ids=["x"]),
    "stop_ids: expected a collection of ids, got int": lambda x: stream_tokens(x.model, IDS, stop_ids=2),
    "cache: expected a sinkattn.SinkCache or None, got str": lambda x: stream_tokens(x.model, IDS, "cache"),
    "config: expected a GenerationConfig or None, got dict": lambda x: SamplingParams.from_generation_config({}),
    "chunk: expected a whole number, got 2.5": lambda x: OnlineLearner(x.model, learn="all", chunk=2.5),
    "every: expected a whole number, got nan": lambda x: OnlineLearner(x.model, learn="all", every=float("nan")),
    "decay: expected 0 to 1, got 'a'": lambda x: OnlineLearner(x.model, learn="all", decay="a"),
    "max_norm: expected more than 0, or None, got 'a'": lambda x: OnlineLearner(x.model, learn="all", max_norm="a"),
    "optimizer: expected an optimizer, or a function, got str": lambda x: OnlineLearner(x.model, "sgd", learn="all"),
    "share: expected 0 to 1, got 'a'": lambda x: BackgroundLearner(x.model, learn="all", share="a"),
    "capacity: expected a whole number, got 2.5": lambda x: BackgroundLearner(x.model, learn="all", capacity=2.5),
}


@pytest.mark.parametrize("message", CALLS)
def test_the_error_names_the_argument(made, message):
    before = {name: x.requires_grad for name, x in made.model.named_parameters()}
    with pytest.raises((TypeError, ValueError)) as error:
        CALLS[message](made)
    assert str(error.value).startswith(message)
    assert {name: x.requires_grad for name, x in made.model.named_parameters()} == before
    assert len(made.pool) == 1
    assert made.stream.in_sight == IDS


def test_a_learner_takes_tensors_only(model):
    learner = OnlineLearner(copy.deepcopy(model), learn="all")
    for arguments, message in ((([1, 2],), "piece"), ((torch.tensor(IDS), [True]), "mask")):
        with pytest.raises(TypeError, match=rf"^{message}: expected a tensor, got list$"):
            learner.step(*arguments)
    with pytest.raises(TypeError, match=r"^path: expected a path, got float$"):
        learner.save(2.5)
    assert learner.cache.tokens_seen == 0


def test_a_pool_of_a_disabled_model_says_so():
    model = sinkattn.enable(build("llama"), 2, 16)
    with StreamPool(model, 2) as pool:
        stream = pool.open()
        stream.feed(IDS)
        tokens = stream.generate()
        next(tokens)
        in_sight = stream.in_sight
        sinkattn.disable(model)
        for call in (lambda: stream.feed([4]), lambda: stream.generate(1), pool.open, lambda: next(tokens)):
            with pytest.raises(ValueError, match=r"^model: expected a model prepared by sinkattn.enable"):
                call()
        assert stream.in_sight == in_sight
        assert len(pool) == 1
        sinkattn.enable(model, 2, 16)
        with pytest.raises(ValueError, match=r"^model: expected one that stays enabled, got one that was enabled anew"):
            stream.feed([4])
        assert stream.in_sight == in_sight


@pytest.mark.parametrize("temperature", [1e-40, 1e-320, 1e-36])
def test_a_temperature_that_underflows_takes_the_likeliest_token(model, temperature):
    greedy = list(stream_tokens(model, IDS, max_new_tokens=20))
    sampling = SamplingParams(temperature=temperature, seed=0)
    assert list(stream_tokens(model, IDS, max_new_tokens=20, sampling=sampling)) == greedy
