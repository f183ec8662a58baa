"""Learning along a stream: the losses are those of learner and model by hand, and a leak is not let through."""

import copy
import math
from contextlib import contextmanager

import naive
import numpy as np
import pytest
import torch
from test_interruption import interrupted_at

import sinkattn
from sinkattn.evaluate import learn
from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.learn import Settings
from sinkattn.evaluate.methods import CacheSize, Streamed
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks
from sinkattn.evaluate.variant import FROZEN, Variant
from sinkattn.hf import OnlineLearner

SIZE, CHUNK, STRETCH, TOKENS = CacheSize(4, 60), 32, 64, 200
RATE = {"lora": 1e-2, "all": 1e-3}


def quiet(*progress):
    pass


def settings(*variants, **options):
    parsed = tuple(map(Variant.parse, variants))
    return Settings(
        **{"cache": SIZE, "variants": parsed, "tokens": TOKENS, "stretch": STRETCH, "chunk": CHUNK, **options}
    )


def run(model, ids, *variants, held_out=None, on_stretch=quiet, on_progress=quiet, **options):
    return learn.run(model, iter(ids.tolist()), settings(*variants, **options), held_out or {}, on_progress, on_stretch)


def by_hand(model, ids, variant):
    """Mean loss of each stretch, from a learner that reads stretches as a whole."""
    torch.manual_seed(0)
    learner = OnlineLearner(
        sinkattn.enable(copy.deepcopy(model), SIZE.num_sinks, SIZE.window),
        lambda weights: torch.optim.AdamW(weights, lr=RATE[variant.learn], weight_decay=0),
        chunk=CHUNK,
        learn=variant.learn,
        decay=0.01 if variant.decay else 0,
        after_update="reencode" if variant.reencode else "keep",
    )
    return [learner.step(piece) for piece in ids[:TOKENS].split(STRETCH)]


@pytest.mark.parametrize("what", ["lora", "all", "lora+decay", "lora+reencode", "all+decay+reencode"])
def test_losses_are_those_of_learner_and_frozen_model_by_hand(what, model, ids):
    weights = copy.deepcopy(model.state_dict())
    name = f"{what}@{RATE[what.partition('+')[0]]:g}"
    result = run(model, ids, name)
    frozen = naive.losses(copy.deepcopy(model).double(), ids[:TOKENS], 4, 60)
    expected = by_hand(model, ids, Variant.parse(what))
    begins = range(0, TOKENS, STRETCH)
    assert [(each.begin, each.end) for each in result.stretches] == [(x, min(x + STRETCH, TOKENS)) for x in begins]
    for each, loss in zip(result.stretches, expected, strict=True):
        part = frozen[max(0, each.begin - 1) : each.end - 1]
        means = {method: each.losses[method].mean() for method in (FROZEN, name)}
        assert {mean.tokens for mean in means.values()} == {len(part)}
        assert means[FROZEN].loss == pytest.approx(part.mean().item(), abs=1e-4)
        assert means[name].loss == pytest.approx(loss, abs=1e-4)
    assert result.mean(FROZEN).loss == pytest.approx(frozen.mean().item(), abs=1e-4)
    difference = result.mean(name).loss - result.mean(FROZEN).loss
    assert result.minus_frozen(name).loss == pytest.approx(difference, abs=1e-6)
    # They could be confused only if learning changed nothing.
    assert abs(difference) > 1e-3
    assert all(map(torch.equal, model.state_dict().values(), weights.values()))


class Leaking(OnlineLearner):
    """Learns from a piece, then predicts it."""

    def step(self, piece, mask=None):
        before = copy.deepcopy(self.cache)
        super().step(piece, mask)
        with torch.no_grad():
            logits = self.model(piece[None], cache=before).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, piece[1:]).item() if len(piece) > 1 else math.nan


