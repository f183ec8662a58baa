"""`BackgroundLearner`: what is served while it learns, when new weights are taken over, and how the thread ends."""

import copy
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import build
from hf_models import random_ids
from recorded_graph import REPLAYED, WARM, RecordedGraph
from torch import Tensor

import sinkattn
from sinkattn import BackgroundLearner, OnlineLearner
from sinkattn.hf import background, decode_steps
from sinkattn.hf.forward_gate import Published, _Pauses
from sinkattn.hf.learner import ADAPTER
from sinkattn.hf.model_patch import get_patch

S, W, CHUNK, SECONDS = 2, 14, 8, 30


def enabled(family: str = "llama", **options):
    return sinkattn.enable(build(family, **{"num_hidden_layers": 4, **options}), S, W)


def sgd(weights: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.3)


@pytest.fixture
def make_learner():
    """Make a `BackgroundLearner`, and close it after the test."""
    made = []

    def make(model=None, **options) -> BackgroundLearner:
        options = {"optimizer": sgd, "chunk": CHUNK, "learn": "all", **options}
        made.append(BackgroundLearner(model or enabled(), **options))
        return made[-1]

    yield make
    for learner in made:
        try:
            learner.close()
        except RuntimeError as error:
            if "has failed" not in str(error):  # what the test has seen to
                raise


