"""A pool that rank 0 leads: what another rank has, in any order of calls. `test_tensor_parallel` has real ranks."""

import gc
import pickle
from unittest.mock import patch

import pytest
import torch
from hf_models import build, interrupted
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from pool_streams import HEADROOM, W, model_in_double, some_ids
from test_pool_machine import MAX_PREFIX, MAX_STREAMS, NUM_ROWS, PoolAgainstLists, any_stream, run

import sinkattn
from sinkattn.hf import join_pool
from sinkattn.hf.pool import records
from sinkattn.hf.pool.joining import JoinedMemory
from sinkattn.hf.pool.moved import tensors_in
from sinkattn.hf.pool.row_tensors import row_tensors


class OtherRank:
    """Stands for another rank: does at once what it is told, with the same model."""

    def __init__(self, model):
        self.model, self.memory, self.answer, self.has_left = model, None, None, False

    def size(self):
        return 2

    def receive(self, record):
        record = pickle.loads(pickle.dumps(record))
        if record.name == "open":
            self.memory = JoinedMemory(self.model, 1, *record.arguments)
        elif record.name == "close":
            self.has_left = True
        else:
            self.answer = self.memory.follow(record)

    def in_this_process(self):
        """Let `LeadingMemory` tell this one what to do."""
        return patch.multiple(
            records,
            check_ranks=lambda model, leads: self,
            new_group=lambda ranks: None,
            send=lambda group, record: self.receive(record),
            gather=lambda group, own: [own, self.answer],
        )


def tensors_of(memory, stream):
    """Keys and values of a stream, in its row or parked."""
    is_there = stream.row is not None
    return tensors_in(row_tensors(memory._cache.layers, stream.row) if is_there else stream.contents or [])


class LedPool(PoolAgainstLists):
    """Its tokens are those of a pool in one process, and the other rank has the same keys and values."""

    feed_in_a_step_that_fails = None

    def __init__(self):
        super().__init__()
        self.other = OtherRank(self.model)
        self.patch = self.other.in_this_process()
        self.patch.start()

    @initialize(num_drafts=st.integers(0, HEADROOM), with_model=st.booleans())
    def begin(self, num_drafts, with_model):
        speculation = None
        if num_drafts:
            draft_model = sinkattn.DraftModel(self.model, num_drafts)
            speculation = draft_model if with_model else sinkattn.PromptLookup(num_tokens=num_drafts)
        self.num_drafts = num_drafts
        self.pool = sinkattn.StreamPool(
            self.model,
            NUM_ROWS,
            max_parked=MAX_STREAMS - NUM_ROWS,
            max_prefix=MAX_PREFIX,
            tokens_per_step=W,
            speculation=speculation,
            leads=True,
        )

    @rule(index=any_stream)
    def what_is_refused_is_told_nobody(self, index):
        if self.streams:
            stream, record, _ = self.pick(index)
            record.check(self.model, self.plain)
            with patch.object(self.other, "receive", None):
                with pytest.raises(ValueError, match="tokens: expected ids from 0"):
                    stream.feed([-1])
                with pytest.raises(ValueError, match="prefix: expected up to"):
                    self.pool.open(some_ids(MAX_PREFIX + 1))

    @invariant()
    def places(self):
        memory = self.pool._memory
        for stream, _, _ in self.streams:
            here = stream._state.memory
            there = self.other.memory.streams.get(memory._numbers.get(here))
            if there is None:
                assert here.place is None
                continue
            assert there.row == here.row
            pairs = zip(tensors_of(memory._memory, here), tensors_of(self.other.memory._memory, there), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)

    def teardown(self):
        super().teardown()
        assert self.other.has_left
        self.patch.stop()


def test_another_rank_does_the_same_in_any_order_of_calls():
    run(LedPool, 4, 40)