class LeakingChunks(OnlineLearner):
    """The same, but only of whole chunks at once."""

    def _read(self, ids, mask):
        if self._is_frozen or ids.shape[1] < CHUNK:
            return super()._read(ids, mask)
        before, last = copy.deepcopy(self.cache), self._last_logits
        super()._read(ids, mask)
        with torch.no_grad():
            logits = self.model(ids, cache=before).logits
        first = logits[:, :0] if last is None else last[:, None]
        losses = torch.nn.functional.cross_entropy(
            torch.cat((first, logits[:, :-1]), 1)[0].float(),
            ids[0, int(last is None) :],
            reduction="none",
        )
        return losses[None]


@pytest.mark.parametrize("leaking", [Leaking, LeakingChunks])
@pytest.mark.parametrize("variant", ["lora", "all", "lora+reencode", "all@0.001"])
def test_tokens_that_are_scored_after_they_were_learned_from_are_not_let_through(
    variant, leaking, model, ids, monkeypatch
):
    honest = run(model, ids, variant).mean(variant)
    monkeypatch.setattr(learn, "OnlineLearner", leaking)
    with pytest.raises(RuntimeError, match="tokens were scored after they were learned from"):
        run(model, ids, variant)
    # What it would have made of the figures.
    monkeypatch.setattr(learn, "_checked_step", lambda learner, chunk: learner.step(chunk))
    assert run(model, ids, variant).mean(variant).loss < honest.loss


@pytest.mark.parametrize("leaking", [Leaking, LeakingChunks])
def test_leaks_are_found_in_half_precision(leaking, model, ids, monkeypatch):
    half = copy.deepcopy(model).bfloat16()
    run(half, ids, "lora", "lora+reencode@0.003")
    monkeypatch.setattr(learn, "OnlineLearner", leaking)
    with pytest.raises(RuntimeError, match="tokens were scored after they were learned from"):
        run(half, ids, "lora")