def weights_of(model) -> list[Tensor]:
    return [x.detach().clone() for x in model.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


class Streamer:
    """Calls a function after every token of `generate`, but not after the prompt."""

    def __init__(self, after_token) -> None:
        self.after_token, self.num_tokens = after_token, -1

    def put(self, ids: Tensor) -> None:
        self.num_tokens += 1
        if self.num_tokens:
            self.after_token(self.num_tokens)

    def end(self) -> None:
        pass


def generate(model, prompt: Tensor, after_token=lambda count: None, **options) -> list[Tensor]:
    """Logits of each of 12 tokens."""
    given = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return list(model.generate(prompt, streamer=Streamer(after_token), **given | options).logits)


def learn_more(learner: BackgroundLearner, after: set[int] | None = None):
    """Function that lets a chunk be learned and published after these tokens of `generate`, or after all."""

    def after_token(count: int) -> None:
        if after is None or count in after:
            learner.feed(random_ids(1, CHUNK))
            learner.flush()

    return after_token


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"learn": "lora", "optimizer": None}),
        ("llama", {"every": 2, "decay": 0.1}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_weights_are_those_of_an_online_learner(make_learner, family, options):
    if options.get("learn") == "lora":
        pytest.importorskip("peft")
    ids = random_ids(2, 24).repeat(1, 4)
    mask = torch.rand(ids.shape) < 0.8
    torch.manual_seed(1)  # of the adapters
    learner = make_learner(model := enabled(family), automatic=False, **options)
    torch.manual_seed(1)
    plain = OnlineLearner(enabled(family), **{"optimizer": sgd, "chunk": CHUNK, "learn": "all", **options})
    before = weights_of(model)
    assert same(before, weights_of(plain.model))
    for piece, part in zip(ids.split(13, dim=1), mask.split(13, dim=1), strict=True):
        plain.step(piece, part)
        learner.feed(piece, part)
        learner.flush()
        updates = learner.statistics().updates_in_use
        assert learner.swap() == (updates != plain.num_updates)
        assert same(weights_of(model), weights_of(plain.model))
        assert learner.statistics()[:4] == (plain.cache.tokens_seen,) * 2 + (plain.num_updates,) * 2
    assert plain.num_updates == 12 // options.get("every", 1)
    assert not same(weights_of(model), before)


def test_losses_are_those_of_an_online_learner(make_learner):
    ids = random_ids(1, 3 * CHUNK)
    learner = make_learner()
    for piece in (ids[:, :1], ids[:, 1:5], ids[:, 5:]):  # nothing is predicted in the first one
        learner.feed(piece)
    learner.flush()
    plain = OnlineLearner(enabled(), sgd, chunk=CHUNK, learn="all")
    want = [plain.step(part) for part in ids.split([1, 4, 3, CHUNK, CHUNK], dim=1)]
    assert learner.statistics().losses == want[1:]


def test_only_what_learns_is_copied(make_learner):
    pytest.importorskip("peft")
    learner = make_learner(model := enabled(), learn="lora")
    twin = learner._learner.model
    for (name, x), (_, y) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (x is y) == (f".{ADAPTER}." not in name)
        assert y.requires_grad == (x is not y)
        assert not x.requires_grad
    assert sum(x is y for x, y in zip(model.parameters(), twin.parameters(), strict=True)) == 4 * 9 + 3
    learner = make_learner(model := enabled(), learn=lambda name, x: name == "model.norm.weight")
    own = {name for name, x in learner._learner.model.named_parameters() if all(x is not y for y in model.parameters())}
    assert own == {"model.norm.weight"}
    model = enabled()
    addresses = {x.data_ptr() for x in model.parameters()}
    assert addresses.isdisjoint(x.data_ptr() for x in make_learner(model)._learner.model.parameters())


def test_quantized_weights_are_shared(make_learner):
    pytest.importorskip("peft")
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama", num_hidden_layers=4)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    learner = make_learner(sinkattn.enable(model, S, W), learn="lora", optimizer=None, automatic=False)
    layers = [each.model.layers[1].mlp.up_proj.base_layer for each in (model, learner._learner.model)]
    assert layers[0].weight is layers[1].weight
    made_for = [layer.forward.args[2].keywords["weight"] for layer in layers]
    assert made_for[0].data_ptr() == made_for[1].data_ptr()
    before = weights_of(model)
    learn_more(learner)(1)
    assert learner.swap()
    assert not same([x for x in weights_of(model) if type(x) is Tensor], [x for x in before if type(x) is Tensor])


@pytest.mark.parametrize("learn", ["lora", "all"])
def test_weights_stay_while_it_learns(make_learner, monkeypatch, learn):
    if learn == "lora":
        pytest.importorskip("peft")
    prompt = random_ids(1, 20)
    want = generate(enabled(), prompt)
    learner = make_learner(model := enabled(), learn=learn, automatic=False)
    before = weights_of(model)
    assert same(generate(model, prompt, learn_more(learner)), want)
    assert same(weights_of(model), before)
    assert learner.statistics()[2:4] == (12, 0)

    # One that trains the weights that serve.
    def share_all(learner: OnlineLearner) -> OnlineLearner:
        return copy.deepcopy(learner, {id(x): x for x in learner.model.parameters()})

    monkeypatch.setattr(background, "_copy_what_learns", share_all)
    wrong = make_learner(model := enabled(), learn=learn, automatic=False)
    for x in wrong._learner.parameters.values():
        x.requires_grad = True
    got = generate(model, prompt, learn_more(wrong))
    assert torch.equal(got[0], want[0])
    assert not any(map(torch.equal, got[1:], want[1:]))


@pytest.mark.parametrize("automatic", [True, False])
def test_new_weights_count_from_the_next_token_on(make_learner, automatic):
    prompt = random_ids(1, 20)
    learner = make_learner(model := enabled(), automatic=automatic)
    learn = learn_more(learner, {5})

    def after_token(count: int) -> None:
        learn(count)
        if count == 7 and not automatic:
            assert learner.swap()

    got = generate(model, prompt, after_token)
    first_new = 5 if automatic else 7
    assert not learner.swap()

    # The same by hand: keys and values that are there stay.
    want, by_hand = generate(other := enabled(), prompt, max_new_tokens=first_new), enabled()
    cache = sinkattn.SinkCache(other)
    with torch.no_grad():
        tokens = prompt
        for _ in range(first_new):
            logits = other(tokens, cache=cache, logits_to_keep=1).logits[:, -1]
            tokens = logits.argmax(dim=-1, keepdim=True)
        assert torch.equal(logits, want[-1])
        for x, new in zip(other.parameters(), model.parameters(), strict=True):
            x.copy_(new)
        for _ in range(first_new, 12):
            want.append(other(tokens, cache=cache, logits_to_keep=1).logits[:, -1])
            tokens = want[-1].argmax(dim=-1, keepdim=True)
    assert same(got, want)
    old = generate(by_hand, prompt)
    assert same(got[:first_new], old[:first_new])
    assert not any(map(torch.equal, got[first_new:], old[first_new:]))


def publish_zeros(learner: BackgroundLearner) -> None:
    """As on a CUDA device, where a learner also works during forwards."""
    zeros = [torch.zeros_like(x) for x in learner._learner.parameters.values()]
    learner._gate.publish(Published(zeros, 1, None))


def test_a_forward_keeps_its_weights_to_its_end(make_learner):
    ids = random_ids(1, 12)
    with torch.no_grad():
        want = enabled()(ids).logits
    learner = make_learner(model := enabled(), capacity=2 * CHUNK)
    before = weights_of(model)
    refused = []

    def in_the_middle(*_) -> None:
        publish_zeros(learner)
        learner.feed(random_ids(1, 2 * CHUNK))
        for call in (learner.swap, learner.flush, lambda: learner.feed(random_ids(1, CHUNK))):
            with pytest.raises(RuntimeError) as error:
                call()
            refused.append(str(error.value))

    with torch.no_grad():
        hook = model.model.layers[1].register_forward_hook(in_the_middle)
        assert torch.equal(model(ids).logits, want)
        hook.remove()
        assert same(weights_of(model), before)
        assert not model(ids).logits.any()
    assert refused == ["learner: expected a call between forwards of the model, got one during a forward"] * 3
    learner.flush()
    assert learner.statistics()[2:4] == (2, 1)


@pytest.mark.parametrize("automatic", [True, False])
def test_new_weights_wait_for_forwards_of_other_threads(make_learner, automatic):
    ids = random_ids(1, 12)
    learner = make_learner(model := enabled(), automatic=automatic)
    gate = learner._gate
    with torch.no_grad():
        want = model(ids).logits
    is_in_the_middle, may_go_on = threading.Event(), threading.Event()

    def stop_here(*_) -> None:
        is_in_the_middle.set()
        assert may_go_on.wait(SECONDS)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    hook = model.model.layers[1].register_forward_hook(stop_here)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(forward)
        assert is_in_the_middle.wait(SECONDS)
        hook.remove()
        publish_zeros(learner)
        others = [threads.submit(forward if automatic else learner.swap)]
        while not gate._forwards_waiting + gate._swaps_waiting:
            assert not others[0].done()
        others.append(threads.submit(forward))  # waits as well, or there might be a forward at any time
        while gate._forwards_waiting + gate._swaps_waiting < 2:
            assert not others[1].done()
        assert not first.done()
        may_go_on.set()
        assert torch.equal(first.result(SECONDS), want)
        assert not others[1].result(SECONDS).any()
        if not automatic:
            # Whichever thread came first has copied them.
            assert others[0].result(SECONDS) in (True, False)
    assert learner.statistics().updates_in_use == 1


def test_streams_of_several_threads(make_learner):
    prompts = random_ids(2, 20).split(1)
    plain = enabled()
    want = [generate(plain, prompt) for prompt in prompts]
    learner = make_learner(model := enabled(), automatic=False)
    learner.feed(random_ids(1, 40 * CHUNK))
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda prompt: generate(model, prompt), prompts))
        assert all(map(same, got, want))
        learner.flush()
        learner.close()
        learner = make_learner(model)  # automatic
        learner.feed(random_ids(1, 40 * CHUNK))
        swapped = list(threads.map(lambda prompt: generate(model, prompt, max_new_tokens=200)[-1], prompts))
    learner.flush()
    assert all(x.isfinite().all() for x in swapped)
    assert learner.statistics().num_updates == 40


