"""Threads and tasks on a `StreamPool`: none waits for ever, and each gets the tokens of its stream or a clear error."""

import asyncio
import gc
import random
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from hf_models import build
from pool_streams import Record, model_in_double, some_ids
from transformers import LogitsProcessor

import sinkattn
from sinkattn import PoolFullError, SamplingParams, StreamPool

TIMEOUT = 60


def in_thread(function, *args):
    """Begin a call in a thread that does not keep the tests from ending."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def join(*threads):
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "it waits for ever"


@contextmanager
def before_layers(model, function):
    """Call a function in every forward of a model."""

    def call(*_):
        function()

    handle = model.model.layers[0].register_forward_pre_hook(call)
    try:
        yield
    finally:
        handle.remove()


def test_an_iterator_is_collected_within_a_step():
    model = sinkattn.enable(build("llama", torch.float64), 2, 12)
    pool = StreamPool(model, 2)
    left, other = pool.open(), pool.open()
    for stream in (left, other):
        stream.feed(some_ids(5))
    cycle = [left.generate()]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    with before_layers(model, gc.collect):
        join(in_thread(other.feed, some_ids(3)))
    assert len(list(left.generate(2))) == 2


def test_feeding_ends_though_the_generation_beside_it_has_ended():
    pool = StreamPool(model_in_double(), 1, tokens_per_step=1)
    stream = pool.open()
    stream.feed(some_ids(5))
    tokens = stream.generate()
    next(tokens)
    feeders = [in_thread(stream.feed, some_ids(60)) for _ in range(2)]
    while len(stream) < 126:
        time.sleep(0.001)
    tokens.close()
    join(*feeders)
    assert len(stream) == 126


def test_an_interruption_while_the_stepping_thread_waits_for_the_lock():
    model = sinkattn.enable(build("llama", torch.float64), 2, 12)
    pool = StreamPool(model, 2)
    stream, other = pool.open(), pool.open()
    has_lock, threads = threading.Event(), []

    def hold_the_lock():
        with pool.scheduler.condition:
            has_lock.set()
            time.sleep(0.3)
            assert was_interrupted

    was_interrupted = False

    def interrupt(*_):
        nonlocal was_interrupted
        was_interrupted = True
        raise KeyboardInterrupt

    def once():
        if not threads:
            threads.append(in_thread(hold_the_lock))
            has_lock.wait()
            signal.setitimer(signal.ITIMER_REAL, 0.1)

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with before_layers(model, once), pytest.raises(KeyboardInterrupt):
            stream.feed(some_ids(5))
    finally:
        signal.signal(signal.SIGALRM, previous)
    join(*threads, in_thread(other.feed, some_ids(3)))
    assert not pool.scheduler._is_stepping


@pytest.mark.parametrize("name", ["release", "acquire"])
def test_an_interruption_as_soon_as_the_lock_is_released_or_acquired(name, monkeypatch):
    pool = StreamPool(sinkattn.enable(build("llama", torch.float64), 2, 12), 2)
    stream, other = pool.open(), pool.open()
    condition, calls = pool.scheduler.condition, []
    call = getattr(condition, name)

    def interrupted():
        call()
        calls.append(name)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(condition, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.feed(some_ids(5))
    assert calls
    join(in_thread(other.feed, some_ids(3)))
    stream.feed([3])
    assert stream.in_sight == [*some_ids(5), 3]


class SometimesBroken(LogitsProcessor):
    def __init__(self, rng):
        self.rng = rng

    def __call__(self, input_ids, scores):
        if self.rng.random() < 0.05:
            raise OSError("no such file")
        return scores


def test_many_threads_on_few_rows(tmp_path):
    """With streams on disk, streams that others close, processors that fail, and steps that are interrupted."""
    model = sinkattn.enable(build("llama", torch.float64), 2, 12, 4)
    pool = StreamPool(model, 3, max_parked=3, max_on_disk=4, park_folder=tmp_path, tokens_per_step=16)
    until, interrupts = time.monotonic() + 2, random.Random(0)
    open_streams, refused, records, faults = [], [], [], []

    def maybe_interrupt():
        if interrupts.random() < 0.02:
            raise KeyboardInterrupt("stop")

    def talk(seed):
        rng = random.Random(seed)
        while time.monotonic() < until:
            params = rng.choice([SamplingParams(), SamplingParams(temperature=1.0, seed=seed)])
            broken = replace(params, processors=[SometimesBroken(rng)])
            try:
                stream = pool.open(sampling=rng.choice([params, broken]))
            except PoolFullError:
                refused.append(seed)
                time.sleep(rng.random() / 100)
                continue
            open_streams.append(stream)
            record = Record(params)
            records.append(record)
            try:
                use(stream, record, rng)
            except RuntimeError as error:
                if "is closed" not in str(error) and "a forward that failed" not in str(error):
                    raise
            stream.close()

    def use(stream, record, rng):
        for _ in range(rng.randrange(1, 6)):
            ids, is_fed = some_ids(rng.randrange(1, 20), rng.randrange(1000)), False
            record.feed(ids)
            while not is_fed:
                try:
                    stream.feed([] if is_fed is None else ids)
                    is_fed = True
                except KeyboardInterrupt:
                    is_fed = None  # they are still to come
            try:
                for token in stream.generate(rng.randrange(8)):
                    record.generate(token)
                    if rng.random() < 0.2:
                        time.sleep(rng.random() / 100)
            except (KeyboardInterrupt, OSError):
                pass

    def run(seed):
        try:
            talk(seed)
        except BaseException as error:
            faults.append(error)

    with before_layers(model, maybe_interrupt):
        threads = [in_thread(run, seed) for seed in range(16)]
        while time.monotonic() < until:
            time.sleep(0.05)
            if open_streams:
                interrupts.choice(open_streams).close()
        join(*threads)
    assert not faults
    for record in records:
        record.check(model)
    assert len(records) > 10
    assert len(pool) == 0
    assert refused
    assert not [*tmp_path.iterdir()]


def test_tasks_that_are_cancelled():
    """A stream has the tokens that its tasks have got, and no others, whenever these were cancelled."""
    model = model_in_double()
    pool, rng = StreamPool(model, 8, max_parked=92, tokens_per_step=64), random.Random(0)

    async def use(stream, record, turns):
        for turn in turns:
            ids = some_ids(5, turn)
            record.feed(ids)
            await stream.feed_async(ids)
            async for token in stream.generate_async(5):
                record.generate(token)

    async def talk(seed):
        params = SamplingParams(temperature=seed % 2, seed=seed)
        stream, record = pool.open(sampling=params), Record(params)
        task = asyncio.create_task(use(stream, record, count() if seed % 4 else range(2)))
        if seed % 4:
            await asyncio.sleep(rng.random())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        if not record.ids:
            record.feed([3])
            await stream.feed_async([3])
        assert len(stream) == len(record.ids)
        async for token in stream.generate_async(2):
            record.generate(token)
        return record

    async def main():
        return await asyncio.wait_for(asyncio.gather(*map(talk, range(100))), TIMEOUT)

    records = asyncio.run(main())
    for record in records:
        record.check(model)


def test_threads_share_steps():
    """A step runs after all threads that waited for the one before have looked, not with the first of them alone."""
    pool = StreamPool(model_in_double(), 8)
    batches, run = [], pool.scheduler.engine.run
    pool.scheduler.engine.run = lambda segments: batches.append(len(segments)) or run(segments)
    streams = [pool.open(some_ids(2, index)) for index in range(8)]
    join(*(in_thread(list, stream.generate(50)) for stream in streams))
    assert sum(batches) == 8 * (2 + 49) - 8  # a step for each prefix, and the last token waits
    assert len(batches) < 100  # so many for two groups that take turns
