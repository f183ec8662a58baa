"""`OnlineLearner`: what it returns, what it changes, and that no token is predicted by weights that have seen it."""

import copy
import math
import warnings

import pytest
import torch
from families import build
from hf_models import random_ids
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import sinkattn
from sinkattn import OnlineLearner
from sinkattn.hf.learner import _adapted_layers
from sinkattn.hf.reencode.lanes import context_start

S, W, CHUNK = 2, 14, 8


def enabled(family: str = "llama", **options):
    return sinkattn.enable(build(family, **options), S, W)


def sgd(weights: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.3)


def make_learner(model=None, **options) -> OnlineLearner:
    return OnlineLearner(model or enabled(), **{"optimizer": sgd, "chunk": CHUNK, "learn": "all", **options})


@torch.no_grad()
def losses(model, ids: Tensor) -> Tensor:
    """Losses of all tokens but the first, with the weights as they are."""
    logits = model(ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def repeated(batch: int = 1, times: int = 12) -> Tensor:
    """A text that can be learned, not remembered: its period is longer than what is in sight."""
    return random_ids(batch, 24).repeat(1, times)


def weights_of(learner: OnlineLearner) -> list[Tensor]:
    return [x.detach().clone() for x in learner.parameters.values()]


def test_a_frozen_learner_predicts_as_the_model_does():
    model = enabled()
    learner, ids = make_learner(model), random_ids(2, 50)
    learner.freeze()
    before = weights_of(learner)
    first, second = learner.step(ids[:, :30]), learner.step(ids[:, 30:])
    want = losses(model, ids)
    assert first == pytest.approx(want[:, :29].mean().item(), rel=1e-5)
    assert second == pytest.approx(want[:, 29:].mean().item(), rel=1e-5)
    assert all(map(torch.equal, weights_of(learner), before))
    assert learner.num_updates == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_learns(family):
    ids = repeated()
    frozen, learner = (make_learner(enabled(family)) for _ in range(2))
    frozen.freeze()
    # The same weights at first, so the same loss of the first chunk.
    assert learner.step(ids[:, :CHUNK]) == frozen.step(ids[:, :CHUNK])
    assert learner.step(ids[:, CHUNK:]) < frozen.step(ids[:, CHUNK:]) - 0.5
    assert learner.num_updates == ids.shape[1] // CHUNK


class Learning:
    """The same by hand: a chunk is predicted, then learned from."""

    def __init__(self, leaks: bool) -> None:
        self.model, self.leaks = enabled(), leaks
        self.cache, self.last = sinkattn.SinkCache(self.model), None
        self.optimizer = sgd(list(self.model.parameters()))

    def chunk(self, ids: Tensor) -> list[float]:
        if self.leaks:  # learns first
            self.update(self.model(ids, cache=copy.deepcopy(self.cache)).logits, ids)
        logits = self.model(ids, cache=self.cache).logits
        targets, predictions = ids[0], logits[0, :-1]
        if self.last is None:
            targets = targets[1:]
        else:
            predictions = torch.cat((self.last, predictions))
        scored = cross_entropy(predictions, targets, reduction="none").tolist()
        if not self.leaks:
            self.update(logits, ids)
        self.last = logits[0, -1:].detach()
        return scored

    def update(self, logits: Tensor, ids: Tensor) -> None:
        cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_no_token_is_predicted_by_weights_that_have_seen_it():
    ids = repeated(times=4)
    got = make_learner().step(ids)
    by_hand, leaking = (
        [x for part in ids.split(CHUNK, dim=1) for x in learning.chunk(part)]
        for learning in (Learning(leaks=False), Learning(leaks=True))
    )
    assert got == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert got > sum(leaking) / len(leaking) + 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("length", [1, 3, CHUNK, CHUNK + 1, 2 * CHUNK, 1000])
def test_pieces_of_any_length(family, length):
    """What is learned does not depend on how the stream is cut into pieces."""
    ids = repeated(2, 3)
    whole, parts = (make_learner(enabled(family)) for _ in range(2))
    loss = whole.step(ids)
    total, count = 0.0, 0
    for first, piece in zip(range(0, ids.shape[1], length), ids.split(length, dim=1), strict=True):
        predicted = piece.shape[1] - (first == 0)
        mean = parts.step(piece)
        assert math.isnan(mean) == (predicted == 0)
        if predicted:
            total, count = total + mean * predicted, count + predicted
    assert total / count == pytest.approx(loss, rel=1e-5)
    assert parts.num_updates == whole.num_updates == ids.shape[1] // CHUNK
    for x, y in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_chunks_in_parts_are_encoded_twice_and_others_once(count_fed):
    model, ids = enabled(), random_ids(1, 4 * CHUNK)
    fed, learner = count_fed(model), make_learner(model)
    learner.step(ids[:, : 2 * CHUNK])
    assert fed.tokens == 2 * CHUNK
    learner.step(ids[:, 2 * CHUNK : 2 * CHUNK + 3])
    assert fed.tokens == 2 * CHUNK + 3
    learner.step(ids[:, 2 * CHUNK + 3 :])
    assert fed.tokens == 5 * CHUNK


def test_updates_of_several_chunks_have_their_mean_gradient():
    ids = random_ids(1, 2 * CHUNK)
    learner = make_learner(every=2, max_norm=None)
    before = weights_of(learner)
    learner.step(ids)
    assert learner.num_updates == 1
    model = enabled()
    cache = sinkattn.SinkCache(model)
    for part in ids.split(CHUNK, dim=1):
        logits = model(part, cache=cache).logits
        (cross_entropy(logits[0, :-1], part[0, 1:]) / 2).backward()
    for x, first, y in zip(weights_of(learner), before, model.parameters(), strict=True):
        torch.testing.assert_close(x, first - 0.3 * y.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_undo_is_exact_and_only_once(family):
    ids = repeated()
    for every in (1, 3):
        learner = make_learner(enabled(family), optimizer=None, every=every)
        learner.step(ids[:, :50])
        weights, state = weights_of(learner), copy.deepcopy(learner.optimizer.state_dict())
        gradients = [None if x.grad is None else x.grad.clone() for x in learner.parameters.values()]
        learner.step(ids[:, 50:100])
        assert not all(map(torch.equal, weights_of(learner), weights))
        learner.undo()
        assert all(map(torch.equal, weights_of(learner), weights))
        assert state["state"].keys() == learner.optimizer.state_dict()["state"].keys()
        for index, values in state["state"].items():
            for name, x in values.items():
                assert torch.equal(x, learner.optimizer.state_dict()["state"][index][name])
        for x, gradient in zip(learner.parameters.values(), gradients, strict=True):
            assert (x.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(x.grad, gradient)
        assert learner.cache.tokens_seen == 100
        with pytest.raises(RuntimeError, match="expected a step to take back"):
            learner.undo()


def test_encoding_again_gives_the_keys_of_the_new_weights():
    ids = repeated()
    kept, again = make_learner(), make_learner(after_update="reencode")
    for learner in (kept, again):
        learner.step(ids[:, :80])
    fresh = sinkattn.SinkCache(again.model)
    in_sight = torch.cat((ids[:, :S], ids[:, 80 - W : 80]), dim=1)
    next_id = ids[:, 80:81]
    with torch.no_grad():
        again.model(in_sight, cache=fresh)
        want = again.model(next_id, cache=fresh).logits
        got = again.model(next_id, cache=copy.deepcopy(again.cache)).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        old = kept.model(next_id, cache=copy.deepcopy(kept.cache)).logits
    assert (old - want).abs().max() > 1e-3


def test_absolute_positions_are_encoded_again_without_a_break():
    """After an update the context is what it was, at the same positions, and grows on to the next rebuild."""
    model, ids = enabled("gpt2"), repeated()
    learner = make_learner(model, after_update="reencode")
    for first in range(0, 80, CHUNK):
        learner.step(ids[:, first : first + CHUNK])
    plain = build("gpt2")
    plain.load_state_dict(model.state_dict())
    assert learner.num_updates == 10
    cache = copy.deepcopy(learner.cache)
    for token in range(80, 80 + 2 * W):
        start = context_start(token, learner.cache.layout)
        context = torch.cat((ids[:, :S], ids[:, start : token + 1]), dim=1)
        with torch.no_grad():
            got, want = model(ids[:, token : token + 1], cache=cache).logits[:, -1], plain(context).logits[:, -1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_decay_moves_back_to_the_first_weights():
    ids = repeated()
    learners = [make_learner(decay=decay) for decay in (0.0, 0.1, 1.0)]
    first = weights_of(learners[0])
    distances = []
    for learner in learners:
        learner.step(ids)
        distances.append(sum((x - y).norm().item() for x, y in zip(weights_of(learner), first, strict=True)))
    assert distances[0] > 1.5 * distances[1] > 0
    assert distances[2] == 0


def test_a_mask_says_what_to_learn_from():
    ids = random_ids(2, CHUNK)
    mask = torch.zeros(2, CHUNK, dtype=torch.bool)
    learner, other = make_learner(), make_learner()
    before = weights_of(learner)
    assert learner.step(ids, mask) == other.step(ids)  # all are predicted
    assert all(map(torch.equal, weights_of(learner), before))
    mask[1, 4:] = True
    learner = make_learner(max_norm=None)
    learner.step(ids, mask)
    model = enabled()
    logits = model(ids, use_cache=False).logits
    cross_entropy(logits[1, 3:-1], ids[1, 4:]).backward()
    for x, first, y in zip(weights_of(learner), before, model.parameters(), strict=True):
        torch.testing.assert_close(x, first - 0.3 * y.grad)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_by_default(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = enabled(family, num_hidden_layers=4)
    base = {name: x.clone() for name, x in model.state_dict().items()}
    learner = OnlineLearner(model, chunk=CHUNK)
    names = sorted(learner.parameters)
    assert all(".mlp." in name and ".online." in name for name in names)
    assert {name.split(".")[2] for name in names} == {"1", "2"}  # the middle half of the layers
    frozen = make_learner(enabled(family, num_hidden_layers=4))
    frozen.freeze()
    ids = repeated(times=30)
    assert learner.step(ids) < frozen.step(ids) - 0.1
    now = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items()}
    assert all(torch.equal(now[name], x) for name, x in base.items())
    model.peft_config["online"].base_model_name_or_path = "no/such-model"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.save(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ValueError, match="for a PeftModel, which has adapters of its own"):
        OnlineLearner(sinkattn.enable(peft.get_peft_model(build("llama"), peft.LoraConfig()), S, W))
    saved = peft.PeftModel.from_pretrained(build(family, num_hidden_layers=4), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids[:, : S + W]).logits, model(ids[:, : S + W], use_cache=False).logits)


def test_saved_weights_are_a_model(tmp_path):
    learner, ids = make_learner(), repeated()
    learner.step(ids)
    learner.save(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(losses(sinkattn.enable(saved, S, W), ids), losses(learner.model, ids))


def test_it_generates_while_it_learns():
    learner, ids = make_learner(), repeated()
    learner.step(ids[:, :60])
    got = learner.model.generate(ids[:, 60:61], cache=copy.deepcopy(learner.cache), max_new_tokens=20, do_sample=False)
    assert got.shape == (1, 21)
    assert learner.cache.tokens_seen == 60
    learner.step(ids[:, 60:])
    assert learner.cache.tokens_seen == ids.shape[1]


def test_adapters_of_a_model_in_double_precision_are_too():
    pytest.importorskip("peft")
    learner = OnlineLearner(sinkattn.enable(build("llama", torch.float64, num_hidden_layers=4), S, W), chunk=CHUNK)
    assert all(x.dtype == torch.float64 for x in learner.parameters.values())
    assert math.isfinite(learner.step(random_ids(1, 3 * CHUNK)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    pytest.importorskip("peft")
    model, frozen = (sinkattn.enable(build("llama", dtype, num_hidden_layers=4), S, W) for _ in range(2))
    learner, other = OnlineLearner(model, chunk=CHUNK), make_learner(frozen)
    other.freeze()
    assert all(x.dtype == torch.float32 for x in learner.parameters.values())
    ids = repeated(times=30)
    assert learner.step(ids) < other.step(ids) - 0.1
    with pytest.raises(ValueError, match="optimizer: expected one of your own for weights in half precision"):
        make_learner(sinkattn.enable(build("llama", dtype), S, W), optimizer=None)


def test_gradients_that_are_not_finite_are_dropped():
    learner = make_learner()
    before = weights_of(learner)
    hook = next(iter(learner.parameters.values())).register_hook(lambda x: x * torch.nan)
    with pytest.warns(RuntimeWarning, match="gradients that are not finite were dropped"):
        learner.step(random_ids(1, CHUNK))
    assert all(map(torch.equal, weights_of(learner), before))
    assert learner.num_updates == 0
    hook.remove()
    learner.step(random_ids(1, CHUNK))
    assert learner.num_updates == 1


def test_an_error_while_learning_loses_no_prediction(monkeypatch):
    learner, other, ids = make_learner(), make_learner(), random_ids(1, 3 * CHUNK)
    before = weights_of(learner)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.step(ids[:, :CHUNK])
    assert all(map(torch.equal, weights_of(learner), before))
    other.step(ids[:, :CHUNK], torch.zeros(1, CHUNK, dtype=torch.bool))  # reads them and learns nothing
    assert other.num_updates == 0
    assert learner.step(ids[:, CHUNK:]) == other.step(ids[:, CHUNK:])
    with monkeypatch.context() as patch:
        patch.setattr(sinkattn.ops, "sink_attention_", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.step(ids[:, :3])
    assert learner.cache.tokens_seen == ids.shape[1]
    assert learner.step(ids[:, :CHUNK]) == other.step(ids[:, :CHUNK])
    ids = torch.cat((ids, ids[:, :CHUNK]), dim=1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode\(\)"):
        learner.step(ids)
    assert learner.cache.tokens_seen == ids.shape[1]


def test_a_second_learner_goes_on_with_the_adapters():
    pytest.importorskip("peft")
    model, ids = enabled(num_hidden_layers=4), repeated()
    first = OnlineLearner(model, chunk=CHUNK)
    first.step(ids)
    learned = weights_of(first)
    second = OnlineLearner(model, lambda weights: torch.optim.SGD(weights, lr=0.1), chunk=CHUNK)
    assert all(x is y for x, y in zip(first.parameters.values(), second.parameters.values(), strict=True))
    assert all(map(torch.equal, weights_of(second), learned))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", {"gate_proj", "up_proj", "down_proj"}),
        ("gpt_neox", {"dense_h_to_4h", "dense_4h_to_h"}),
        ("bloom", {"dense_h_to_4h", "dense_4h_to_h"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # its experts are no linear layers
        ("deepseek_v3", {"gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_fc", "c_proj"}),
        ("opt", {"fc1", "fc2"}),
    ],
)
def test_which_layers_get_adapters(family, names):
    found = _adapted_layers(build(family, num_hidden_layers=4))
    assert {path.rpartition(".")[2] for path in found} == names


def test_gradients_of_others_do_not_count():
    learner, other, ids = make_learner(), None, random_ids(1, CHUNK)
    model = enabled()
    for x in model.parameters():
        x.grad = torch.full_like(x, 100.0)
    other = make_learner(model)
    for each in (learner, other):
        each.step(ids)
    assert all(map(torch.equal, weights_of(learner), weights_of(other)))


def test_sliding_windows_are_encoded_again_as_well():
    """A layer's own window may be wider than that of the others."""
    model = enabled("gemma3_text", layer_types=["sliding_attention", "full_attention"], sliding_window=20)
    learner, ids = make_learner(model, after_update="reencode"), repeated()
    learner.step(ids[:, :80])
    fresh = sinkattn.SinkCache(model)
    with torch.no_grad():
        model(torch.cat((ids[:, :S], ids[:, 80 - 20 : 80]), dim=1), cache=fresh)
        want = model(ids[:, 80:81], cache=fresh).logits
        torch.testing.assert_close(model(ids[:, 80:81], cache=copy.deepcopy(learner.cache)).logits, want)


def test_models_that_cannot_learn():
    for model, message in [
        (enabled("falcon_h1"), "FalconH1ForCausalLM, which has recurrent layers"),
        (sinkattn.enable(build("llama").model, S, W), "a language modelling head, got a LlamaModel"),
    ]:
        flags = [x.requires_grad for x in model.parameters()]
        with pytest.raises(ValueError, match=message):
            make_learner(model)
        assert [x.requires_grad for x in model.parameters()] == flags


def test_bad_arguments():
    model = enabled()
    for options, message in [
        ({"chunk": 1}, "chunk: expected 2 or more, .* got 1"),
        (
            {"optimizer": sgd(list(model.parameters())), "learn": "lora"},
            "optimizer: expected a function that makes one",
        ),
        ({"optimizer": sgd(list(model.parameters())[1:])}, "optimizer: expected one of exactly the .* that learn"),
        ({"every": 0}, "every: expected 1 or more, got 0"),
        ({"after_update": "forget"}, "after_update: expected 'keep' or 'reencode', got 'forget'"),
        ({"decay": 2.0}, "decay: expected 0 to 1, got 2.0"),
        ({"learn": "some"}, "learn: expected 'lora', 'all' or a function"),
        ({"learn": lambda name, x: False}, "learn: expected at least one parameter that learns"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_learner(model, **options)
    with pytest.raises(ValueError, match=r"prepared by sinkattn\.enable"):
        make_learner(build("llama"))
    learner = make_learner(model)
    learner.step(random_ids(2, 5))
    for piece, mask, message in [
        (random_ids(3, 5), None, "piece: expected 2 streams, as before, got 3"),
        (torch.zeros(2, 5), None, "piece: expected ids"),
        (random_ids(2, 5), torch.ones(2, 4, dtype=torch.bool), "mask: expected bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.step(piece, mask)
    assert learner.cache.tokens_seen == 5