def test_replayed_steps_have_the_new_weights(make_learner):
    """Weights stay where they are; and the copy captures nothing."""
    model, plain, ids = enabled(), enabled(), random_ids(1, 30)
    get_patch(model).capture_steps(RecordedGraph)
    learner = make_learner(model)
    caches = [sinkattn.SinkCache(each) for each in (model, plain)]
    with torch.no_grad():
        for each, cache in zip((model, plain), caches, strict=True):
            for part in ids.split(1, dim=1)[: WARM + 3]:
                each(part, cache=cache)
        assert decode_steps(model, caches[0]) == REPLAYED
        learn_more(learner)(1)
        got = model(ids[:, :1], cache=caches[0]).logits
        assert decode_steps(model, caches[0]) == REPLAYED
        old = plain(ids[:, :1], cache=copy.deepcopy(caches[1])).logits
        for x, new in zip(plain.parameters(), model.parameters(), strict=True):
            x.copy_(new)
        assert torch.equal(got, plain(ids[:, :1], cache=caches[1]).logits)
    assert not torch.equal(got, old)
    twin = learner._learner
    assert decode_steps(twin.model, twin.cache) == "launched one by one"


def test_an_error_of_the_thread_is_raised_by_the_next_call(make_learner, monkeypatch):
    def fails(*_) -> float:
        raise ZeroDivisionError("in step")

    for call in ("feed", "flush", "swap", "statistics", "save", "close"):
        learner = make_learner(model := enabled())
        monkeypatch.setattr(learner._learner, "step", fails)
        learner.feed(random_ids(1, CHUNK))
        learner._thread.join(SECONDS)
        arguments = {"feed": [random_ids(1, 3)], "save": ["folder"]}.get(call, [])
        with pytest.raises(RuntimeError, match="has failed, and learns no more: ZeroDivisionError: in step") as raised:
            getattr(learner, call)(*arguments)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
        assert "in fails" in "".join(traceback.format_exception(raised.value))
        generate(model, random_ids(1, 5))  # goes on
        learner.close()  # not once more
        assert "forward" not in model.__dict__


