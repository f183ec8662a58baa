"""The command line: what it prints, its exit codes, and one clear line for what a user can put right."""

import argparse
import gc
import json
import os
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from families import build
from gguf_files import write_gguf
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import sinkattn
from sinkattn import cli
from sinkattn.cli import errors, info
from sinkattn.cli.arguments import add_sampling, sampling
from sinkattn.hf.load import load
from sinkattn.hf.stream import stream_text, stream_tokens

ROOT = Path(__file__).parents[2]
SMALL = ["demo", "--device", "cpu", "--tokens", "60", "--dense-tokens", "40", "--num-sinks", "2", "--window", "14"]
SMALL += ["--samples", "10"]


def start(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # A job that a shell runs in the background ignores Ctrl-C, and so do its children.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options}
    return subprocess.Popen(
        [sys.executable, "-m", "sinkattn", *arguments],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **options},
    )


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"sinkattn {sinkattn.__version__}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["demo", "generate", "info"])
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "--num-sinks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--text", "nothing.txt"], "demo: text: cannot read nothing.txt: No such file or directory"),
        ([*SMALL, "--text", "empty.txt"], "demo: text: empty.txt is empty"),
        ([*SMALL, "--text", "latin.txt"], "demo: text: latin.txt is not UTF-8 text (invalid continuation byte)"),
        ([*SMALL, "--plot", "nowhere/a.png"], "demo: cannot write nowhere/a.png: nowhere is no folder"),
        ([*SMALL, "--window", "300", "--tokens", "999", "--dense-tokens", "999"], "demo: LlamaForCausalLM: num_sinks"),
        ([*SMALL, "--tokens", "16"], "demo: tokens: expected more than num_sinks + window (16), got 16"),
        (["demo", "--model", "./nothing"], "demo: model: cannot load ./nothing: there is no such file or folder"),
        (["generate", "--prompt", "a", "--model", "a b"], "generate: model: cannot load a b: Repo id must"),
        (["generate", "--prompt", "a", "--window", "253"], "must not exceed the 256 positions it was trained for"),
        (["generate", "--prompt", "a", "--top-p", "2"], "generate: top_p: expected more than 0 and at most 1, got 2.0"),
        (["generate", "--prompt", "a", "--stop-at-eos"], "generate: stop-at-eos: this model has no end token"),
        (
            ["generate", "--prompt", "a", "--chat"],
            "generate: chat: the model that ships with sinkattn has no",
        ),
        (["generate", "--prompt", "a", "--min-p", "2"], "generate: min_p: expected 0 to 1, got 2.0"),
        (
            ["generate", "--prompt", "a", "--repetition-penalty", "0"],
            "generate: repetition_penalty: expected more than 0, got 0.0",
        ),
        (["generate", "--prompt", "a", "--device", "cuda:99"], "generate: device: no such device here: cuda:99"),
        (
            ["info", "--model", "empty.txt"],
            "info: model: cannot load empty.txt: expected a folder, a GGUF file",
        ),
        (["generate", "--prompt", "a", "--quantize", "int4", "--dtype", "float32"], "int4 need bfloat16, got float32"),
        (["info", "--model", "./nothing"], "info: model: cannot load ./nothing: there is no such file or folder"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(arguments, message, capsys):
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9 au lait\n")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("sinkattn ")
    assert "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--window", "0"], "--window: expected a whole number, 1 or more, got '0'"),
        (["generate", "--num-sinks", "-1"], "--num-sinks"),
        (["generate", "--num-sinks", "x"], "--num-sinks: expected a whole number, 0 or more, got 'x'"),
        (["generate", "--quantize", "int2"], "argument --quantize: invalid choice: 'int2'"),
        (["juggle"], "invalid choice: 'juggle'"),
    ],
)
def test_bad_numbers(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert cli.main(SMALL) == 2
    expected = "sinkattn demo: this command needs psutil, which is not installed: pip install 'sinkattn[cli]'\n"
    assert capsys.readouterr().err == expected


def test_user_error_takes_the_first_line():
    with pytest.raises(errors.UserError, match=r"^first$"), errors.as_user_error(ValueError):
        raise ValueError("first\nsecond")


def test_demo(capsys):
    Path("short.txt").write_text("def f(x):\n    return x\n")
    arguments = [*SMALL, "--text", "short.txt", "--json", "out.json", "--plot", "out.png"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    figures = json.loads(Path("out.json").read_text())
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert figures["model"] == {
        "name": "the one that ships with sinkattn",
        "shipped": True,
        "class": "LlamaForCausalLM",
        "dtype": "float32",
        "quantization": None,
        "quantized_share": None,
        "device": "cpu",
        "parameters": 639_616,
        "weight_bytes": 4 * 639_616,
        "trained_length": 256,
        "suits": {
            "num_sinks": 4,
            "why": "as most pretrained models need; `sinkattn eval sinks` measures it",
            "window": 252,
        },
    }
    assert figures["text"]["description"] == "short.txt"
    assert figures["text"]["start_token"]
    assert figures["text"]["started_over"] > 2
    assert [method["tokens"] for method in figures["methods"].values()] == [60, 60, 40, 20]
    sinks = figures["methods"]["sinkattn"]["scored"][0]
    assert f"{sinks['loss']:.3f} ({sinks['perplexity']:.1f})" in captured.out
    assert f"started over {figures['text']['started_over']} times" in captured.out
    assert "which is the sink of this model" in captured.out
    assert "Picture: out.png, figures: out.json" in captured.out


def test_demo_reads_a_pipe(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        stream.write("x = 1\n" * 100)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main([*SMALL, "--text", "-", "--json", "out.json"]) == 0
    assert json.loads(Path("out.json").read_text())["text"]["description"] == "stdin"
    assert Path("demo.png").is_file()


def expected_text(prompt, count, **options):
    model, tokenizer = load(device="cpu")
    sinkattn.enable(model, 4, 252)
    ids = tokenizer(prompt).input_ids
    return "".join(stream_text(tokenizer, islice(stream_tokens(model, ids, **options), count), ids))


def test_generate_prints_the_text(capsys):
    common = ["generate", "--device", "cpu", "--prompt", "import ", "--max-new-tokens", "20"]
    assert cli.main([*common, "--temperature", "0", "--repetition-penalty", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected_text("import ", 20)
    about, suits, _, summary = captured.err.splitlines()
    size = "0.64 M parameters, 2.4 MiB"
    assert about == f"Model: the one that ships with sinkattn (LlamaForCausalLM, float32, {size}, cpu)"
    assert suits == (
        "Suits it: a window of 252 (trained on up to 256 tokens); "
        "4 sinks recommended: as most pretrained models need; `sinkattn eval sinks` measures it"
    )
    assert summary.startswith("20 tokens, ")
    assert summary.endswith("KV cache 512.0 KiB (4 sinks + window of 252)")
    sampling = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.02", "--seed", "3"]
    penalties = ["--repetition-penalty", "1.3", "--presence-penalty", "0.3", "--frequency-penalty", "0.2"]
    assert cli.main([*common, *sampling, *penalties]) == 0
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 3}
    params = sinkattn.SamplingParams(**options, presence_penalty=0.3, frequency_penalty=0.2)
    text = capsys.readouterr().out
    assert text == expected_text("import ", 20, sampling=params)
    assert text != expected_text("import ", 20, **options)
    assert cli.main([*common, "--top-p", "0"]) == 2
    assert "top_p: expected more than 0 and at most 1, got 0" in capsys.readouterr().err


def test_generate_says_json(capsys):
    pytest.importorskip("llguidance")
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 3, "maxItems": 3}
    Path("schema.json").write_text(json.dumps(schema))
    Path("list.json").write_text("[1]")
    common = ["generate", "--device", "cpu", "--prompt", "x = ", "--seed", "0", "--json-schema"]
    assert cli.main([*common, "schema.json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
    for name, message in (
        ("list.json", "expected an object as JSON schema in list.json, got list"),
        ("missing.json", "cannot read a JSON schema from missing.json: "),
    ):
        with pytest.raises(SystemExit):
            cli.main([*common, name])
        assert message in capsys.readouterr().err


def test_generate_says_that_json_was_cut_off(capsys):
    pytest.importorskip("llguidance")
    Path("schema.json").write_text('{"enum": ["fine"]}')
    command = ["generate", "--device", "cpu", "--prompt", "x", "--temperature", "0", "--json-schema", "schema.json"]
    command += ["--max-new-tokens"]
    assert cli.main([*command, "99"]) == 0
    captured = capsys.readouterr()
    assert captured.out == '"fine"'
    count = int(re.search(r"^(\d+) tokens, ", captured.err, re.MULTILINE)[1])
    assert cli.main([*command, str(count)]) == 0
    assert capsys.readouterr().out == '"fine"'
    assert cli.main([*command, str(count - 1)]) == 2
    captured = capsys.readouterr()
    assert captured.out == '"fine'
    message = f"json-schema: the text was cut off after {count - 1} tokens; give more --max-new-tokens"
    assert captured.err.splitlines()[-1] == f"sinkattn generate: {message}"
    assert f"{count - 1} tokens, " in captured.err


def test_the_shipped_model_is_not_loaded_for_a_chat(capsys, monkeypatch):
    monkeypatch.setattr("sinkattn.hf.load.load", lambda *_, **__: pytest.fail("loaded"))
    for command in (["generate", "--prompt", "a"], ["eval", "streameval"]):
        assert cli.main([*command, "--chat"]) == 2
        assert "chat: the model that ships with sinkattn has no chat template; give --model" in capsys.readouterr().err
    for name in ("chat", "eviction"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["eval", name])
        assert "the following arguments are required: --model" in capsys.readouterr().err


def test_generation_configurations_go_before_defaults():
    parser = argparse.ArgumentParser()
    add_sampling(parser, seed=None)
    model, given = build("llama"), parser.parse_args(["--top-k", "7", "--seed", "3"])
    endless = {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.1}
    own = {"temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.05}
    for has_chat, expected in ((False, endless), (True, own)):
        given.chat = has_chat
        assert sampling(given, model) == sinkattn.SamplingParams(**expected, top_k=7, seed=3)
    del given.chat
    assert sampling(given, model) == sinkattn.SamplingParams(**own, top_k=7, seed=3)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    own |= {"temperature": 0.6, "top_p": 0.9}
    assert sampling(given, model) == sinkattn.SamplingParams(**own, top_k=7, seed=3)
    assert sampling(parser.parse_args(["--temperature", "0"]), model).is_greedy


@pytest.mark.slow
def test_generate_with_a_compiled_step_prints_the_same_text(capsys):
    command = ["generate", "--device", "cpu", "--prompt", "import ", "--max-new-tokens", "20", "--temperature", "0"]
    assert cli.main(command) == 0
    plain = capsys.readouterr()
    assert cli.main([*command, "--compile"]) == 0
    compiled = capsys.readouterr()
    assert compiled.out == plain.out
    assert "Compiling the decode step" in compiled.err
    assert "Compiling" not in plain.err


def test_generate_replies_in_a_chat(capsys, chat_model):
    arguments = ["generate", "--device", "cpu", "--model", str(chat_model), "--prompt", "import os", "--seed", "0"]
    assert cli.main([*arguments, "--chat"]) == 0
    model, tokenizer = load(chat_model, device="cpu")
    sinkattn.enable(model, 4, 252)
    ids = tokenizer("<s>import os\n", add_special_tokens=False).input_ids
    stop_ids = [model.generation_config.eos_token_id]
    sampling = {"temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.05, "seed": 0}
    reply = list(stream_tokens(model, ids, stop_ids=stop_ids, **sampling))
    assert reply
    assert capsys.readouterr().out == "".join(stream_text(tokenizer, reply, ids))


def test_a_gguf_file_with_quantized_weights(capsys):
    write_gguf(Path("tiny.gguf"), build("llama", hidden_size=64), "llama")
    arguments = ["--model", "tiny.gguf", "--device", "cpu", "--quantize", "int8"]
    assert cli.main(["generate", *arguments, "--prompt", "ab", "--max-new-tokens", "5"]) == 0
    assert (
        "Model: tiny.gguf (LlamaForCausalLM, bfloat16 with int8 weights (89% of them), 0.06 M"
        in capsys.readouterr().err
    )
    assert cli.main(["info", *arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["accepted"]
    assert facts["loaded"]["quantization"] == "int8"
    assert facts["loaded"]["quantized_share"] == pytest.approx(0.89, abs=0.005)
    assert facts["loaded"]["suits"]["window"] == 508
    assert cli.main(["info", *arguments]) == 0
    assert "Suits it: a window of 508 (trained on up to 512 tokens); 4 sinks" in capsys.readouterr().out


def test_generate_ends_with_ctrl_c():
    process = start("generate", "--device", "cpu", "--num-sinks", "4", "--window", "28", stdin=subprocess.PIPE)
    process.stdin.write("def f():")
    process.stdin.close()
    process.stdin = None  # or communicate() would write to it
    text = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=60)
    text += rest
    assert process.returncode == 0, error
    assert len(text) >= 200
    summary = error.strip().splitlines()[-1]
    assert int(summary.split()[0].replace(",", "")) > 28, "the ring has wrapped"
    assert summary.endswith("KV cache 64.0 KiB (4 sinks + window of 28)")
    assert "Traceback" not in error


def test_generate_ends_when_nobody_reads():
    process = start("generate", "--device", "cpu", "--prompt", "def f():", "--window", "28")
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 0, error
    assert "tokens/s" in error
    assert "Traceback" not in error
    assert "Exception ignored" not in error


def test_demo_interrupted():
    process = start("demo", "--device", "cpu", "--tokens", "1000000")
    assert "ships with sinkattn" in process.stdout.readline()
    assert "Suits it: a window of 252" in process.stdout.readline()
    assert "standard library" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().endswith("sinkattn demo: interrupted")
    assert "Traceback" not in error


def test_info(capsys, monkeypatch):
    monkeypatch.delenv("SINKATTN_BACKEND", raising=False)
    assert cli.main(["info", "--json", "--model", "demo", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["sinkattn"] == sinkattn.__version__
    assert facts["build"] == sinkattn.build_info()
    assert facts["cpu_capability"] in ("amx", "avx512", "avx2", "default")
    assert facts["SINKATTN_BACKEND"] is None
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["runs"]) == ("cpu", "cpu")
    assert cpu["backends"]["cpu"] is None
    assert cpu["backends"]["reference"] is None
    model = facts["model"]
    assert model["accepted"]
    assert model["window"] == 252
    assert model["rotary_by_layer"] == ["half, 32 of 32 elements"] * 2
    assert model["cache_bytes_per_stream"] == 2 * 2 * 4 * 256 * 32 * 4
    assert model["decode_steps"] == "launched one by one"

    assert cli.main(["info", "--model", "demo", "--device", "cpu", "--window", "300"]) == 0
    text = capsys.readouterr().out
    assert "cpu: cpu runs" in text
    assert "refused with 4 sinks + window of 300" in text
    assert "256 positions" in text


def test_garbage_is_collected_while_a_model_runs(monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", note)
    monkeypatch.setattr(info, "model_facts", note)
    assert cli.main(["info"]) == 130
    monkeypatch.setattr(info, "collect", dict)
    assert cli.main(["info", "--model", "demo", "--device", "cpu"]) == 130
    assert seen == [(False, False), (True, True)]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_info_says_which_models_stream_by_re_encoding():
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    facts = info.model_facts(gpt2, 4, 21)
    assert facts["reencoded_tokens_per_token"] == 10 / 11
    assert facts["cache_bytes_per_stream"] == 2 * 2 * 4 * 25 * 8 * 4 + 8
    text = "\n".join(info.lines({**info.collect(), "model": facts}))
    assert "absolute positions: streams by re-encoding, 0.91 extra tokens for each token on average" in text


def test_info_says_what_the_environment_asks_for(capsys, monkeypatch):
    monkeypatch.setenv("SINKATTN_BACKEND", "reference")
    assert cli.main(["info"]) == 0
    assert "cpu: reference runs (SINKATTN_BACKEND=reference)" in capsys.readouterr().out
    monkeypatch.setenv("SINKATTN_BACKEND", "abacus")
    assert cli.main(["info"]) == 0
    assert "cpu: nothing runs (SINKATTN_BACKEND: expected one of" in capsys.readouterr().out
    assert os.environ["SINKATTN_BACKEND"] == "abacus"


@pytest.mark.slow
def test_memory_and_time_are_constant():
    sizes = ["--tokens", "6000", "--dense-tokens", "200", "--samples", "10"]
    process = start("demo", "--device", "cpu", *sizes, "--json", "out.json")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    constant = json.loads(Path("out.json").read_text())["sinkattn_constant"]
    assert constant["resident_growth_bytes"] < 2e6
    # Keeping every key would take 12 MB, and make a token take several times as long.
    assert abs(constant["in_turns"]["change"]) < 0.1
    assert constant["in_turns"]["old_seen"] == 6_000
