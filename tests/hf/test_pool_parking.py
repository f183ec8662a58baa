"""Streams of a `StreamPool` that are parked: where they are, and that they come back whole, whatever goes wrong."""

import copy
import pickle
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hf_models import tensors_of
from pool_streams import Record, model_in_double, some_ids
from transformers import LogitsProcessor

from sinkattn import PoolFullError, SamplingParams, StreamPool
from sinkattn.hf.cache.stream_file import write_streams, write_tensors
from sinkattn.hf.pool.disk import OnDisk
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.memory import OwnCaches, RingMemory
from sinkattn.hf.pool.moved import moved

WRITE, SAVE = "sinkattn.hf.pool.disk.write_tensors", "sinkattn.hf.pool.stream.write_streams"


class Recorded:
    """A stream of a pool and what it should be."""

    def __init__(self, pool, seed, params=None):
        self.stream, self.record = pool.open(sampling=params), Record(params)
        self.feed(some_ids(20 + seed, seed))

    def feed(self, ids):
        self.record.feed(ids)
        self.stream.feed(ids)

    def generate(self, count):
        for token in self.stream.generate(count):
            self.record.generate(token)

    def rollback(self, count):
        self.stream.rollback(count)
        self.record.rollback(count)

    @property
    def place(self):
        return self.stream._state.memory.place


def places(pool):
    return Counter(state.memory.place for state in pool.scheduler.streams)


def no_space(*_):
    raise OSError("No space left on device")


def test_catching_up_parks_no_other_stream():
    pool = StreamPool(model_in_double(), 1, max_parked=1)
    one, two = Recorded(pool, 0), Recorded(pool, 1)
    for each in (one, two):
        each.record.feed(some_ids(3))
        each.stream.feed(some_ids(3), wait=False)
        each.stream.catch_up()
    assert (one.place, two.place) == ("host", "device")
    assert [len(each.stream._state.queue) for each in (one, two)] == [3, 0]
    for each in (one, two):
        each.generate(4)
        each.record.check(model_in_double())
    one.stream.close()
    one.stream.catch_up()


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "gpt2"])
def test_streams_beyond_host_memory_come_back_from_disk(family, tmp_path):
    model = model_in_double(family)
    pool = StreamPool(model, 2, max_parked=1, max_on_disk=3, park_folder=tmp_path)
    params = [None, SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2)]
    entries = [Recorded(pool, seed, params[seed % 2]) for seed in range(6)]
    assert [entry.place for entry in entries] == [*["disk"] * 3, "host", "device", "device"]
    assert len([*tmp_path.iterdir()]) == 3
    assert repr(pool) == f"StreamPool({type(model).__name__}, streams=6, device=2, host=1, disk=3)"
    assert repr(entries[0].stream) == "Stream(tokens=20, prefix=0, memory='disk')"
    for call in (pool.open, entries[0].stream.fork):
        with pytest.raises(PoolFullError, match="pool: 6 streams are open, the most that it takes"):
            call()
    nbytes = pool.nbytes
    for _ in range(2):
        for entry in entries:
            entry.generate(3)
            entry.feed([5, 6])
            assert places(pool) == {"device": 2, "host": 1, "disk": 3}
            assert len([*tmp_path.iterdir()]) == 3
    assert pool.nbytes == pytest.approx(nbytes, rel=0.01)  # with ids, where some are encoded again
    for entry in entries:
        entry.record.check(model)
    entries[0].stream.close()
    assert len([*tmp_path.iterdir()]) == 2
    assert repr(entries[0].stream) == "Stream(closed)"
    pool.close()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_file_is_not_read_for(family, tmp_path, monkeypatch):
    model = model_in_double(family)
    pool = StreamPool(model, 1, max_on_disk=1, park_folder=tmp_path)
    entry, other = Recorded(pool, 0), Recorded(pool, 1)
    stream, record = entry.stream, entry.record
    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "read", None)
        assert len(stream) == 20
        assert stream.prefix == []
        assert stream.in_sight == record.in_sight(20)
        with pytest.raises(RuntimeError, match="stream: cannot forget 21 of 20 tokens"):
            stream.rollback(21)
        entry.rollback(2)
        stream.feed([7], wait=False)
        record.feed([7])
        assert stream.in_sight == record.in_sight(19)
        assert entry.place == "disk"
    entry.generate(3)
    record.check(model)
    assert other.place == "disk"
    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "read", None)
        other.stream.reset()
        assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("family", ["llama", "falcon_h1", "gpt2"])
