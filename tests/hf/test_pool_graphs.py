"""Steps of a `StreamPool` replayed from graphs give what plain steps give, whoever is in them; here on a stand-in."""

import gc
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch
from families import build
from pool_streams import HEADROOM, S, W, some_ids
from recorded_graph import WARM, WARM_AGAIN, Graphs, NoWaits, RecordedGraph

import sinkattn
from sinkattn import SamplingParams, StreamPool
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.pool import row_cache
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.moved import tensors_in
from sinkattn.hf.pool.row_cache import RowCache, RowInput
from sinkattn.hf.swap import step_graphs

NUM_ROWS = 6
ROUNDS = WARM + 4


def pair(family="llama", new_graph=None):
    """The same model, with plain steps and with captured ones, and the graphs of the latter."""
    plain, model = (sinkattn.enable(build(family, torch.float64), S, W, HEADROOM) for _ in range(2))
    graphs = new_graph or Graphs()
    get_patch(model).capture_steps(graphs)
    return plain, model, graphs


def open_streams(model, count=NUM_ROWS, num_rows=NUM_ROWS):
    """Streams of different ages, sinks and ways to forget, one of which samples."""
    pool = StreamPool(model, num_rows, max_parked=count, max_prefix=5)
    sampling = SamplingParams(temperature=1.5, repetition_penalty=1.2, seed=3)
    streams = [
        pool.open(
            some_ids(index % 4, index),
            evict="message" if index % 3 == 1 else "token",
            sampling=sampling if index == 2 else None,
        )
        for index in range(count)
    ]
    for index, stream in enumerate(streams):
        for part in range(index):
            stream.feed(some_ids(7, part))
        stream.feed(some_ids(1, 9))
    return pool, streams


def play(model, counts=(1, 2, 3, 4, 6), **options):
    """A pool, and the tokens of its streams, of which more and more generate, while others only have a row."""
    pool, streams = open_streams(model, **options)
    running = [stream.generate() for stream in streams]
    tokens = [next(each) for count in counts for _ in range(ROUNDS) for each in running[-count:]]
    return pool, tokens


def steps_by_size(model):
    [steps] = get_patch(model)._step_graphs._steps.values()
    return steps


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "llama4_text"])
def test_tokens_are_those_of_plain_steps(family):
    """From one graph for each size, which share their memory."""
    plain, model, graphs = pair(family)
    plain_pool, want = play(plain)
    pool, got = play(model)
    assert got == want
    torch.testing.assert_close(*(each.scheduler.engine._logits for each in (pool, plain_pool)), rtol=1e-9, atol=1e-9)
    steps = steps_by_size(model)
    assert sorted(steps) == [1, 2, 4, len(pool)]
    assert all(each.is_replayed for each in steps.values())
    first = graphs.made[0]
    assert [graph.beside for graph in graphs.made] == [None, first, first, first]
    # All steps of streams that generate, but the first ones of each size.
    assert graphs.num_replays >= 5 * (ROUNDS - 1) - 4 * WARM


def test_streams_take_turns_in_rows():
    plain, model, graphs = pair()
    options = {"counts": (5, 6, 2), "num_rows": 3}
    _, want = play(plain, **options)
    pool, got = play(model, **options)
    assert got == want
    assert sorted(steps_by_size(model)) == [1, 2, 3]
    assert graphs.num_replays
    assert len(pool) == 6


@pytest.mark.parametrize("name", ["rows", "seen", "num_sinks", "begins"])
def test_a_number_that_stays_as_it_was_captured_gives_other_tokens(name, monkeypatch):
    """Steps of one row, of several streams in turn."""

    def play_in_turn(model):
        _, streams = open_streams(model, 4, 4)
        return [list(stream.generate(WARM)) for _ in range(3) for stream in streams]

    plain, model, graphs = pair()
    want = play_in_turn(plain)
    assert play_in_turn(model) == want
    assert graphs.num_replays

    class Frozen(row_cache.Selection):
        def __new__(cls, *numbers):
            given = dict(zip(cls._fields, numbers, strict=True))
            return super().__new__(cls, **given | {name: given[name].clone()})

    monkeypatch.setattr(row_cache, "Selection", Frozen)
    monkeypatch.setattr(step_graphs, "_compare", lambda got, want: (True, True))
    got = None
    with suppress(RuntimeError) if name == "seen" else nullcontext():  # before the beginning of a window it is refused
        got = play_in_turn(model)
    assert got != want


