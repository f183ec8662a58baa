"""Commands end in time on slow models, by a clock that only forwards move, and keep what they have after Ctrl-C."""

import json
import signal
from itertools import count

import pytest
import torch

from sinkattn import cli
from sinkattn.cli import budget
from sinkattn.cli.progress import StreamProgress
from sinkattn.evaluate import demo, endless, latency, learn, perplexity, speed
from sinkattn.evaluate.methods import CacheSize
from sinkattn.hf.load import load

# Seconds of a forward, and of each of its tokens: a model far larger than the one that really runs.
STEP, TOKEN = 0.2, 0.01
COMMANDS = {
    "demo": ["demo"],
    "ppl": ["eval", "ppl"],
    "endless": ["eval", "endless"],
    "streameval": ["eval", "streameval"],
    "stream-qa": ["eval", "stream-qa"],
    "latency": ["eval", "latency"],
    "sinks": ["eval", "sinks"],
    "chat": ["eval", "chat", "--model", "chats", "--cache", "0+128", "4+124"],
    "learn": ["eval", "learn"],
}
# The work that fewer minutes shorten.
WORK = {
    "demo": lambda figures: figures["settings"]["tokens"],
    "ppl": lambda figures: figures["settings"]["tokens"] / figures["settings"]["recompute_every"],
    "endless": lambda figures: figures["settings"]["tokens"],
    "streameval": lambda figures: figures["settings"]["count"],
    "stream-qa": lambda figures: figures["methods"]["4+124"]["questions"],
    "latency": lambda figures: figures["by_length"][-1]["seen"],
    "sinks": lambda figures: figures["tokens"],
    "chat": lambda figures: figures["settings"]["rounds"],
    "learn": lambda figures: figures["settings"]["tokens"],
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch, chat_model):
    """There, the model that ships is one that chats, also by a name."""
    (tmp_path / "chats").symlink_to(chat_model)
    monkeypatch.setattr("sinkattn.hf.load.DEMO_MODEL", chat_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Clock:
    """Moved by forwards alone."""

    def __init__(self):
        self.now = 0.0
        self.slowness = 1.0

    def add(self, tokens):
        self.now += self.slowness * (STEP + TOKEN * tokens)


@pytest.fixture
def clock(monkeypatch):
    """Every command gets a model whose forwards move this clock."""
    now = Clock()
    model, tokenizer = load(device="cpu")
    del model.model.layers[1:]  # so that it really takes less time
    model.config.num_hidden_layers = 1
    model.generation_config.eos_token_id = tokenizer.bos_token_id  # unlikely: replies are as long as they may be

    def forward(module, args, kwargs):
        now.add(kwargs["input_ids"].numel())

    def backward(loss):
        """About twice a forward, which fed 256 tokens."""
        now.now += now.slowness * 2 * 256 * TOKEN
        torch.autograd.backward(loss)

    model.register_forward_pre_hook(forward, with_kwargs=True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("time.perf_counter", lambda: now.now)
    for module in ("sinkattn.cli.demo", "sinkattn.cli.eval.session"):
        monkeypatch.setattr(f"{module}.load_model", lambda args: (model, tokenizer))
    return now


def figures_of(name, *arguments, code=0):
    assert cli.main([*COMMANDS[name], *arguments, "--json", "out.json"]) == code
    with open("out.json") as file:
        return json.load(file)


@pytest.mark.parametrize("name", COMMANDS)
def test_with_defaults_a_slow_model_is_done_in_five_minutes(name, clock, capsys):
    # The slower, the less is really run; the smallest sizes of demo and chat still have to fit.
    clock.slowness = 1.0 if name in ("demo", "chat") else 2.0
    few = figures_of(name)
    # Not far below either: the estimate is not a pretext to measure nothing.
    assert 100 < clock.now < 300
    told = capsys.readouterr().err
    assert "minutes, with smaller sizes than usual so that it ends sooner (see --minutes). Ctrl-C keeps" in told
    clock.now = 0.0
    more = figures_of(name, "--minutes", "9")
    assert 300 < clock.now < 9 * 75
    assert WORK[name](more) > WORK[name](few)


def test_what_is_given_is_obeyed_and_its_time_told_before(clock, capsys):
    figures = figures_of("ppl", "--tokens", "600", "--recompute-every", "2", "--dense-tokens", "300", "--minutes", "1")
    assert (figures["settings"]["tokens"], figures["settings"]["recompute_every"]) == (600, 2)
    told = capsys.readouterr().err
    assert "This takes about 7 minutes. Ctrl-C keeps what was measured." in told
    assert 5 * 60 < clock.now < 7 * 60


def test_timing_rounds_are_as_many_as_there_is_time_for(clock, capsys):
    rounds = figures_of("ppl")["settings"]["timed_tokens"]
    assert 3 <= rounds < 10
    assert f"Times are medians of {rounds} tokens taken in turns" in capsys.readouterr().out
    costs = figures_of("latency")["by_window"]
    assert {cost["rounds"] for cost in costs if cost["size"] == costs[-1]["size"]} == {3}
    assert {cost["rounds"] for cost in figures_of("latency", "--rounds", "5")["by_window"]} == {5}


def test_recomputation_is_left_out_where_it_takes_too_long(clock, capsys):
    assert "recomputed 128" not in figures_of("streameval")["methods"]
    assert "Recomputation was left out; --recompute asks it too." in capsys.readouterr().out
    few = ["--count", "3", "--distances", "1"]
    assert "recomputed 128" in figures_of("streameval", *few)["methods"]
    assert "recomputed 128" in figures_of("streameval", *few, "--count", "40", "--recompute")["methods"]
    assert "recomputed 128" not in figures_of("streameval", *few, "--no-recompute")["methods"]


USUAL = {
    "demo": demo.Settings(tokens=16_000, dense_tokens=5_000, samples=1_000),
    "ppl": perplexity.Settings(
        tuple(CacheSize(sinks, 128 - sinks) for sinks in (0, 1, 4)), 50_000, dense_tokens=5_000, recompute_every=16
    ),
    "endless": endless.Settings(CacheSize(4, 124), 20_000, 2_000),
    "streameval": (150, True),
    "stream-qa": 1_000,
    "latency": latency.Settings((16, 32, 64, 128, 256), (500, 1_000, 2_000, 4_000, 8_000), 50, 5.0),
    "sinks": 10_000,
    "chat": 20,
    "learn": learn.Settings(
        CacheSize(4, 124),
        tuple(map(learn.Variant.parse, ("lora", "lora+decay", "lora+reencode", "all"))),
        20_000,
        2_048,
        held_out=2_000,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fast_model_gets_the_usual_sizes(name, monkeypatch, capsys):
    """Up to where the measurement would begin, at the speed of the shipped model, a tenth of it, and far slower."""
    chosen = []

    def choose(*arguments):
        chosen.append(budget.choose(*arguments))
        raise KeyboardInterrupt

    module = name if name == "demo" else f"eval.{name.replace('-', '_')}"
    monkeypatch.setattr(f"sinkattn.cli.{module}.choose", choose)
    for slower in (1, 10):
        there = speed.Speed(0.0015 * slower, 0.00002 * slower, 256)
        monkeypatch.setattr(speed, "measure_speed", lambda model, there=there: there)
        assert cli.main([*COMMANDS[name], "--device", "cpu"]) == 130
        told = capsys.readouterr().err
        assert ("smaller sizes" in told) == (chosen[-1] != USUAL[name])
    assert chosen[0] == USUAL[name]
    monkeypatch.setattr(speed, "measure_speed", lambda model: speed.Speed(STEP, TOKEN))
    assert cli.main([*COMMANDS[name], "--device", "cpu"]) == 130
    assert chosen[-1] != USUAL[name]


@pytest.mark.parametrize(
    ("seconds", "chosen", "told"),
    [
        (1, 100, ""),
        (2, 100, "This takes about 3 minutes. Ctrl-C keeps what was measured.\n"),
        (6, 10, "This takes about 60 seconds, with smaller sizes than usual"),
        (600, 10, "This takes about 2 hours, with smaller sizes than usual"),
    ],
)
def test_the_first_that_fits_is_chosen(seconds, chosen, told, capsys):
    sizes = [100, 50, 10]
    assert budget.choose(iter(sizes), lambda size: size * seconds * (0.5 if seconds == 1 else 1), 4) == chosen
    error = capsys.readouterr().err
    assert error.startswith(told)
    assert bool(error) == bool(told)


# Ctrl-C: sizes, after how many reports of progress it comes, and what the figures then are.


def questions(method):
    return method["questions"]


INTERRUPTED = {
    "demo": (
        ["--tokens", "300", "--dense-tokens", "100", "--num-sinks", "2", "--window", "30", "--samples", "20"],
        4,
        lambda figures: (list(figures["methods"]), figures["settings"]["tokens"]),
        (["sinkattn"], 97),
    ),
    "ppl": (
        ["--tokens", "1300", "--dense-tokens", "400", "--cache", "0+32", "4+28", "--csv", "out.csv"],
        4,
        lambda figures: {
            figures["settings"]["tokens"],
            *(figures["methods"][name]["end"] for name in ("0+32", "4+28", "recomputed 32")),
        },
        {1024},
    ),
    "endless": (
        ["--tokens", "700", "--stretch", "300", "--cache", "4+60"],
        1 + 15 + 1 + 15 + 1,
        lambda figures: ([each["end"] for each in figures["stretches"]], figures["all"]["tokens"], figures["in_turns"]),
        ([300, 571], 571, None),
    ),
    "streameval": (
        ["--count", "8", "--distances", "1", "5", "--every", "2", "--cache", "4+60"],
        11,
        lambda figures: [
            questions(figures["methods"]["4+60"]["by_distance"][distance]) for distance in figures["stream_tokens"]
        ],
        [8, 3],
    ),
    "stream-qa": (
        ["--count", "12", "--cache", "0+64", "4+60"],
        5,
        lambda figures: {questions(method) for method in figures["methods"].values()},
        {5},
    ),
    "latency": (
        ["--sizes", "16", "32", "--lengths", "40", "300", "--rounds", "2"],
        1,
        lambda figures: [(cost["size"], cost["method"]) for cost in figures["by_window"] + figures["by_length"]],
        [(16, "sinkattn"), (16, "dense"), (16, "recomputed")],
    ),
    "sinks": (
        ["--size", "32", "--tokens", "600"],
        5,
        lambda figures: [each["losses"]["0"]["tokens"] for each in figures["beginnings"].values()],
        [600 - 32, 512 - 32],
    ),
    "chat": (
        ["--rounds", "4", "--max-reply", "5"],
        7,
        lambda figures: [(method["rounds"], len(method["chat"])) for method in figures["methods"].values()],
        [(4, 4), (3, 3)],
    ),
    "learn": (
        ["--tokens", "700", "--chunk", "32", "--cache", "4+60", "--variants", "all"],
        4,
        lambda figures: ([each["end"] for each in figures["stretches"]], figures["tokens"]),
        ([96, 128], 128),
    ),
}


@pytest.fixture
def ctrl_c_after(monkeypatch):
    """Presses Ctrl-C at the given report of progress, and once more at the one after ``again`` more."""

    def prepare(number, again=None):
        reports = count(1)

        def add(self, name, total):
            def update(done, note=""):
                if next(reports) in (number, again):
                    signal.raise_signal(signal.SIGINT)

            return update

        monkeypatch.setattr(StreamProgress, "add", add)

    return prepare


@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_keeps_what_was_measured(name, ctrl_c_after, capsys, tmp_path):
    arguments, reports, measured, expected = INTERRUPTED[name]
    before = signal.getsignal(signal.SIGINT)
    ctrl_c_after(reports)
    figures = figures_of(name, "--device", "cpu", "--plot", "out.png", *arguments, code=130)
    assert signal.getsignal(signal.SIGINT) is before
    assert figures["interrupted"]
    assert measured(figures) == expected
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "Interrupted: these are the figures until then." in printed.out
    assert printed.err.endswith(f"sinkattn {name if name == 'demo' else f'eval {name}'}: interrupted\n")
    # Without Ctrl-C there is more.
    ctrl_c_after(None)
    figures = figures_of(name, "--device", "cpu", "--plot", "out.png", *arguments)
    assert not figures["interrupted"]
    assert measured(figures) != expected


@pytest.mark.parametrize("name", ["ppl", "sinks"])
def test_ctrl_c_before_anything_counts_leaves_no_figures(name, ctrl_c_after, capsys, tmp_path):
    ctrl_c_after(1)
    size = {"ppl": ["--cache", "4+252"], "sinks": ["--size", "256"]}[name]
    assert cli.main(["eval", name, "--device", "cpu", *size, "--tokens", "900", "--json", "out.json"]) == 130
    assert not (tmp_path / "out.json").exists()
    assert capsys.readouterr().err.endswith(f"sinkattn eval {name}: interrupted\n")
