"""``sinkattn learn``: from a file, from a pipe that never ends, and what it saves."""

import io
import json
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
from sinkattn.evaluate.text import Feed, TokenStream
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


def test_adapters_are_saved_for_peft(monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    Path("kept.py").write_text(TEXT[:400])
    arguments = ["--text", "-", "--rate", "0.01", "--held-out", "kept.py", "--save", "a/b", "--json", "out.json"]
    assert cli.main([*SMALL, *arguments]) == 0
    assert "Learned: a/b\n" in capsys.readouterr().out
    ends = json.loads(Path("out.json").read_text())["stretches"][-1]["held_out"]["kept.py"]
    model, tokenizer = load(device="cpu")
    ids = torch.tensor([list(TokenStream(Feed(io.StringIO(TEXT[:400])), tokenizer).once())])
    sinkattn.enable(model, 4, 60)
    assert loss_of(model, ids) == pytest.approx(ends["frozen"]["loss"], abs=1e-4)
    learned = peft.PeftModel.from_pretrained(model, "a/b")
    assert loss_of(learned, ids) == pytest.approx(ends["lora@0.01"]["loss"], abs=1e-4)
    assert ends["lora@0.01"]["loss"] < ends["frozen"]["loss"] - 0.05


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
        (["--text", "empty.txt", "--variant", "most"], "variants: expected lora or all, then"),
        (["--text", "empty.txt", "--save", "empty.txt"], "File exists: 'empty.txt'"),
        (["--text", "empty.txt", "--json", "no/where.json"], "cannot write no/where.json"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(arguments, message, capsys):
    Path("empty.txt").touch()
    assert cli.main([*SMALL, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sinkattn learn: ")
    assert message in last


@pytest.mark.parametrize(("rate", "got"), [("0", "'0'"), ("fast", "'fast'"), ("-1", ""), ("nan", "'nan'")])
def test_rates_are_more_than_0(rate, got, capsys):
    with pytest.raises(SystemExit):
        cli.main([*SMALL, "--text", "-", "--rate", rate])
    assert f"--rate: expected a number, more than 0, got {got}" in capsys.readouterr().err or not got