class Held:
    """Holds the thread of a learner before each part that it reads."""

    def __init__(self, learner: BackgroundLearner, monkeypatch) -> None:
        self.parts, self.may_read, step = [], threading.Semaphore(0), learner._learner.step

        def wait_and_step(ids: Tensor, mask: Tensor) -> float:
            learner._gate.rest()  # or forwards would wait for it
            assert self.may_read.acquire(timeout=SECONDS)
            self.parts.append(ids)
            return step(ids, mask)

        monkeypatch.setattr(learner._learner, "step", wait_and_step)


def test_the_queue_has_a_bound(make_learner, monkeypatch):
    ids = random_ids(1, 100)
    learner = make_learner(capacity=20)
    held = Held(learner, monkeypatch)
    learner.feed(ids[:, :8])
    learner.feed(ids[:, 8:18], wait=False)
    with pytest.raises(queue.Full, match="18 tokens are unread, and capacity is 20; got 3 more"):
        learner.feed(ids[:, 18:21], wait=False)
    learner.feed(ids[:, 18:20], wait=False)
    with pytest.raises(ValueError, match=r"piece: expected up to 20 tokens \(capacity\), got 21"):
        learner.feed(ids[:, :21])
    assert learner.statistics()[:2] == (20, 0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(learner.feed, ids[:, 20:28])
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        held.may_read.release()
        waiting.result(SECONDS)
        assert learner.statistics()[:2] == (28, 8)
        for _ in range(20):
            held.may_read.release()
        learner.flush()
        assert torch.equal(torch.cat(held.parts, dim=1), ids[:, :28])
        # An error wakes the one who waits.
        monkeypatch.setattr(learner._learner, "step", lambda *_: held.may_read.acquire(timeout=SECONDS) / 0)
        while held.may_read.acquire(blocking=False):
            time.sleep(1e-4)
        learner.feed(ids[:, :20])
        waiting = threads.submit(learner.feed, ids[:, :8])
        held.may_read.release()
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            waiting.result(SECONDS)


@pytest.mark.parametrize("position", [1, 5, 7])
def test_a_correction_is_learned_within_a_bound(make_learner, monkeypatch, position):
    """Of a mask that marks one token; the learner is as slow as it may be."""
    capacity, every, ids = 20, 2, random_ids(1, 100)
    learner = make_learner(model := enabled(), capacity=capacity, every=every)
    held = Held(learner, monkeypatch)
    before = weights_of(model)
    mask = torch.zeros(1, 100, dtype=torch.bool)
    mask[:, [position, CHUNK + 2]] = True  # one in each of `every` chunks
    last = position + CHUNK * every + capacity
    for first in range(last + 1):
        while learner.statistics().tokens_fed - learner.statistics().tokens_read == capacity:
            held.may_read.release()  # only as much as it must
            while learner.statistics().tokens_fed - learner.statistics().tokens_read == capacity:
                time.sleep(1e-4)
        assert learner.statistics().num_updates == 0 or first > CHUNK * every
        learner.feed(ids[:, first : first + 1], mask[:, first : first + 1], wait=False)
    assert learner.statistics().num_updates == 1
    with torch.no_grad():
        model(ids[:, :2])
    assert not same(weights_of(model), before)
    for _ in range(100):
        held.may_read.release()


def test_the_end(make_learner, monkeypatch):
    learner = make_learner(model := enabled())
    before = weights_of(model)
    with learner:
        with pytest.raises(ValueError, match="has a BackgroundLearner already; close it first"):
            make_learner(model)
        learner.feed(random_ids(1, CHUNK))
        learner.flush()
        assert same(weights_of(model), before)  # until a forward, or the end
    assert not same(weights_of(model), before)
    assert "forward" not in model.__dict__
    assert not learner._thread.is_alive()
    learner.close()
    for call in (learner.flush, learner.swap, learner.statistics, lambda: learner.feed(random_ids(1, 3))):
        with pytest.raises(RuntimeError, match="learner: is closed"):
            call()
    learner = make_learner(model, automatic=False)
    held = Held(learner, monkeypatch)
    before = weights_of(model)
    learner.feed(random_ids(1, 20 * CHUNK))
    held.may_read.release()
    while not held.parts:
        pass
    held.may_read.release()
    learner.close()  # what is not read is dropped
    assert len(held.parts) <= 2
    assert same(weights_of(model), before)  # not automatic
    learner = make_learner(model)
    sinkattn.disable(model)
    learner.close()
    assert "forward" not in model.__dict__


def test_saved_weights_are_those_in_use(make_learner, tmp_path):
    peft = pytest.importorskip("peft")
    learner = make_learner(model := enabled(), learn="lora", automatic=False)
    for _ in range(5):
        learn_more(learner)(1)
    learner.swap()
    learn_more(learner)(1)
    learner.save(tmp_path)
    saved = sinkattn.enable(peft.PeftModel.from_pretrained(build("llama", num_hidden_layers=4), tmp_path), S, W)
    ids = random_ids(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model(ids).logits)
        learner.swap()
        assert (saved(ids).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(make_learner, copied):
    learner, ids = make_learner(model := enabled()), random_ids(1, 12)
    with pytest.raises(TypeError, match="a BackgroundLearner has a thread, and cannot be copied or pickled"):
        copied(learner)
    twin = copied(model)
    with torch.no_grad():
        want = twin(ids).logits
        assert torch.equal(model(ids).logits, want)
        learn_more(learner)(1)
        assert not torch.equal(model(ids).logits, want)
        assert torch.equal(twin(ids).logits, want)
        own = make_learner(twin)
        learn_more(own)(1)
        assert not torch.equal(twin(ids).logits, want)
    own.close()
    sinkattn.disable(twin)
    assert "forward" not in twin.__dict__


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_serves_and_does_not_learn(make_learner):
    learner = make_learner(model := enabled())
    learn_more(learner)(1)
    ids = random_ids(1, 3)
    are_held, may_go_on = threading.Event(), threading.Event()

    def hold_locks() -> None:
        with learner._condition, learner._gate._condition:
            are_held.set()
            may_go_on.wait(SECONDS)

    (thread := threading.Thread(target=hold_locks)).start()
    assert are_held.wait(SECONDS)
    if not (child := os.fork()):
        signal.alarm(SECONDS)
        result = 1
        try:
            for call in (learner.flush, learner.close, learner.swap, learner.statistics, lambda: learner.feed(ids)):
                with pytest.raises(RuntimeError, match="its thread is in the process that made it, not in this fork"):
                    call()
            with torch.no_grad():
                model(ids)
            result = 0
        finally:
            os._exit(result)
    may_go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert learner.swap()


def test_the_process_ends_while_it_learns():
    code = (
        "import sys; sys.path.insert(0, 'tests/hf')\n"
        "import sinkattn, torch\n"
        "from families import build, random_ids\n"
        "model = sinkattn.enable(build('llama'), 2, 14)\n"
        "learner = sinkattn.BackgroundLearner(model, lambda x: torch.optim.SGD(x, lr=0.1), chunk=8, learn='all')\n"
        "learner.feed(random_ids(1, 4096))\n"
        "print(learner.statistics().tokens_read < 4096)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
    assert "Fatal" not in result.stderr
    assert "terminate" not in result.stderr


def test_inference_mode_of_others_stays(make_learner):
    model = enabled()
    with torch.inference_mode():
        learner = make_learner(model)
        learner.feed(random_ids(1, CHUNK))  # an inference tensor
        learner.flush()
        assert torch.is_inference_mode_enabled()
    assert learner.statistics().num_updates == 1


def test_it_stands_still_during_a_forward(make_learner, monkeypatch):
    """Whatever it does: its forward, its backward, or the step of its optimizer."""
    operators, dispatch = [], _Pauses.__torch_dispatch__

    def record(mode, operator, *arguments):
        assert threading.current_thread() is learner._thread
        operators.append(str(operator))
        return dispatch(mode, operator, *arguments)

    monkeypatch.setattr(_Pauses, "__torch_dispatch__", record)
    learner = make_learner(share=0)
    learner.feed(random_ids(1, 40 * CHUNK))
    for _ in range(5):
        with learner._gate.inside():
            while learner._gate._learner != "standing":
                time.sleep(1e-4)
            before = len(operators)
            time.sleep(0.02)
            assert len(operators) == before
        while len(operators) == before:
            time.sleep(1e-4)
    learner.flush()
    every = set(operators)
    assert {
        "aten.embedding.default",
        "sinkattn.sink_attention_gradients.default",
        "aten.embedding_dense_backward.default",
        "aten.linalg_vector_norm.default",
        "aten.add_.Tensor",
    } <= every
    assert not {name for name in every if "_foreach_" in name}  # an operator for all weights may take long


@pytest.mark.parametrize("ends", ["close", "error"])
def test_the_end_while_it_stands(make_learner, monkeypatch, ends):
    learner = make_learner(automatic=False)
    learner.feed(random_ids(1, 100 * CHUNK))
    with learner._gate.inside():
        while learner._gate._learner != "standing":
            time.sleep(1e-4)
        if ends == "close":
            learner.close()
            assert not learner._thread.is_alive()
    if ends == "error":
        monkeypatch.setattr(learner._learner, "_learn", lambda *_: 1 / 0)
        learner._thread.join(SECONDS)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            learner.flush()
    with torch.no_grad():
        learner._serving.model(random_ids(1, 3))


def test_what_is_fed_is_copied(make_learner, monkeypatch):
    learner, ids = make_learner(), random_ids(1, CHUNK)
    held = Held(learner, monkeypatch)
    learner.feed(ids)
    want = ids.clone()
    ids.zero_()
    held.may_read.release()
    learner.flush()
    assert torch.equal(held.parts[0], want)


def test_bad_arguments(make_learner):
    model = enabled()
    for options, message in [
        ({"capacity": 0}, "capacity: expected 1 or more, got 0"),
        ({"share": 1.5}, "share: expected 0 to 1, got 1.5"),
        ({"chunk": 1}, "chunk: expected 2 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_learner(model, **options)
    assert "forward" not in model.__dict__
    with pytest.raises(ValueError, match=r"prepared by sinkattn\.enable"):
        make_learner(build("llama"))
    learner = make_learner(model)
    learner.feed(random_ids(2, 5))
    for piece, mask, message in [
        (random_ids(3, 5), None, "piece: expected 2 streams, as before, got 3"),
        (torch.zeros(2, 5), None, "piece: expected ids"),
        (random_ids(2, 5), torch.ones(2, 4, dtype=torch.bool), "mask: expected bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.feed(piece, mask)
    assert learner.statistics().tokens_fed == 5