def test_forks_and_saves_of_a_stream_on_disk(family, tmp_path):
    model = model_in_double(family)
    pool = StreamPool(model, 1, max_parked=1, max_on_disk=4)
    entries = [Recorded(pool, seed) for seed in range(3)]
    entries[0].generate(2)
    entries[1].feed([1])
    entries[2].feed([1])
    assert entries[0].place == "disk"
    entries[0].stream.save(tmp_path / "a")
    fork, loaded = entries[0].stream.fork(), pool.load(tmp_path / "a")
    assert entries[0].place == "disk"
    assert places(pool) == {"device": 1, "host": 1, "disk": 3}
    entries[0].generate(4)
    entries[0].record.check(model)
    want = entries[0].record.ids[22:]
    assert list(fork.generate(4)) == want
    assert list(loaded.generate(4)) == want


class NoRepetition(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_what_no_file_can_hold_stays(tmp_path):
    model, params = model_in_double(), SamplingParams(processors=[NoRepetition()])
    pool = StreamPool(model, 1, max_on_disk=1, park_folder=tmp_path)
    entry, _ = Recorded(pool, 0, params), Recorded(pool, 1)
    assert entry.place == "disk"
    entry.generate(5)
    entry.record.check(model)


def test_the_one_that_is_idle_for_longest_goes_to_disk():
    pool = StreamPool(model_in_double(), 1, max_parked=2, max_on_disk=2)
    entries = [Recorded(pool, seed) for seed in range(3)]
    entries[0].feed([1])
    entries.append(Recorded(pool, 3))
    assert [entry.place for entry in entries] == ["host", "disk", "host", "device"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_full_disk(family, tmp_path, monkeypatch):
    """Who needs a row that only a file would make free gets the error; nothing is lost, and others go on."""
    model = model_in_double(family)
    pool = StreamPool(model, 1, max_parked=1, max_on_disk=9, park_folder=tmp_path)
    entries = [Recorded(pool, seed) for seed in range(3)]
    late, later = pool.open(), pool.open()
    with monkeypatch.context() as patch:
        patch.setattr(WRITE, no_space)
        late.feed(some_ids(5))  # one more in host memory, and no more
        for call in (lambda: later.feed(some_ids(5)), lambda: next(entries[0].stream.generate()), late.fork):
            with pytest.raises(OSError, match="pool: a stream cannot be parked on disk: No space left on device"):
                call()
        assert places(pool) == {"device": 1, "host": 2, "disk": 1, None: 1}
        entries[1].generate(2)  # exchanged with the one that has a row
        entries[2].generate(2)
        late.close()
        assert places(pool) == {"device": 1, "host": 1, "disk": 1, None: 1}
        entries[0].generate(2)  # an exchange with the disk
        assert places(pool) == {"device": 1, "host": 2, None: 1}
        assert not [*tmp_path.iterdir()]
        with pytest.raises(OSError, match="No space left"):
            later.feed([])
    assert len(later) == 5
    assert len([*later.generate(1)]) == 1
    for entry in entries:
        entry.generate(2)
        entry.record.check(model)
    assert places(pool) == {"device": 1, "host": 1, "disk": 2}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def half(path, tensors):
        path.write_bytes(b"half")
        no_space()

    pool = StreamPool(model_in_double(), 1, max_on_disk=2, park_folder=tmp_path)
    _, second, third = Recorded(pool, 0), pool.open(), pool.open()
    with monkeypatch.context() as patch:
        patch.setattr(WRITE, half)
        second.feed([1])
    assert not [*tmp_path.iterdir()]
    tmp_path.rmdir()
    with pytest.raises(OSError, match=r"pool: a stream cannot be parked on disk: .* No such file"):
        third.feed([1])
    tmp_path.mkdir()
    third.feed([])
    assert len([*tmp_path.iterdir()]) == 2


def test_others_go_on_while_a_file_is_written(tmp_path, monkeypatch):
    """Nobody waits for a stream that is parked to be written, and no step for one that is saved."""
    model = model_in_double()
    pool = StreamPool(model, 1, max_parked=1, max_on_disk=1, park_folder=tmp_path)
    entries = [Recorded(pool, seed) for seed in range(2)]

    def beside(call, write):
        def write_beside(*arguments):
            with ThreadPoolExecutor(1) as executor:
                executor.submit(call).result(60)
            write(*arguments)

        return write_beside

    def feed():
        entries[0].stream.feed([3], wait=False)
        entries[0].record.feed([3])

    monkeypatch.setattr(WRITE, beside(feed, write_tensors))
    entries.append(Recorded(pool, 2))
    assert entries[0].place == "disk"
    assert len(entries[0].stream) == 21
    monkeypatch.undo()
    monkeypatch.setattr(SAVE, beside(lambda: entries[1].generate(2), write_streams))
    entries[0].stream.save(tmp_path / "a")
    assert len(entries[1].stream) == 23
    for entry in entries:
        entry.generate(2)
        entry.record.check(model)


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_file_that_is_lost(damage, tmp_path):
    model = model_in_double()
    pool = StreamPool(model, 1, max_on_disk=2, park_folder=tmp_path)
    entry, other = Recorded(pool, 0), Recorded(pool, 1)
    [folder] = tmp_path.iterdir()
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        file = folder / "stream.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    stream = entry.stream
    for call in (lambda: stream.feed([1]), lambda: next(stream.generate()), stream.fork, lambda: stream.save("a")):
        with pytest.raises(OSError, match=r"stream: cannot come back from disk; reset\(\) begins it anew: "):
            call()
    other.generate(2)
    other.record.check(model)
    stream.reset()
    stream.feed([3])
    assert len(list(stream.generate(2))) == 2


@contextmanager
def interrupted_at_line(number, functions):
    """Raise KeyboardInterrupt before a line of these functions is run, the first time; yields the lines to go."""
    codes, left = {function.__code__ for function in functions}, [number]

    def trace(frame, event, _):
        if frame.f_code not in codes:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(("family", "stride"), [("llama", 1), ("gpt2", 3)])
def test_an_interruption_anywhere_leaves_streams_whole(family, stride, tmp_path):
    model = model_in_double(family, num_hidden_layers=1)
    memory = RingMemory if family == "llama" else OwnCaches
    functions = [Engine.give_rows, Engine._bring_in, Engine.make_room, OnDisk.__init__, OnDisk.read]
    functions += [memory.bring_in, memory.park, memory.copy, RingMemory._clear, moved]
    pool = StreamPool(model, 1, max_parked=1, max_on_disk=2, park_folder=tmp_path)
    entries = [Recorded(pool, seed) for seed in range(4)]
    number, is_done = 1, False
    while not is_done:
        entry = next(entry for entry in entries if entry.place == "disk")
        entry.record.feed([number])
        with interrupted_at_line(number, functions) as left:
            entry.stream.feed([number])
        is_done = left[0] > 0
        entry.generate(1)
        assert len(entry.stream) == len(entry.record.ids)
        assert places(pool)["host"] <= 2  # until the next exchange
        number += stride
    for entry in entries:
        entry.generate(1)
        entry.record.check(model)
    assert number > 50
    files = [folder for folder in tmp_path.iterdir() if [*folder.iterdir()]]
    assert len(files) == 2


def test_ten_times_oversubscribed(tmp_path):
    """Every stream is refused, or gets its tokens; memory and files are as many at the end as at the beginning."""
    model = model_in_double(num_hidden_layers=1)
    pool = StreamPool(model, 2, max_parked=3, max_on_disk=15, park_folder=tmp_path)
    entries, sizes, refused = [], [], 0
    for turn in range(100):
        try:
            entries.append(Recorded(pool, turn))
        except PoolFullError:
            refused += 1
            closed = entries.pop(turn % 7)
            closed.record.check(model)
            closed.stream.close()
        entries[turn * 5 % len(entries)].generate(2)
        held = sum(x.nbytes for state in pool.scheduler.streams for x in tensors_of(state.memory.contents or 0))
        files = [*tmp_path.glob("*/*")]
        sizes.append((len(files), held, sum(file.stat().st_size for file in files)))
    assert refused == 40
    full = [size for size in sizes if size[0] == 15]
    assert len(full) > 30
    assert max(sizes) == full[0] == full[-1]


@pytest.mark.parametrize("family", ["falcon_h1", "gpt2"])
def test_parked_caches_are_in_host_memory(family):
    """All of their tensors."""
    pool = StreamPool(model_in_double(family), 1, max_parked=1)
    entries = [Recorded(pool, seed) for seed in range(2)]
    cache = entries[0].stream._state.memory.contents
    assert {x.device.type for x in tensors_of(moved(cache, "meta"))} == {"meta"}
    assert {x.data_ptr() for x in tensors_of(moved(cache, "cpu"))}.isdisjoint(x.data_ptr() for x in tensors_of(cache))
    nbytes = pool.nbytes
    assert nbytes == entries[1].stream._state.memory.contents.nbytes
    entries[1].stream.close()
    assert pool.nbytes == 0


def test_a_stream_is_neither_copied_nor_pickled():
    stream = StreamPool(model_in_double(), 1).open()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use fork\(\) for a copy, save\(\) for a file"):
            copied(stream)


def test_arguments(tmp_path):
    model = model_in_double()
    with pytest.raises(ValueError, match="max_on_disk: expected 0 or more, got -1"):
        StreamPool(model, 1, max_on_disk=-1)
    with pytest.raises(ValueError, match=r"park_folder: expected a folder, got .*nowhere"):
        StreamPool(model, 1, max_on_disk=1, park_folder=tmp_path / "nowhere")
