"""bench/scale.py and bench/simulate_sessions.py: cases with known results, and the tables of docs/scale.md."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scale
import simulate_sessions
from simulate_sessions import Case, Cluster, Load, Simulation

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
BENCHMARKS = json.loads((ROOT / "bench" / "results" / "nvidia-h200-2026-11-27.json").read_text())["benchmarks"]
# Streams move in no time, and a token takes a second.
SIMPLE = Cluster(replicas=1, rows=2, parked=0, feed_seconds=0, token_seconds=1, host_seconds=0, folder_seconds=0)
ONCE = Load(sessions=30_000, rate=0.1, turns=1, message=1, reply=10)


def test_sizes():
    """By hand: Llama 3.1 8B has 8.03 billion parameters, and 32 layers with 8 heads of 128 numbers of two bytes."""
    model = scale.MODELS[1]
    assert model.weights / scale.BYTES == pytest.approx(8.03e9, rel=1e-3)
    assert scale.MODELS[0].weights / scale.BYTES == pytest.approx(1.236e9, rel=1e-3)
    assert scale.MODELS[2].weights / scale.BYTES == pytest.approx(70.55e9, rel=1e-3)
    assert model.token == 32 * 2 * 8 * 128 * 2
    assert model.stream(4096, prefix=4, headroom=0) == 4100 * model.token
    assert scale.num_streams(model, scale.H200, 4096) == int((0.9 * 141e9 - model.weights) / (5120 * model.token))


def test_times_are_near_those_that_were_measured():
    measured = {}
    for each in BENCHMARKS:
        if each["name"].startswith("test_decode["):
            measured[each["params"]["batch"], each["params"]["window"]] = each["extra_info"]["sinkattn us"]
    assert len(measured) == 9
    for (streams, window), us in measured.items():
        assert scale.attention_us(streams, window, 8, 128) == pytest.approx(us, rel=0.13)
    [step] = (each["extra_info"] for each in BENCHMARKS if each["name"] == "test_token")
    assert scale.step_ms(scale.MODELS[1], scale.H200, 1, 4096) == pytest.approx(step["sinkattn graph ms"], rel=1e-2)


def test_the_tables_are_those_of_the_document():
    for table in scale.tables().split("\n\n"):
        assert table in DOCUMENT


@pytest.mark.parametrize("name", ["W = 4k", "W = 16k", "W = 16k, fewer turns"])
def test_the_document_has_what_fewer_sessions_show_too(name):
    """Shares within three points, times within a quarter."""
    [documented] = (line for line in DOCUMENT.splitlines() if line.startswith(f"| {name} |"))
    case = simulate_sessions.CASES[name]
    row = simulate_sessions.row(name, case, sessions=20_000, seed=1)
    for index, (shown, expected) in enumerate(zip(_cells(row), _cells(documented), strict=True)):
        if shown != expected:
            tolerance = {"rel": 0.25} if index in (6, 7) else {"abs": 3}
            assert float(shown) == pytest.approx(float(expected), **tolerance)


def _cells(row):
    return [cell.strip().replace(",", "") for cell in row.strip("|").split("|")]


def test_waits_are_those_of_erlang():
    """Sessions of one turn, at random, of exponential length: a queue M/M/c, whose waits are known."""
    rows, load = 4, replace(ONCE, rate=0.28, reply=10.0)
    result = Simulation(load, replace(SIMPLE, rows=rows)).run()
    offered = load.rate * load.reply
    at_once = sum(offered**k / math.factorial(k) for k in range(rows))
    all_busy = offered**rows / math.factorial(rows) * rows / (rows - offered)
    waits = all_busy / (at_once + all_busy)
    assert np.mean(result.waits > 0) == pytest.approx(waits, rel=0.08)
    assert np.mean(result.waits) == pytest.approx(waits * load.reply / (rows - offered), rel=0.15)


def test_rows_at_work_are_those_of_little():
    """As many as come a second, times how long each takes."""
    load = Load(sessions=5_000, rate=0.5, turns=3, pause=20, reply=8)
    result = Simulation(load, replace(SIMPLE, replicas=2, rows=40)).run()
    assert result.at_work * 80 == pytest.approx(load.rate * load.turns * load.reply, rel=0.05)
    assert not result.waits.any()
    assert result.turns == pytest.approx(0.8 * load.sessions * load.turns, rel=0.05)


def test_moving_takes_its_time():
    """One row, two sessions of three turns, alternately: each parks the other's stream, and gets its own back."""
    cluster = replace(SIMPLE, rows=1, parked=5, host_seconds=0.25, token_seconds=0.001)
    simulation = Simulation(Load(sessions=2, rate=1), cluster)
    simulation._arrivals, simulation._next_turn, simulation._last_turn = [0.0, 2.0], [0, 3], [3, 6]
    simulation._pauses, simulation._fed, simulation._replies = [5.0] * 6, [1] * 6, [1] * 6
    simulation._counted = simulation._replicas[0]._counted = (0.0, math.inf)
    result = simulation.run()
    assert result.places == {"new": 2 / 6, "row": 0, "host": 4 / 6, "folder": 0}
    assert result.first_tokens == pytest.approx([0.001, 0.251, 0.501, 0.501, 0.501, 0.501])
    assert simulation._replicas[0].host_total == 9 * 0.25


@pytest.mark.parametrize("changes", [{}, {"parked": 0}, {"leaving": (1, 0.5)}, {"route": "any"}])
def test_nothing_is_lost(changes):
    """Each turn is served once; no more streams are in a place than fit; all that there were are somewhere."""
    load = Load(sessions=3_000, rate=2.0, turns=3, pause=5, reply=3)
    cluster = replace(SIMPLE, **{"replicas": 3, "rows": 8, "parked": 10, "host_seconds": 0.01, **changes})
    simulation = Simulation(load, cluster)
    total = simulation._last_turn[-1]
    result = simulation.run()
    assert simulation._next_turn == simulation._last_turn
    assert total == sum(simulation._last_turn[i] - (simulation._last_turn[i - 1] if i else 0) for i in range(3_000))
    assert result.held == load.sessions
    assert result.most_rows <= 8
    assert result.most_parked <= cluster.parked
    assert sum(result.places.values()) == pytest.approx(1)
    for replica in simulation._replicas:
        assert (replica.num_at_work, len(replica.waiting)) == (0, 0)
        for place, sessions in ((simulate_sessions.ROW, replica.idle), (simulate_sessions.PARKED, replica.parked)):
            assert all(simulation._place[x] == place and simulation._at[x] == replica.index for x in sessions)
    if "leaving" in changes:
        gone = simulation._replicas[1]
        assert result.num_left > 0
        assert (len(gone.idle), len(gone.parked)) == (0, 0)


def test_the_same_seed_is_the_same_run():
    runs = [Simulation(replace(ONCE, sessions=2_000), SIMPLE, seed).run() for seed in (3, 3, 4)]
    assert (runs[0].waits == runs[1].waits).all()
    assert len(runs[0].waits) != len(runs[2].waits) or (runs[0].waits != runs[2].waits).any()


def test_case_rates():
    case = Case(at_work=0.5)
    load, cluster = case.load(1000), case.cluster()
    turn = cluster.feed_seconds * load.message + cluster.token_seconds * load.reply
    assert load.rate * load.turns * turn == pytest.approx(0.5 * cluster.rows * cluster.replicas)
