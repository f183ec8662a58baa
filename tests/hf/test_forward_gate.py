"""`ForwardGate`: forwards and a learner take turns, by a clock that only they move."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from sinkattn.hf import forward_gate
from sinkattn.hf.forward_gate import IDLE_SECONDS, NUM_RECENT, PATIENCE_SECONDS, ForwardGate, Stopped, before_operators

TOKEN, OPERATOR, SECONDS = 0.03, 0.002, 30


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(forward_gate, "perf_counter", clock := Clock())
    return clock


class Learner:
    """Runs operators in a thread, each of which takes the time that `operator` says."""

    def __init__(self, gate: ForwardGate, clock: Clock, operator: float = OPERATOR) -> None:
        self.gate, self.clock, self.operator = gate, clock, operator
        self.num_operators, self.error = 0, None
        self.has_stopped = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            while True:
                self.gate.pause()
                self.clock.now += self.operator
                self.num_operators += 1
        except Stopped:
            self.has_stopped = True
        finally:
            self.gate.rest()


@contextmanager
def learning(clock: Clock, share: float, **options):
    """A gate and its learner, which stands, as there was a forward just now."""
    gate = ForwardGate(None, [], automatic=True, share=share)
    with gate.inside():
        learner = Learner(gate, clock, **options)
        wait_until(lambda: gate._learner == "standing")
    try:
        yield gate, learner
    finally:
        gate.stop()
        learner.thread.join(SECONDS)
        assert learner.has_stopped


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


def forward(gate: ForwardGate, clock: Clock, seconds: float = TOKEN) -> float:
    """A forward; returns how long it has waited."""
    begin = clock.now
    with gate.inside():
        waited = clock.now - begin
        clock.now += seconds
    return waited


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
@pytest.mark.parametrize("operator", [0.0005, 0.002, 0.1])
def test_forwards_wait_for_the_share_on_average(clock, share, operator):
    with learning(clock, share, operator=operator) as (gate, learner):
        num_tokens = 200
        waits = [forward(gate, clock) for _ in range(num_tokens)]
        most, bound = share * TOKEN * num_tokens, share * TOKEN + operator
        assert sum(waits) == pytest.approx(learner.num_operators * operator)
        # The first ones earn nothing.
        assert share * TOKEN * (num_tokens - NUM_RECENT - 2) - operator <= sum(waits) <= most + operator
        assert max(waits) <= bound + 1e-6
        if operator < share * TOKEN:
            assert sum(wait > 0 for wait in waits) > 0.9 * (num_tokens - NUM_RECENT)  # not one long wait for many


def test_a_long_forward_buys_no_long_wait(clock):
    with learning(clock, 0.1) as (gate, _):
        for _ in range(NUM_RECENT + 1):
            forward(gate, clock)
        forward(gate, clock, 3.0)
        assert 0 < forward(gate, clock) <= 0.1 * TOKEN + OPERATOR + 1e-6
        for _ in range(NUM_RECENT + 1):  # but one after many of them is one of them
            forward(gate, clock, 3.0)
        assert forward(gate, clock) >= 0.3


def test_the_first_forward_is_no_token(clock):
    with learning(clock, 0.1) as (gate, _):
        forward(gate, clock, 3.0)
        assert forward(gate, clock) == 0


class Open:
    """A gate that a learner passes at any time."""

    def __init__(self, gate: ForwardGate) -> None:
        self.gate, self.rest = gate, gate.rest

    def pause(self) -> None:
        time.sleep(1e-4)
        self.gate.rest()
        if self.gate._is_stopped:
            raise Stopped


@pytest.mark.parametrize("is_careless", [False, True])
def test_the_learner_stands_still_during_forwards(clock, is_careless):
    with learning(clock, 1) as (gate, learner):
        if is_careless:  # from its next turn on
            learner.gate = Open(gate)
        count = 0
        for _ in range(50):
            with gate.inside():
                clock.now += TOKEN
                before = learner.num_operators
                time.sleep(0.001)
                count += learner.num_operators - before
        assert learner.num_operators > 20
    assert (count > 0) == is_careless


def test_it_works_on_when_there_are_no_forwards(clock):
    with learning(clock, 0) as (gate, learner):
        forward(gate, clock)
        clock.now += 0.9 * IDLE_SECONDS
        time.sleep(3 * IDLE_SECONDS)  # of the real clock, by which it wakes
        assert learner.num_operators == 0
        clock.now += 0.2 * IDLE_SECONDS
        wait_until(lambda: learner.num_operators > 100)
        forward(gate, clock)
        before = learner.num_operators
        time.sleep(3 * IDLE_SECONDS)
        assert learner.num_operators == before


def test_a_forward_waits_for_an_operator_that_has_begun(clock):
    with learning(clock, 0) as (gate, learner):
        clock.now += IDLE_SECONDS
        wait_until(lambda: learner.num_operators > 0)
        has_begun, may_end = threading.Event(), threading.Event()

        class Long(float):
            def __radd__(self, now: float) -> float:
                has_begun.set()
                assert may_end.wait(SECONDS)
                learner.operator = OPERATOR
                return now + 1.0

        learner.operator = Long()
        assert has_begun.wait(SECONDS)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(forward, gate, clock)
            wait_until(lambda: gate._forwards_waiting)
            assert not first.done()
            may_end.set()
            assert first.result(SECONDS) == pytest.approx(1.0)
        assert gate._credit.seconds <= -0.9  # a debt


@contextmanager
def other_forward(gate: ForwardGate):
    """A forward of another thread, while it lasts."""
    is_inside, may_end = threading.Event(), threading.Event()

    def run() -> None:
        with gate.inside():
            is_inside.set()
            assert may_end.wait(SECONDS)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(run)
        assert is_inside.wait(SECONDS)
        yield may_end
        may_end.set()
        other.result(SECONDS)


def test_forwards_of_several_threads(clock):
    with learning(clock, 0.1) as (gate, learner):
        for _ in range(NUM_RECENT + 2):
            forward(gate, clock)
        with other_forward(gate) as may_end:
            before = learner.num_operators
            clock.now += TOKEN
            assert [forward(gate, clock) for _ in range(5)] == [0] * 5  # although it is the learner's turn
            clock.now += PATIENCE_SECONDS
            with ThreadPoolExecutor(1) as threads:
                late = threads.submit(forward, gate, clock)
                wait_until(lambda: gate._forwards_waiting)
                assert learner.num_operators == before
                may_end.set()
                assert late.result(SECONDS) > 0
            assert learner.num_operators > before


def test_a_forward_within_another_one(clock):
    with learning(clock, 1) as (gate, learner):
        for _ in range(NUM_RECENT + 2):
            forward(gate, clock)
        before = learner.num_operators
        with gate.inside():
            before = learner.num_operators
            clock.now += 2 * PATIENCE_SECONDS
            assert forward(gate, clock) == 0
            time.sleep(0.01)
            assert learner.num_operators == before
        wait_until(lambda: forward(gate, clock) > 0)


def test_a_forward_that_fails(clock):
    with learning(clock, 0) as (gate, learner):
        with pytest.raises(ZeroDivisionError), gate.inside():
            raise ZeroDivisionError
        clock.now += IDLE_SECONDS
        wait_until(lambda: learner.num_operators > 0)


def test_stopped_while_it_stands_and_while_a_forward_waits(clock):
    gate = ForwardGate(None, [], automatic=True, share=1)
    with gate.inside():
        learner = Learner(gate, clock)
        wait_until(lambda: gate._learner == "standing")
        gate.stop()
        learner.thread.join(SECONDS)
        assert learner.has_stopped
    gate = ForwardGate(None, [], automatic=True, share=1)
    gate.pause()  # of a learner that works
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(forward, gate, clock)
        wait_until(lambda: gate._forwards_waiting)
        gate.stop()
        time.sleep(0.01)
        assert not waiting.done()
        with pytest.raises(Stopped):
            gate.pause()
        gate.rest()
        waiting.result(SECONDS)


def test_a_compiler_in_another_thread_is_not_told():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    is_in, may_end = threading.Event(), threading.Event()
    paused = []

    def run() -> None:
        with before_operators(lambda: paused.append(threading.get_ident())):
            torch.ones(2) + 1
            is_in.set()
            assert may_end.wait(SECONDS)

    thread = threading.Thread(target=run)
    thread.start()
    assert is_in.wait(SECONDS)
    count = len(paused)
    assert count == 2
    assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3)).tolist() == [2, 2, 2]
    may_end.set()
    thread.join()
    assert len(compiled) == 1
    assert len(paused) == count