@pytest.mark.parametrize("ids", [(), (0,)], ids=["idle", "not idle"])
def test_rows_of_other_streams_stay_as_they_are(ids, monkeypatch):
    """If idle rows got a token, they would not."""
    _, model, _ = pair()
    idle_rows = RowCache._idle_rows
    monkeypatch.setattr(RowCache, "_idle_rows", lambda *args: [RowInput(*x[:4], ids) for x in idle_rows(*args)])
    pool, streams = open_streams(model)
    rest = streams[:3]

    def rows():
        return [x for each in rest for x in tensors_in(pool._memory.copy(each._state.memory).contents)]

    before, running = rows(), [stream.generate() for stream in streams[3:]]
    for _ in range(ROUNDS):
        for each in running:
            next(each)
    assert steps_by_size(model)[4].is_replayed
    assert all(map(torch.equal, before, rows())) == (not ids)


@pytest.mark.parametrize("is_compared", [False, True])
def test_a_step_waits_for_nothing_until_its_tokens_are_read(is_compared, monkeypatch):
    """But for comparing a new graph with the step itself, without which none is trusted."""
    _, model, graphs = pair()
    run, compare = Engine.run, step_graphs._compare

    def watched(engine, segments):
        with NoWaits():
            run(engine, segments)

    def unwatched(got, want):
        with torch._C.DisableTorchFunction():
            return compare(got, want)

    monkeypatch.setattr(Engine, "run", watched)
    if not is_compared:
        monkeypatch.setattr(step_graphs, "_compare", unwatched)
    _, streams = open_streams(model)
    running = [stream.generate() for stream in streams]
    for _ in range(ROUNDS):
        for each in running:
            next(each)
    assert bool(graphs.num_replays) == (not is_compared)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("no graph today")], ids=type)
def test_steps_go_on_without_a_graph_that_fails(error):
    class Fails(RecordedGraph):
        def capture(self, function):
            raise error

    plain, model, _ = pair(new_graph=Fails)
    _, want = play(plain, counts=(1, 3))
    pool, got = play(model, counts=(1, 3))
    assert got == want
    steps = steps_by_size(model)
    # Any other error may be the model's. Then no step has idle rows any more.
    assert get_patch(model).captures_steps == isinstance(error, torch.OutOfMemoryError)
    assert sorted(steps) == ([1, 4] if get_patch(model).captures_steps else [1])
    assert not any(each.is_replayed for each in steps.values())
    assert len(pool) == NUM_ROWS


def test_other_weights_take_effect():
    plain, model, graphs = pair()

    def play_with(model, factor):
        _, streams = open_streams(model)
        tokens = list(streams[1].generate(ROUNDS))
        layer = model.model.layers[0].mlp.up_proj
        kept, layer.weight = layer.weight, torch.nn.Parameter(layer.weight * factor)
        tokens += streams[1].generate(WARM_AGAIN + 3)
        layer.weight = kept
        return tokens

    want = play_with(plain, 100)
    assert play_with(plain, 1) != want
    assert play_with(model, 100) == want
    assert len(graphs.made) == 2


def test_an_interrupted_replay_is_no_token(monkeypatch):
    plain, model, graphs = pair()
    (_, alone), (_, streams) = open_streams(plain, 1), open_streams(model, 1)
    want, got = list(alone[0].generate(3 * ROUNDS)), list(streams[0].generate(ROUNDS))

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordedGraph, "replay", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(streams[0].generate())
    assert got + list(streams[0].generate(2 * ROUNDS)) == want
    assert len(graphs.made) == 1


def test_graphs_go_with_their_pool():
    _, model, graphs = pair()
    pool, _ = play(model, counts=(1,))
    graph = weakref.ref(graphs.made.pop())
    assert graph() is not None
    del pool
    gc.collect()
    assert graph() is None
