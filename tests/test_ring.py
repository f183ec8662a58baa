"""Slot arithmetic: C++ against plain arrays, and C++ against each place in Python that knows it too."""

import itertools
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from sinkattn import RingLayout
from sinkattn.reference import slot_of, visible

ROOT = Path(__file__).parents[1]
LAYOUTS = [RingLayout(*sizes) for sizes in itertools.product((0, 1, 3), (1, 2, 5), (0, 1, 3))]
LAYOUT_IDS = [f"S{layout.num_sinks}-W{layout.window}-R{layout.headroom}" for layout in LAYOUTS]
SANITIZED = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]


def test_cpp_arithmetic_equals_a_replay(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "ring_test"
    source = ROOT / "tests/csrc/ring_test.cpp"
    command = [compiler, *SANITIZED, "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stderr


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_layout_agrees_with_reference(layout):
    sinks, window, ring = layout.num_sinks, layout.window, layout.ring
    for token in range(3 * layout.slots):
        tokens_seen = visible(token, sinks, window)
        slots_seen = [slot_of(seen, sinks, ring) for seen in tokens_seen]
        assert layout.slot(token) == slot_of(token, sinks, ring)
        assert {slot for slot in range(layout.slots) if layout.visible(token, slot)} == set(slots_seen)
        assert layout.position(token) == len(tokens_seen) - 1
        in_window = [seen for seen in tokens_seen if seen >= sinks]
        assert layout.window_begin(token) == (in_window[0] if in_window else token + 1)
        assert [layout.age(token, layout.slot(seen)) for seen in in_window] == [token - seen for seen in in_window]


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("start", [0, 10**9])
def test_held_runs_are_what_was_written_last(layout, start):
    held = {}
    for token in range(max(0, start - 2 * layout.slots), start + 3 * layout.slots):
        if token >= start:
            runs = layout.held_runs(token)
            by_slot = {slot + i: first + i for first, slot, count in runs for i in range(count)}
            assert list(by_slot) == sorted(by_slot)
            assert by_slot == {**{sink: sink for sink in range(min(token, layout.num_sinks))}, **held}
        held[slot_of(token, layout.num_sinks, layout.ring)] = token


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 4, 0), r"num_sinks: expected 0 or more .*, got -1"),
        ((2**40, 4, 0), r"num_sinks: .*got 1099511627776"),
        ((4, 0, 0), r"window: expected 1 or more .*, got 0"),
        ((4, 2**40, 0), r"window: .*got 1099511627776"),
        ((4, 4, -2), r"headroom: expected 0 or more .*, got -2"),
        ((4, 4, 2**40), r"headroom: .*got 1099511627776"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        RingLayout(*sizes)


def test_headroom_is_none_by_default():
    assert RingLayout(4, 1020) == RingLayout(num_sinks=4, window=1020, headroom=0)


def test_layout_is_a_value():
    layout = RingLayout(4, 1020, 8)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert repr(layout) == "RingLayout(num_sinks=4, window=1020, headroom=8)"
    for other in (RingLayout(5, 1020, 8), RingLayout(4, 1021, 8), RingLayout(4, 1020, 9)):
        assert layout != other
    assert layout != (4, 1020, 8)
    with pytest.raises(AttributeError):
        layout.window = 3


def test_write_runs_from_python():
    layout = RingLayout(2, 4, 1)
    assert layout.write_runs(0, 9) == [(0, 0, 2), (4, 4, 3), (7, 2, 2)]
    assert layout.write_runs(7, 0) == []
    for seen, count in ((-1, 1), (1, -1), (2**62, 1)):
        with pytest.raises(ValueError, match="expected 0 to 2"):
            layout.write_runs(seen, count)


def test_held_runs_from_python():
    layout = RingLayout(2, 4, 1)
    assert layout.held_runs(0) == []
    assert layout.held_runs(9) == [(0, 0, 2), (7, 2, 2), (4, 4, 3)]
    with pytest.raises(ValueError, match="expected 0 to 2"):
        layout.held_runs(-1)
