"""``sinkattn eval``: every command end to end with the shipped model, its files, and one clear line for errors."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sinkattn import cli
from sinkattn.cli import pictures
from sinkattn.cli.eval import streameval
from sinkattn.evaluate import exact_match
from sinkattn.evaluate.items import code_items, line_items
from sinkattn.evaluate.methods import CacheSize, OneShot, Recomputed, Streamed
from sinkattn.evaluate.text import StandardLibrary

pytestmark = pytest.mark.usefixtures("few_timed_tokens")

ROOT = Path(__file__).parents[2]

SMALL = {
    "ppl": ["--tokens", "400", "--dense-tokens", "300", "--cache", "0+32", "4+28"],
    "endless": ["--tokens", "700", "--stretch", "300", "--cache", "4+60"],
    "streameval": ["--count", "8", "--distances", "1", "5", "--every", "2", "--cache", "4+60"],
    "stream-qa": ["--count", "12", "--cache", "0+64", "4+60"],
    "latency": ["--sizes", "16", "32", "--lengths", "40", "300", "--rounds", "2"],
    "sinks": ["--size", "32", "--tokens", "200"],
    "learn": ["--tokens", "700", "--chunk", "32", "--cache", "4+60", "--variants", "lora", "all@0.001"],
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def evaluate(name, *more):
    return cli.main(["eval", name, "--device", "cpu", *SMALL[name], *more])


@pytest.mark.parametrize("name", SMALL)
def test_every_command_prints_and_writes_its_figures(name, tmp_path, capsys):
    assert evaluate(name, "--json", "out.json", "--plot", "out.png") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["evaluation"] == name
    assert figures["model"]["class"] == "LlamaForCausalLM"
    assert figures["machine"]["threads"] >= 1
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr()
    assert "Model: the one that ships with sinkattn" in printed.out
    assert "Figures: out.json\nPicture: out.png\n" in printed.out
    # Progress goes to stderr, so that the table can be piped on.
    assert "/s" in printed.err


def test_the_table_of_ppl_shows_the_figures(capsys, tmp_path):
    assert evaluate("ppl", "--json", "out.json", "--csv", "out.csv", "--recompute-every", "4") == 0
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    for name, label in (("4+28", "4+28 sinks + window"), ("0+32", "0+32 window alone")):
        method = figures["methods"][name]
        row = next(line for line in text.splitlines() if label in line)
        assert f"{method['all']['loss']:.3f}" in row
        assert f"{math.exp(method['minus_recomputed']['loss']):.4f}" in row
        assert "64.0 KiB" in row
    dense = next(line for line in text.splitlines() if "dense, cache grows" in line)
    assert "not reached" in dense
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert {row["method"] for row in rows} == {"0+32", "4+28", "recomputed 32", "dense"}
    assert sum(int(row["tokens"]) for row in rows if row["method"] == "4+28") == 400


def test_the_table_of_endless_shows_every_stretch(capsys, tmp_path, monkeypatch):
    """And the file is rewritten after each, as a whole."""
    written = []
    replace = Path.replace

    def watched(self, target):
        written.append(len(json.loads(self.read_text())["stretches"]))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    assert evaluate("endless", "--json", "out.json") == 0
    assert written == [1, 2, 3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    for each, span in zip(figures["stretches"], ("0 to 299", "300 to 599", "600 to 699"), strict=True):
        row = next(line for line in text.splitlines() if f" {span} " in line)
        assert f"{each['loss']:.3f}" in row
        assert f"{math.exp(each['loss']):.2f}" in row
        if each["margin"] is not None:
            assert f"{math.exp(each['loss'] - each['margin']):.2f} to " in row
        assert f"{each['seconds_per_token'] * 1e3:.2f}" in row
        assert "128.0 KiB" in row
    assert f"from token 700 on; {figures['in_turns']['change']:+.1%}" in text


def test_the_tables_of_learn_show_the_figures(capsys, tmp_path):
    assert evaluate("learn", "--json", "out.json") == 0
    text = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert list(figures["methods"]) == ["frozen", "lora", "all@0.001"]
    assert [figures["methods"][name]["updates"] for name in figures["methods"]] == [0, 21, 21]
    assert [each["begin"] for each in figures["stretches"]] == list(range(0, 700, 96))
    for name, method in figures["methods"].items():
        total = sum(each["methods"][name]["loss"] * each["methods"][name]["tokens"] for each in figures["stretches"])
        assert method["loss"] == pytest.approx(total / 699)
        row = next(line for line in text.splitlines() if f"│ {name} " in line)
        assert f"{method['loss']:.3f}" in row
        if name != "frozen":
            assert method["minus_frozen"]["loss"] == pytest.approx(
                method["loss"] - figures["methods"]["frozen"]["loss"]
            )
            assert "{loss:+.3f} ± {margin:.3f}".format(**method["minus_frozen"]) in row
            frozen = figures["methods"]["frozen"]
            share = 1 - method["tokens_per_second"] / frozen["tokens_per_second"]
            assert method["learning_share"] == pytest.approx(share)
    for each in figures["stretches"]:
        row = next(line for line in text.splitlines() if f" {each['begin']:,} to {each['end'] - 1:,} " in line)
        assert f"{each['methods']['frozen']['perplexity']:.2f}" in row
        assert f"{each['methods']['all@0.001']['minus_frozen']['loss']:+.3f}" in row
    ends = [each["held_out"]["files left out"]["lora"]["minus_frozen"]["loss"] for each in figures["stretches"]]
    assert f"{ends[-1]:+.3f}" in text.split("Held out")[1]
    assert f"({max(ends):+.3f})" in text.split("Held out")[1]


def test_learning_is_repeatable(tmp_path):
    losses = []
    for seed in ("0", "0", "1"):
        assert evaluate("learn", "--variants", "lora@0.01", "--seed", seed, "--json", "out.json") == 0
        losses.append(json.loads((tmp_path / "out.json").read_text())["methods"]["lora@0.01"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_text_that_drifts_and_one_that_is_held_out(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("a few words of another kind\n" * 4)
    arguments = ["--tokens", "330", "--variants", "all", "--rate", "0.0005", "--drift", "--json", "out.json"]
    assert evaluate("learn", *arguments, "--plot", "out.png") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    texts = [each["text"] for each in figures["stretches"]]
    assert (figures["tokens"], len(texts), texts[:2], texts[-2:]) == (320, 10, texts[:1] * 2, texts[:1] * 2)
    assert len(set(texts)) == 4
    assert set(figures["stretches"][-1]["held_out"]) == set(texts)
    assert figures["methods"]["all@0.0005"]["rate"] == 0.0005
    text = capsys.readouterr().out
    assert "prose" in text
    assert "Text: " + ", then ".join(texts[::2]) in text
    assert evaluate("learn", *arguments, "--held-out", "kept.txt") == 0
    assert list(json.loads((tmp_path / "out.json").read_text())["stretches"][0]["held_out"]) == ["kept.txt"]


def test_in_half_precision_only_adapters_learn_by_default(tmp_path, capsys):
    small = ["--tokens", "400", "--cache", "4+60", "--device", "cpu", "--dtype", "bfloat16", "--json", "out.json"]
    assert cli.main(["eval", "learn", *small]) == 0
    assert list(json.loads((tmp_path / "out.json").read_text())["methods"])[1:] == [
        "lora",
        "lora+decay",
        "lora+reencode",
    ]
    for rate in ("", "@0.001"):
        assert cli.main(["eval", "learn", *small, "--variants", f"all{rate}"]) == 2
        assert f"all{rate}: the steps of weights in half precision get lost; give --dtype" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("sinkattn.cli.eval.session.load_model", lambda args: pytest.fail("loaded"))
    assert cli.main(["eval", "learn"]) == 2
    expected = "sinkattn eval learn: this command needs scipy, which is not installed: pip install 'sinkattn[cli]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("command", [["eval", "learn"], ["learn", "--text", "-"]])
def test_without_peft_there_are_no_adapters(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(command) == 2
    expected = "this command needs peft, which is not installed: pip install 'sinkattn[learn]'\n"
    assert (
        capsys.readouterr().err
        == f"sinkattn {' '.join(command[:2] if command[0] == 'eval' else ['learn'])}: {expected}"
    )


def test_figures_go_to_pipes_and_through_links(tmp_path, capsys):
    (tmp_path / "link.json").symlink_to(tmp_path / "out.json")
    assert evaluate("sinks", "--json", "link.json") == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "out.json").read_text())["evaluation"] == "sinks"
    assert evaluate("sinks", "--json", "/dev/null") == 0
    assert not Path("/dev/null").is_file()


def test_figures_tell_how_the_stream_was_made(tmp_path):
    (tmp_path / "short.txt").write_text("for name in names:\n    print(name)\n" * 5)
    assert evaluate("ppl", "--text", "short.txt", "--no-start-token", "--json", "out.json") == 0
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert text["description"] == "short.txt"
    assert not text["start_token"]
    assert text["started_over"] >= 2


def test_questions_come_from_a_file(tmp_path, capsys):
    pairs = [{"question": f"x{i} = {i}, x{i} =", "answer": f"{i}"} for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert evaluate("stream-qa", "--questions", "pairs.jsonl", "--json", "out.json") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["questions"] == "pairs.jsonl"
    assert list(figures["methods"]) == ["one-shot", "0+64", "4+60"]
    assert {method["questions"] for method in figures["methods"].values()} == {5}
    assert "5 questions, a stream of" in capsys.readouterr().out


def test_accuracies_are_those_of_each_method_and_distance(tmp_path, model, tokenizer):
    caches = ["0+24", "4+60"]
    arguments = ["--count", "12", "--distances", "5", "1", "--every", "3", "--cache", *caches, "--seed", "7"]
    assert cli.main(["eval", "streameval", "--device", "cpu", *arguments, "--json", "out.json", "--plot", "o.png"]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    predictors = [Streamed(model, CacheSize.parse(cache)) for cache in caches]
    predictors += [Recomputed(model, 24, tokenizer.bos_token_id), Recomputed(model, 64, tokenizer.bos_token_id)]
    seen = set()
    for distance in (1, 5):
        items = line_items(distance, 3, 7)
        tallies, tokens = exact_match.run(predictors, items, tokenizer, 12, lambda *progress: None)
        assert figures["stream_tokens"][str(distance)] == tokens
        for predictor, tally in zip(predictors, tallies, strict=True):
            assert figures["methods"][predictor.name]["by_distance"][str(distance)] == tally.as_dict()
            seen.add(tally.accuracy)
    assert len(seen) > 1
    drawn = Figure()
    streameval.draw(drawn, figures)
    lines = {line.get_color(): line.get_ydata() for line in drawn.axes[0].lines if len(line.get_ydata()) == 2}
    means = [figures["methods"]["0+24"]["by_distance"][distance]["accuracy"] * 100 for distance in ("1", "5")]
    assert lines[pictures.WINDOW].tolist() == means


def test_accuracies_of_questions_are_those_of_each_method(tmp_path, model, tokenizer):
    assert evaluate("stream-qa", "--count", "40", "--json", "out.json") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    predictors = [OneShot(model, [tokenizer.bos_token_id])]
    predictors += [Streamed(model, CacheSize.parse(cache)) for cache in ("0+64", "4+60")]
    items = code_items(StandardLibrary().pieces())
    tallies, _ = exact_match.run(predictors, items, tokenizer, 40, lambda *progress: None)
    for predictor, tally in zip(predictors, tallies, strict=True):
        of = figures["methods"][predictor.name]
        assert {name: of[name] for name in tally.as_dict()} == tally.as_dict()
    assert len({tally.accuracy for tally in tallies}) > 1


@pytest.mark.parametrize("name", ["streameval", "stream-qa"])
def test_questions_are_asked_in_a_chat(name, tmp_path, chat_model):
    assert evaluate(name, "--json", "raw.json") == 0
    assert evaluate(name, "--chat", "--model", str(chat_model), "--json", "chat.json") == 0
    raw, chat = (json.loads((tmp_path / file).read_text()) for file in ("raw.json", "chat.json"))
    assert chat["methods"].keys() == raw["methods"].keys()
    assert chat["stream_tokens"] != raw["stream_tokens"]


def test_a_chat_of_many_rounds(tmp_path, capsys, chat_model):
    (tmp_path / "questions.jsonl").write_text('{"question": "import os"}\n{"question": "def f(x):"}\n')
    arguments = ["--questions", "questions.jsonl", "--rounds", "5", "--max-reply", "7", "--cache", "0+16", "4+12"]
    arguments += ["--model", str(chat_model), "--device", "cpu", "--json", "out.json", "--plot", "out.png"]
    assert cli.main(["eval", "chat", *arguments]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert list(figures["methods"]) == ["0+16", "4+12"]
    for method in figures["methods"].values():
        assert [each["question"] for each in method["chat"]] == ["import os", "def f(x):"] * 2 + ["import os"]
        assert method["ended"] == sum(each["ended"] for each in method["chat"])
        assert all(each["tokens"] <= 7 for each in method["chat"])
    text = capsys.readouterr().out
    assert f"{figures['methods']['4+12']['ended']} of 5" in text
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_ways_of_eviction(tmp_path, capsys, chat_model):
    arguments = ["--system", "Be brief, exact, and kind.", "--total", "48", "--max-reply", "8", "--rounds", "4"]
    arguments += ["--model", str(chat_model), "--device", "cpu", "--json", "out.json", "--plot", "out.png"]
    assert cli.main(["eval", "eviction", *arguments]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    settings, everything, *methods = figures["settings"], *figures["methods"].values()
    reference = methods[0]
    assert settings["tokens"] > settings["total"] == 48
    assert (everything["unit"], everything["num_sinks"]) == ("token", 0)
    assert everything["change"]["loss"] == pytest.approx(everything["loss"]["loss"] - reference["loss"]["loss"])
    assert reference["change"] is None
    sinks = [4] * 3 + [settings["prefix_tokens"]] * 3
    assert [(x["num_sinks"], x["unit"]) for x in methods] == [
        *zip(sinks, ["token", "message", "turn"] * 2, strict=True)
    ]
    out = capsys.readouterr().out
    for method in methods:
        assert method["num_sinks"] + method["window"] == 48
        assert f"{method['loss']['loss']:.4f}" in out
        if method is not reference:
            assert method["change"]["loss"] == pytest.approx(method["loss"]["loss"] - reference["loss"]["loss"])
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["eval", "eviction", *arguments, "--total", "250"]) == 2
    assert re.search(
        r"total: expected less than the chat has, \d+ tokens at most, in 4 rounds, got 250", capsys.readouterr().err
    )
    assert cli.main(["eval", "eviction", *arguments, "--rounds", "99"]) == 2
    assert re.search(
        r"rounds: expected up to \d+, whose chat fits the 256 tokens that the model was trained for, got 99",
        capsys.readouterr().err,
    )


def test_a_table_says_that_a_text_was_started_over(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("for name in names:\n    print(name)\n" * 5)
    for name in ("ppl", "endless", "sinks", "learn"):
        assert evaluate(name, "--text", "short.txt") == 0
        assert "The text was shorter than the stream: it was started over" in capsys.readouterr().out


def test_readers_may_leave(tmp_path):
    command = f"{sys.executable} -m sinkattn eval sinks --size 32 --tokens 100 2>errors.txt | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (tmp_path / "errors.txt").read_text()
    assert "Broken pipe" not in (tmp_path / "errors.txt").read_text()


def test_a_folder_serves_as_a_data_set(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "test.txt").write_text("import os\n" * 60)
    assert evaluate("ppl", "--dataset", str(folder), "--json", "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["text"]["description"] == f"{folder}, test"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ppl", ["--text", "nothing.txt"], "text: cannot read nothing.txt: No such file or directory"),
        ("sinks", ["--text", "empty.txt"], "text: empty.txt is empty"),
        ("ppl", ["--text", "empty.txt"], "text: empty.txt is empty"),
        ("ppl", ["--model", "./nowhere"], "model: cannot load ./nowhere: there is no such file or folder"),
        (
            "ppl",
            ["--cache", "4+300", "--dense-tokens", "0"],
            "must not exceed the 256 positions it was trained for, got 304",
        ),
        ("ppl", ["--cache", "4:8"], "cache: expected sinks + window, such as 4+1020, got '4:8'"),
        (
            "sinks",
            ["--size", "300", "--tokens", "400"],
            "must not exceed the 256 positions it was trained for, got 300",
        ),
        ("latency", ["--sizes", "300"], "must not exceed the 256 positions it was trained for, got 300"),
        ("latency", ["--sizes", "3"], "sizes: expected more than the 4 sinks, got 3"),
        ("streameval", ["--cache", "300+4"], "must not exceed the 256 positions"),
        ("streameval", ["--distances", "5000"], "distance: expected at most 1225 lines, got 5000"),
        ("endless", ["--cache", "4+300"], "expected at least twice sinks + window (608), got 300"),
        ("endless", ["--cache", "4+300", "--stretch", "700"], "must not exceed the 256 positions"),
        ("endless", ["--cache", "4"], "cache: expected sinks + window, such as 4+1020, got '4'"),
        ("stream-qa", ["--cache", "4+300"], "must not exceed the 256 positions"),
        ("stream-qa", ["--questions", "none.jsonl"], "questions: cannot read none.jsonl: No such file or directory"),
        ("stream-qa", ["--questions", "empty.txt"], "questions: empty.txt is empty"),
        ("streameval", ["--chat"], "chat: the model that ships with sinkattn has no chat template"),
        ("stream-qa", ["--chat"], "chat: the model that ships with sinkattn has no chat template"),
        ("ppl", ["--tokens", "20"], "tokens: expected more than sinks + window (32), got 20"),
        ("ppl", ["--json", "no/where.json"], "cannot write no/where.json"),
        ("ppl", ["--json", "."], "cannot write .: it is a folder"),
        ("ppl", ["--split", "train"], "split, column: these are of a data set"),
        ("latency", ["--num-sinks", "16"], "sizes: expected more than the 16 sinks, got 16"),
        ("ppl", ["--csv", "no/where.csv"], "cannot write no/where.csv"),
        ("learn", ["--variants", "all", "all"], "variants: expected each once, got all all"),
        ("learn", ["--cache", "4+300"], "must not exceed the 256 positions"),
        ("learn", ["--chunk", "1"], "chunk: expected 2 or more"),
        ("learn", ["--drift", "--text", "empty.txt"], "drift: this is a text of its own; leave out --text"),
        ("learn", ["--tokens", "1"], "text: expected two tokens or more"),
        ("learn", ["--held-out", "none.txt"], "held-out: cannot read none.txt: No such file or directory"),
        ("learn", ["--held-out", "empty.txt"], "held-out: empty.txt is empty"),
        ("latency", ["--plot", "x.badending"], "plot: expected a file ending among"),
    ],
)
def test_what_a_user_can_put_right_is_said_in_one_line(name, arguments, message, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert evaluate(name, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sinkattn eval {name}: ")
    assert message in last


def test_data_sets_that_cannot_be_read_are_refused(tmp_path, capsys):
    pytest.importorskip("datasets")
    assert evaluate("ppl", "--dataset", "./nowhere") == 2
    assert "dataset: cannot read ./nowhere, test: " in capsys.readouterr().err
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"words": "a"}\n')
    assert evaluate("ppl", "--dataset", "./texts") == 2
    assert "column: ./texts, test has no texts in 'text', its columns are ['words']" in capsys.readouterr().err


def test_usage(capsys):
    for arguments in (
        ["eval"],
        ["eval", "nonsense"],
        ["eval", "ppl", "--text", "a", "--dataset", "b"],
        ["eval", "learn", "--variants", "lora", "adapters"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SMALL)