def test_a_model_with_recurrent_states_has_a_cache_for_each_stream_on_all_ranks(tmp_path):
    model = model_in_double("falcon_h1")
    other = OtherRank(model)

    def say():
        first, second = pool.open(), pool.open()
        for stream in (first, second):
            stream.feed(some_ids(20))
        tokens = [[*x.generate(3)] for x in (second, first)]
        first.save(tmp_path / "stream")
        loaded = pool.load(tmp_path / "stream")
        return tokens, [[*x.generate(3)] for x in (loaded, first, second.fork())]

    with sinkattn.StreamPool(model, 1, max_parked=3) as pool:
        want = say()
    with other.in_this_process(), sinkattn.StreamPool(model, 1, max_parked=3, leads=True) as pool:
        assert say() == want
        for stream in pool.scheduler.streams:
            twin = other.memory.streams[pool._memory._numbers[stream.memory]]
            pairs = zip(tensors_in(stream.memory.contents), tensors_in(twin.contents), strict=True)
            assert all(torch.equal(*pair) for pair in pairs if pair[0].is_floating_point())


@pytest.fixture
def other():
    rank = OtherRank(model_in_double())
    with rank.in_this_process():
        yield rank


def test_what_is_forgotten_is_forgotten_everywhere(other):
    with sinkattn.StreamPool(other.model, 1, max_parked=1, leads=True) as pool:
        stream = pool.open()
        stream.feed(some_ids(20))
        other_stream = pool.open()
        other_stream.feed(some_ids(20, 1))
        for _ in range(3):
            with pytest.raises(sinkattn.PoolFullError):
                stream.fork()
        other_stream.close()
        for _ in range(3):
            stream.fork().close()
        del other_stream
        gc.collect()
        stream.feed([1])
        assert len(other.memory.streams) == 1
    assert other.has_left


def test_after_an_error_nothing_is_told_any_more(other):
    """The ranks may be in different forwards then."""
    with sinkattn.StreamPool(other.model, 2, leads=True) as pool:
        stream = pool.open()
        stream.feed(some_ids(20))
        assert not pool.has_failed
        with interrupted(other.model.model.layers[-1], 1, RuntimeError):  # the other rank has run it
            stream.feed([1])
        assert pool.has_failed
        with patch.object(other, "receive", None), pytest.raises(RuntimeError, match="cannot go on with the ranks"):
            stream.feed([1])
        stream.close()
    assert not other.has_left


def test_each_rank_has_its_own_part_in_a_file(other, tmp_path):
    """Files of one process, and of other parts, are refused, and the pool goes on."""
    path = tmp_path / "stream"
    with sinkattn.StreamPool(other.model, 2) as pool:
        stream = pool.open()
        stream.feed(some_ids(20))
        stream.save(path)
    with sinkattn.StreamPool(other.model, 2, leads=True) as pool:
        with pytest.raises(ValueError, match="path: rank1: expected as many keys and values"):
            pool.load(path)
        stream = pool.open()
        stream.feed(some_ids(20))
        twin = other.memory.streams[pool._memory._numbers[stream._state.memory]]
        for x in tensors_of(other.memory._memory, twin):
            x.add_(1.0)  # as if of other heads
        stream.save(path)
        here = pool.load(path)._state.memory
        there = other.memory.streams[pool._memory._numbers[here]]
        pairs = [*zip(tensors_in(here.contents), tensors_in(there.contents), strict=True)]
        assert len(pairs) == 4
        assert all(torch.equal(x + 1.0, y) for x, y in pairs)
    with sinkattn.StreamPool(other.model, 2) as pool, pytest.raises(ValueError, match="expected no tensor besides"):
        pool.load(path)


def test_what_is_refused(other):
    with pytest.raises(ValueError, match="max_on_disk: expected 0 with leads"):
        sinkattn.StreamPool(other.model, 2, max_on_disk=1, leads=True)


def test_a_model_in_one_process_has_no_ranks_to_lead():
    model = sinkattn.enable(build("llama"), 2, W)
    for call in (lambda: sinkattn.StreamPool(model, leads=True), lambda: join_pool(model)):
        with pytest.raises(ValueError, match="model: expected one that is spread over ranks"):
            call()