def test_a_check_changes_neither_losses_nor_weights(model, ids, monkeypatch):
    checked = run(model, ids, "all@0.001")
    monkeypatch.setattr(learn, "_checked_step", lambda learner, chunk: learner.step(chunk))
    plain = run(model, ids, "all@0.001")
    assert checked.mean("all@0.001").loss == pytest.approx(plain.mean("all@0.001").loss, abs=1e-5)
    for x, y in zip(*(each.learners["all@0.001"].parameters.values() for each in (checked, plain)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_seed_makes_it_repeatable(model, ids):
    losses = [run(model, ids, "lora@0.01", seed=seed).mean("lora@0.01").loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_what_is_held_out_is_scored_after_every_stretch(model, ids):
    kept = {"one": ids[1000:1100], "other": ids[1200:1300]}
    after = []

    def on_stretch(result):
        [learner] = result.learners.values()
        with torch.no_grad():
            logits = learner.model(kept["other"][None], use_cache=False).logits[0, :-1]
        after.append(torch.nn.functional.cross_entropy(logits, kept["other"][1:]).item())

    result = run(model, ids, "all@0.001", held_out=kept, on_stretch=on_stretch)
    frozen = naive.losses(copy.deepcopy(model).double(), kept["one"], 4, 60)
    assert result.held_out["one"].mean().loss == pytest.approx(frozen.mean().item(), abs=1e-4)
    got = [each.held_out["all@0.001"]["other"].mean().loss for each in result.stretches]
    assert got == pytest.approx(after, abs=1e-4)
    assert len(set(got[:3])) == 3
    assert got[2] == got[3], "the last tokens are no chunk"
    assert abs(got[0] - result.held_out["other"].mean().loss) > 1e-3


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_stretches_become_longer(tokens, model, ids, monkeypatch):
    whole = run(model, ids[:TOKENS], "all", tokens=tokens)
    monkeypatch.setattr(learn, "MAX_STRETCHES", 2)
    told = []
    result = run(model, ids[:TOKENS], "all", tokens=tokens, on_stretch=lambda now: told.append(now.tokens))
    assert [(each.begin, each.end) for each in whole.stretches] == [(0, 64), (64, 128), (128, 192), (192, 200)]
    assert [(each.begin, each.end) for each in result.stretches] == [(0, 128), (128, 200)]
    assert told == [64, 128, 200]
    for name in (FROZEN, "all"):
        assert result.mean(name).tokens == TOKENS - 1
        assert result.mean(name).loss == pytest.approx(whole.mean(name).loss, abs=1e-6)
        assert result.stretches[1].losses[name].mean().tokens == 72


def test_intervals_of_what_a_learner_gains_hold_the_truth():
    """The gain changes slowly: neighbouring chunks are correlated."""
    rng, held = np.random.default_rng(0), {"few": 0, "many": 0}
    for _ in range(300):
        gain = rng.normal(size=400)
        for i in range(1, 400):
            gain[i] += 0.8 * gain[i - 1]
        learner, frozen = Blocks(0, 400 * 32, 32), Blocks(0, 400 * 32, 32)
        learner.add(0, np.repeat(gain, 32))
        frozen.add(0, np.zeros(400 * 32))
        for name, mean in (("few", learn.minus_frozen(learner, frozen)), ("many", learner.difference(frozen))):
            held[name] += abs(mean.loss) < mean.margin
    assert held["few"] > 0.92 * 300 > held["many"]


def test_a_chunk_counts_when_all_have_read_it(model, ids):
    """Ctrl-C after the frozen model has read the third chunk, which is the first of the second stretch."""
    with interrupted_at(model, 1 + 2 + 1 + 1 + 1 + 1 + 1):
        result = run(model, ids, "all")
    assert [(each.begin, each.end) for each in result.stretches] == [(0, 64)]
    assert {blocks.mean().tokens for blocks in result.stretches[0].losses.values()} == {63}
    with interrupted_at(model, 1), pytest.raises(Interrupted):
        run(model, ids, "all")


def test_times_are_of_chunks_that_are_not_checked(model, ids, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(learn.time, "perf_counter", lambda: now[0])

    @contextmanager
    def slow(owner, name, seconds):
        original = getattr(owner, name)

        def slower(*arguments):
            now[0] += seconds
            return original(*arguments)

        monkeypatch.setattr(owner, name, slower)
        yield

    with slow(Streamed, "feed", 1.0), slow(OnlineLearner, "step", 5.0):
        result = run(model, ids, "all")
    assert result.timed == 3 * CHUNK
    assert result.seconds == {FROZEN: 3.0, "all": 15.0}


def test_the_estimate_counts_what_is_read():
    speed = Speed(step=1.0, token=0.1)
    reading = 7 + 20
    chosen = settings("all", "lora+reencode", held_out=10)
    assert chosen.seconds(speed) == pytest.approx(reading * (1 + 2 * 3) + 7 * (6.4 + 1) + 4 * 10 * 2 * 0.1)
    assert chosen.seconds(speed, 3) - chosen.seconds(speed) == pytest.approx(2 * 4 * 10 * 2 * 0.1)


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (["all"], {"stretch": 65}, r"stretch: expected a multiple of the chunk \(32\), got 65"),
        (["all", "all"], {}, "variants: expected each once, got all all"),
        (["all@0.00100000001", "all@0.00100000002"], {}, "variants: expected each once, got all@0.001 all@0.001"),
        (["all"], {"tokens": 1}, "text: expected two tokens or more"),
        (["all"], {"chunk": 1}, "chunk: expected 2 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(variants, options, message, model, ids):
    with pytest.raises(ValueError, match=message):
        run(model, ids, *variants, **options)


def test_a_loss_that_is_not_finite_ends_it(model, ids, monkeypatch):
    step = OnlineLearner.step
    losses = iter([math.nan, 1.0, math.inf])
    monkeypatch.setattr(OnlineLearner, "step", lambda self, piece: step(self, piece) * 0 + next(losses))
    monkeypatch.setattr(learn, "TOLERANCE", np.inf)
    with pytest.raises(ValueError, match="all: the loss is not finite after 32 tokens; try a lower learning rate"):
        run(model, ids, "all")
