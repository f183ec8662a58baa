"""`Follower`: what it says is what a new stream says, and leaves no trace."""

import math
import random

import pytest
import torch
from hf_models import build, enabled, random_ids

import sinkattn
from sinkattn import OnlineLearner
from sinkattn.hf.follow import Follower
from sinkattn.hf.stream import stream_tokens

S, W = 2, 14


def learner():
    """Of a new model."""
    model = sinkattn.enable(build("llama"), S, W)
    return OnlineLearner(model, lambda weights: torch.optim.SGD(weights, lr=0.3), chunk=16, learn="all")


def following(learner):
    return Follower(learner.model, learner)


def cut(ids):
    """In pieces of random sizes, some empty."""
    rng, begin = random.Random(0), 0
    while begin < len(ids):
        size = rng.choice([0, 1, 2, 5, 30])
        yield ids[begin : begin + size]
        begin += size


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next"])
def test_it_says_what_a_new_stream_says(family):
    """Also re-encoding models, and those with states that cannot be rolled back."""
    model, ids = enabled(family, S, W), random_ids(1, 100)[0].tolist()
    follower, read = Follower(model), []
    assert list(follower.say(ids[:5], max_new_tokens=4)) == list(stream_tokens(model, ids[:5], max_new_tokens=4))
    for piece in cut(ids):
        follower.read(piece)
        read += piece
        if read:
            expected = list(stream_tokens(model, [*read, 7, 8], max_new_tokens=6))
            assert list(follower.say([7, 8], max_new_tokens=6)) == expected
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 9}
    assert list(follower.say(**options)) == list(stream_tokens(model, ids, **options))
    assert follower.num_read == 100
    assert follower.cache.tokens_seen == 99


def test_it_has_nothing_to_say_about_nothing():
    with pytest.raises(ValueError, match="prompt_ids: expected"):
        Follower(enabled("llama", S, W)).say()


def states(follower):
    return [x for layer in follower.cache.layers for x in (layer.ring.keys, layer.ring.values, layer.ring.seen)]


@pytest.mark.parametrize("learns", [False, True])
def test_what_follows_does_not_depend_on_what_was_said(learns):
    ids = random_ids(1, 100)[0].tolist()
    followers = []
    for speaks in (False, True):
        follower = following(learner()) if learns else Follower(enabled("llama", S, W))
        followers.append(follower)
        for piece in cut(ids):
            follower.read(piece)
            if speaks and follower.num_read:
                assert len(list(follower.say([5], max_new_tokens=20))) == 20
    silent, speaking = followers
    assert all(map(torch.equal, states(silent), states(speaking)))
    assert list(silent.say(max_new_tokens=9)) == list(speaking.say(max_new_tokens=9))
    assert silent.loss == speaking.loss or not learns
    assert speaking.num_said > silent.num_said


def test_the_loss_is_of_each_token_before_it_is_learned_from():
    ids = random_ids(1, 100)[0]
    follower = following(learner())
    assert math.isnan(follower.loss)
    for piece in cut(ids.tolist()):
        follower.read(piece)
    assert follower.loss == pytest.approx(learner().step(ids[:99]), rel=1e-5)


def test_nothing_is_learned_from_what_is_read_so():
    own = learner()
    before = [x.clone() for x in own.parameters.values()]
    follower = following(own)
    follower.read(random_ids(1, 50)[0].tolist(), learn=False)
    assert all(map(torch.equal, before, own.parameters.values()))
    assert math.isnan(follower.loss)
    follower.read(random_ids(1, 50)[0].tolist())
    assert not all(map(torch.equal, before, own.parameters.values()))
