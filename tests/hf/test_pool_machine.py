"""`StreamPool` against a model of plain lists: any order of calls, of many streams on few rows."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hf_models import build, interrupted
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pool_streams import HEADROOM, Record, S, W, some_ids
from recorded_graph import Graphs

from sinkattn import DraftModel, PoolFullError, PromptLookup, SamplingParams, StreamPool, enable
from sinkattn.hf.model_patch import get_patch

NUM_ROWS, MAX_PARKED, MAX_STREAMS, MAX_PREFIX = 3, 2, 64, W + 5


@cache
def models(family, layers):
    """An enabled model, and one of the same weights that is not."""
    overrides = {"num_hidden_layers": 1} if layers == 1 else {}
    model, plain = (build(family, torch.float64, **overrides) for _ in range(2))
    return enable(model, S, W, HEADROOM), plain


def sampling():
    seeded = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.7, 1.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 9),
    )
    return st.one_of(st.just(SamplingParams()), seeded)


# A few of them often, so that these become long.
any_stream = st.one_of(st.integers(0, 2), st.integers(0, MAX_STREAMS - 1))


class PoolAgainstLists(RuleBasedStateMachine):
    family, layers = "llama", None

    def __init__(self):
        super().__init__()
        self.model, self.plain = models(self.family, self.layers)
        self.folder = TemporaryDirectory()
        self.streams = []
        """Stream, record, and the iterator that was left half-way, of each."""

    @initialize(num_drafts=st.integers(0, HEADROOM), with_model=st.booleans())
    def begin(self, num_drafts, with_model):
        speculation = None
        if num_drafts:
            speculation = DraftModel(self.model, num_drafts) if with_model else PromptLookup(num_tokens=num_drafts)
        self.num_drafts = num_drafts
        self.pool = StreamPool(
            self.model,
            NUM_ROWS,
            max_parked=MAX_PARKED,
            max_on_disk=MAX_STREAMS - NUM_ROWS - MAX_PARKED,
            park_folder=self.folder.name,
            max_prefix=MAX_PREFIX,
            tokens_per_step=W,
            speculation=speculation,
        )

    def pick(self, index):
        return self.streams[index % len(self.streams)]

    def add(self, stream, record):
        self.streams.append([stream, record, None])

    def stop(self, entry):
        """Close the iterator that was left, and check what it has generated."""
        if entry[2] is not None:
            entry[2].close()
        entry[2] = None
        entry[1].check(self.model, self.plain)

    @rule(
        count=st.integers(1, 8),
        prefix=st.integers(0, MAX_PREFIX),
        params=sampling(),
        evict=st.sampled_from(["token", "message"]),
        seed=st.integers(0, 99),
    )
    def open(self, count, prefix, params, evict, seed):
        evict = evict if self.layers == 1 else "token"
        for index in range(count):
            ids = some_ids(prefix, seed + index)
            if len(self.streams) == MAX_STREAMS:
                with pytest.raises(PoolFullError):
                    self.pool.open(ids)
                return
            self.add(self.pool.open(ids, sampling=params, evict=evict), Record(params, ids, evict))

    @precondition(lambda self: self.streams)
    @rule(
        index=any_stream,
        count=st.one_of(st.integers(0, 3), st.integers(0, 3 * W), st.integers(W, 2 * W)),
        seed=st.integers(0, 99),
        begins_message=st.booleans(),
        num_following=st.sampled_from([0, 0, 3, W]),
    )
    def feed(self, index, count, seed, begins_message, num_following=0):
        stream, record, _ = self.pick(index)
        ids = some_ids(count, seed)
        options = {"begins_message": begins_message, "num_following": num_following}
        stream.feed(ids, **options)
        record.feed(ids, **options)

    @precondition(lambda self: self.streams)
    @rule(index=any_stream, count=st.integers(1, HEADROOM), seed=st.integers(0, 99))
    def feed_in_a_step_that_fails(self, index, count, seed):
        stream, record, _ = self.pick(index)
        ids = some_ids(count, seed)
        with interrupted(self.model.model.layers[-1], 0, RuntimeError):
            stream.feed(ids)
        record.feed(ids)
        stream.feed([])  # runs them again

    @precondition(lambda self: self.streams)
    @rule(index=any_stream, counts=st.lists(st.integers(1, 2 * W), min_size=1, max_size=4), seed=st.integers(0, 99))
    def talk(self, index, counts, seed):
        for count in counts:
            self.feed(index, count, seed, begins_message=True, num_following=2)
            self.feed(index, 2, seed, begins_message=count % 2 == 0)
            self.generate([index], 3, leave=False)

    @precondition(lambda self: self.streams)
    @rule(indices=st.lists(any_stream, min_size=1, max_size=2 * NUM_ROWS), count=st.integers(1, 6), leave=st.booleans())
    def generate(self, indices, count, leave):
        entries = list({id(entry): entry for entry in map(self.pick, indices)}.values())
        for _ in range(count):
            for entry in entries:
                stream, record, iterator = entry
                if not record.ids:
                    with pytest.raises(RuntimeError, match="stream: expected tokens to go on from"):
                        next(iterator or stream.generate())
                    entry[2] = None
                    continue
                entry[2] = iterator or stream.generate()
                record.generate(next(entry[2]))
        if not leave:
            for entry in entries:
                self.stop(entry)

    @precondition(lambda self: self.streams)
    @rule(index=any_stream)
    def fork(self, index):
        entry = self.pick(index)
        stream, record, _ = entry
        record.check(self.model, self.plain)
        if len(self.streams) == MAX_STREAMS:
            with pytest.raises(PoolFullError):
                stream.fork()
        else:
            self.add(stream.fork(), copy.deepcopy(record))

    @precondition(lambda self: self.streams)
    @rule(index=any_stream, is_replaced=st.booleans())
    def save_and_load(self, index, is_replaced):
        entry, path = self.pick(index), Path(self.folder.name, "saved")
        stream, record, _ = entry
        record.check(self.model, self.plain)
        stream.save(path)
        if is_replaced:
            self.stop(entry)
            self.streams.remove(entry)
            stream.close()
        if len(self.streams) == MAX_STREAMS:
            with pytest.raises(PoolFullError):
                self.pool.load(path)
        else:
            self.add(self.pool.load(path), copy.deepcopy(record))
        path.unlink()

    @precondition(lambda self: self.streams)
    @rule(index=any_stream, count=st.integers(0, 2 * HEADROOM))
    def rollback(self, index, count):
        stream, record, _ = self.pick(index)
        record.check(self.model, self.plain)
        try:
            stream.rollback(count)
        except RuntimeError:
            assert count > min(len(record.ids), record.sure_rollback - self.num_drafts)
        else:
            record.rollback(count)

    @precondition(lambda self: self.streams)
    @rule(index=any_stream, what=st.sampled_from(["iterator", "tokens", "stream"]))
    def end(self, index, what):
        entry = self.pick(index)
        stream, record, _ = entry
        record.check(self.model, self.plain)
        if what == "tokens":
            stream.reset()
            record.reset()
            return
        self.stop(entry)
        if what == "stream":
            self.streams.remove(entry)
            stream.close()

    @invariant()
    def lengths(self):
        assert len(self.pool) == len(self.streams)
        for stream, record, iterator in self.streams:
            assert len(stream) == len(record.ids)
            state = stream._state
            assert not state.num_feeding
            assert not (state.wants_token and iterator is None)

    @invariant()
    def places(self):
        places = [stream._state.memory.place for stream, _, _ in self.streams]
        assert places.count("device") <= NUM_ROWS
        assert places.count("device") + places.count("host") <= NUM_ROWS + MAX_PARKED
        assert places.count("disk") == len([*Path(self.folder.name).iterdir()])

    @precondition(lambda self: self.streams)
    @rule(index=any_stream)
    def look(self, index):
        stream, record, _ = self.pick(index)
        if record.ids:
            assert stream.in_sight == record.in_sight(len(record.ids))

    def teardown(self):
        for entry in self.streams:
            self.stop(entry)
        self.pool.close()
        assert not [*Path(self.folder.name).iterdir()]
        self.folder.cleanup()


class OneLayer(PoolAgainstLists):
    """With eviction by messages: the output depends on nothing but the ids in sight."""

    layers = 1


class CapturedSteps(PoolAgainstLists):
    """Replayed from graphs. With windows of the model's own, too."""

    family, graphs = "gemma2", Graphs()

    def __init__(self):
        super().__init__()
        get_patch(self.model).capture_steps(self.graphs)


def run(machine, examples, steps):
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


@pytest.mark.parametrize("machine", [PoolAgainstLists, OneLayer, CapturedSteps])
def test_any_order_of_calls(machine):
    run(machine, 6, 50)
    assert machine is not CapturedSteps or machine.graphs.num_replays


@pytest.mark.slow
def test_20000_steps():
    run(PoolAgainstLists, 60, 200)
    run(OneLayer, 40, 200)
