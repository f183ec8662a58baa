"""``sinkattn learn``: from a file, from a pipe that never ends, and what it saves."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import start

import sinkattn
from sinkattn import cli
from sinkattn.cli import learn
from sinkattn.evaluate.text import Feed, TokenStream
from sinkattn.hf import OnlineLearner
from sinkattn.hf.load import load

SMALL = ["learn", "--device", "cpu", "--chunk", "32", "--cache", "4+60"]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(60))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_file_is_learned_from_to_its_end(capsys, tokenizer):
    Path("text.py").write_text(TEXT)
    arguments = ["--text", "text.py", "--stretch", "256", "--variant", "all", "--rate", "1e-3"]
    assert cli.main([*SMALL, *arguments, "--json", "out.json", "--plot", "out.png"]) == 0
    figures = json.loads(Path("out.json").read_text())
    ids = tokenizer(TEXT).input_ids
    assert figures["tokens"] == len(ids)
    assert figures["methods"]["all@0.001"]["updates"] == len(ids) // 32
    assert not figures["interrupted"]
    assert figures["text"] == {"description": "text.py", "start_token": True, "started_over": 0}
    # Such a text can be learned.
    assert figures["methods"]["all@0.001"]["minus_frozen"]["loss"] < -0.05
    printed = capsys.readouterr().out
    for each in figures["stretches"]:
        losses = [each["methods"][name]["loss"] for name in ("all@0.001", "frozen")]
        expected = "tokens {:,} to {:,}: loss {:.3f}, frozen {:.3f} (".format(each["begin"], each["end"] - 1, *losses)
        assert expected in printed
    assert "Figures: out.json\nPicture: out.png\n" in printed
    assert Path("out.png").read_bytes()[:4] == b"\x89PNG"


def test_it_may_stop_before(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert cli.main([*SMALL, "--text", "-", "--variant", "all", "--tokens", "100", "--json", "out.json"]) == 0
    assert json.loads(Path("out.json").read_text())["tokens"] == 100


@torch.no_grad()
def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def test_adapters_are_saved_for_peft(monkeypatch, capsys, tokenizer):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    Path("kept.py").write_text(TEXT[:400])
    arguments = ["--text", "-", "--rate", "0.01", "--held-out", "kept.py", "--save", "a/b", "--json", "out.json"]
    assert cli.main([*SMALL, *arguments]) == 0
    assert f"Learned: a/b ({len(tokenizer(TEXT).input_ids) // 32:,} updates)\n" in capsys.readouterr().out
    ends = json.loads(Path("out.json").read_text())["stretches"][-1]["held_out"]["kept.py"]
    model, _ = load(device="cpu")
    assert json.loads(Path("a/b/adapter_config.json").read_text())["base_model_name_or_path"] == model.name_or_path
    ids = torch.tensor([list(TokenStream(Feed(io.StringIO(TEXT[:400])), tokenizer).once())])
    sinkattn.enable(model, 4, 60)
    assert loss_of(model, ids) == pytest.approx(ends["frozen"]["loss"], abs=1e-4)
    learned = peft.PeftModel.from_pretrained(model, "a/b")
    assert loss_of(learned, ids) == pytest.approx(ends["lora@0.01"]["loss"], abs=1e-4)
    assert ends["lora@0.01"]["loss"] < ends["frozen"]["loss"] - 0.05


def test_weights_are_saved_as_a_model(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    arguments = ["--text", "-", "--variant", "all@0.001", "--save", "new", "--json", "out.json", "--stretch", "64"]
    assert cli.main([*SMALL, *arguments]) == 0
    gain = json.loads(Path("out.json").read_text())["stretches"][-1]["methods"]["all@0.001"]["minus_frozen"]["loss"]
    Path("text.py").write_text(TEXT)
    again = ["--model", "new", "--text", "text.py", "--variant", "all@1e-9", "--json", "again.json", "--stretch", "64"]
    assert cli.main([*SMALL, *again]) == 0
    losses = [
        json.loads(Path(name).read_text())["stretches"][-1]["methods"]["frozen"]["loss"]
        for name in ("out.json", "again.json")
    ]
    assert losses[1] < losses[0] + gain / 2 < losses[0]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("text", 2, "text: stdin is not UTF-8 text (invalid start byte)"),
        ("loss", 2, "the loss is not finite after 160 tokens"),
        ("json", 2, "No space left"),
        ("reader", 0, ""),
    ],
)
def test_what_was_learned_is_saved_however_it_ends(failure, code, message, monkeypatch, capsys):
    source = io.BytesIO(TEXT.encode() + (5 * TEXT.encode() + b"\xff") * (failure == "text"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source, encoding="utf-8"))
    if failure == "loss":
        step = OnlineLearner.step
        read = []

        def diverging(self, piece):
            read.append(0)
            return step(self, piece) * (math.nan if len(read) > 8 else 1)

        monkeypatch.setattr(OnlineLearner, "step", diverging)
    if failure == "json":
        monkeypatch.setattr(learn, "write_json", raising(OSError(errno.ENOSPC, "No space left")))
    if failure == "reader":
        monkeypatch.setattr(learn, "live_line", raising(BrokenPipeError()))
        monkeypatch.setattr(cli, "discard_stdout", lambda: None)
    arguments = ["--text", "-", "--variant", "all@0.001", "--stretch", "64", "--json", "out.json", "--save", "saved"]
    assert cli.main([*SMALL, *arguments]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert ("The whole stream" in printed.out) == (code == 2)
    assert "Learned: saved (" in printed.out
    learned, first = (load(name, device="cpu")[0] for name in ("saved", None))
    pairs = zip(learned.parameters(), first.parameters(), strict=True)
    assert not any(torch.equal(x, y) for x, y in pairs)


def raising(error):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize("text", ["x = 1\n", ""])
def test_nothing_is_saved_if_nothing_was_learned(text, capsys):
    Path("short.txt").write_text(text)
    code = cli.main([*SMALL, "--text", "short.txt", "--variant", "all", "--save", "new"])
    assert (code, "Learned: nothing, 0 updates (each takes 32 tokens)" in capsys.readouterr().out) == (
        (0, True) if text else (2, False)
    )
    assert not Path("new").exists()


@pytest.mark.parametrize("stalls", [False, True])
def test_ctrl_c_ends_a_pipe_that_never_ends(stalls):
    """Also one that is open and from which nothing comes."""
    read, write = os.pipe()
    command = [*SMALL, "--text", "-", "--variant", "all", "--stretch", "64", "--json", "out.json"]
    process = start(*command, stdin=read)
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        pipe.write(TEXT)
        pipe.flush()
        lines = iter(process.stdout.readline, "")
        assert next(line for line in lines if line.startswith("tokens 64 to 127: loss "))
        feeder = None if stalls else subprocess.Popen(["yes", "x = 1"], stdout=pipe)
        if stalls:
            time.sleep(1)  # for what came to be read
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    if feeder:
        feeder.wait(timeout=10)
    assert process.returncode == 0, error
    assert "Interrupted: these are the figures until then." in rest
    figures = json.loads(Path("out.json").read_text())
    assert figures["interrupted"]
    assert figures["tokens"] >= 128
    assert figures["stretches"][-1]["end"] == figures["tokens"]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "text: cannot read none.txt: No such file or directory"),
        (["--text", "empty.txt"], "text: empty.txt is empty"),
        (["--text", "empty.txt", "--stretch", "33"], "stretch: expected a multiple of the chunk (32), got 33"),
        (["--text", "one.txt", "--tokens", "1"], "text: expected two tokens or more"),
        (["--text", "empty.txt", "--json", "no/where.json"], "cannot write no/where.json"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(arguments, message, capsys):
    Path("empty.txt").touch()
    Path("one.txt").write_text("x = 1")
    assert cli.main([*SMALL, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sinkattn learn: ")
    assert message in last


def test_remarks_of_libraries_are_not_shown():
    Path("empty.txt").touch()
    process = start(*SMALL, "--text", "empty.txt", "--variant", "lora")
    assert process.communicate(timeout=60)[1] == "sinkattn learn: text: empty.txt is empty\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rate", "0"], "argument --rate: expected a rate, a number more than 0, got '0'"),
        (["--save", "."], "argument --save: expected a new or empty folder, got '.'"),
        (["--variant", "most"], "argument --variant: expected lora or all, then"),
        (["--variant", "lora@nan"], "argument --variant: expected a rate, a number more than 0, got 'nan'"),
    ],
)
def test_options_are_checked_at_once(option, message, capsys):
    Path("empty.txt").touch()
    with pytest.raises(SystemExit):
        cli.main([*SMALL, "--text", "-", *option])
    assert message in capsys.readouterr().err
