"""The examples run, and do what they say: with the shipped model or a tiny random one instead of one from the hub."""

import importlib.util
import io
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from hf_models import build
from transformers import AutoModelForCausalLM

MAX_REPLY = 25  # a quarter of the window
EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "train_sink_models")


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with arguments and stdin; returns what it writes to stdout and to stderr."""

    def run(name, *arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        load_example(name).main([str(each) for each in arguments])
        return capsys.readouterr()

    return run


def greedy(folder, tokenizer, text, stop, max_new_tokens):
    """What transformers' own generate says after a text, up to the token of ``stop``."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    [stop] = tokenizer(stop, add_special_tokens=False).input_ids
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    options = {"do_sample": False, "eos_token_id": stop, "pad_token_id": 0, "max_new_tokens": max_new_tokens}
    out = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(out[out != stop])


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_short_and_say_how_to_run_them(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 60
    assert f"    python examples/{name}.py" in load_example(name).__doc__
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text()


def test_the_chat_replies_and_takes_a_turn_back(run, chat_model, tokenizer):
    options = (chat_model, "--window", 100, "--max-reply", MAX_REPLY)
    out, notes = run("endless_chat", *options, stdin="# The\nreturn self\n\nreturn self\n")
    said = greedy(chat_model, tokenizer, "<s># The\n", "\n", MAX_REPLY)
    again = greedy(chat_model, tokenizer, f"<s># The\n{said}\n<s>return self\n", "\n", MAX_REPLY)
    assert out == f"{said}\n{again}\n{again}\n"
    assert len({"", said, again}) == 3
    assert re.findall(r"\[turn (\d)", notes) == ["1", "2", "2"]


def test_what_is_said_about_a_transcript_leaves_no_trace_in_it(run, tokenizer, tmp_path):
    model = build("gpt2", vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lines = ["Good morning.\n", "We begin with the first point.\n"]
    options = ("--model", tmp_path, "--window", 60, "--max-new-tokens", 8)
    out, _ = run("transcript", *options, "--top-k", 1, stdin="".join(lines))
    begun = tokenizer.bos_token + lines[0], tokenizer.bos_token + lines[0] + lines[1]
    expected = [greedy(tmp_path, tokenizer, text, "<s>", 8) for text in begun]
    assert out == "".join(
        f"{line}    ... {' '.join(said.split())}\n" for line, said in zip(lines, expected, strict=True)
    )
    torch.manual_seed(1)
    assert run("transcript", *options, "--top-k", 50, stdin="".join(lines))[0] != out


def test_the_log_watcher_prints_the_line_that_is_unlike_the_others(run):
    numbers = random.Random(0)
    lines = [f"12:{second:02d} search ok user={numbers.randrange(100)}\n" for second in range(60)]
    assert run("log_watcher", stdin="".join(lines))[0] == ""
    odd = "12:55 OutOfMemoryError: killed by the kernel\n"
    lines.insert(55, odd)
    out, _ = run("log_watcher", stdin="".join(lines))
    assert [line.split("  ")[1] for line in out.splitlines(keepends=True)] == [odd]


def test_64_streams_each_say_what_they_would_say_alone(run):
    *streams, summary = run("many_streams", "--tokens", 4)[0].splitlines()
    assert [int(line.split()[0]) for line in streams] == list(range(64))
    assert summary.startswith("64 streams, ")
    assert run("many_streams", "--streams", 1, "--tokens", 4)[0].splitlines()[0] == streams[0]


def test_a_model_learns_while_it_serves(run, tmp_path):
    pytest.importorskip("peft")
    request = "the quick brown fox jumps over the lazy dog\n"
    options = ("--chunk", 32, "--max-new-tokens", 2, "--save", tmp_path / "adapters")
    out, notes = run("learn_while_serving", *options, stdin=request * 12)
    assert len(re.findall(r"^\[\d+ updates\] '.*'$", out, re.MULTILINE)) == 12
    first, last = map(float, re.search(r"loss: ([\d.]+) at first, ([\d.]+) at last", notes).groups())
    assert last < first
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


def test_an_evaluation_finds_the_sinks_of_the_shipped_model(run, few_timed_tokens):
    out = run("evaluate_model", "--total", 32, "--tokens", 800)[0]
    recommended = int(re.search(r"Recommended: (\d) sinks", out)[1])
    assert recommended > 0
    perplexities = {name: float(x) for name, x in re.findall(r"^(.*?) +perplexity +([\d.]+)", out, re.MULTILINE)}
    assert len(perplexities) == 3
    without, with_sinks, recomputed = perplexities.values()
    assert with_sinks == pytest.approx(recomputed, rel=0.3)
    assert with_sinks < 0.7 * without


@pytest.fixture(scope="module")
def visitors(chat_model):
    return load_example("web_demo").Visitors(str(chat_model), window=100)


def test_visitors_of_the_web_demo_have_a_chat_of_their_own(visitors, chat_model, tokenizer):
    anna, bert = (visitors.reply(name, text, []) for name, text in (("anna", "# The"), ("bert", "return self")))
    shown = [each for pair in zip(anna, bert, strict=False) for each in pair]  # by turns
    assert all(later.startswith(earlier) for earlier, later in zip(shown[::2], shown[2::2], strict=False))
    bert.close()
    reply = [shown[-2], *anna][-1]
    assert reply == greedy(chat_model, tokenizer, "<s># The\n", "\n", MAX_REPLY) != ""
    history = [{"role": "user", "content": "# The"}, {"role": "assistant", "content": reply}]
    *_, second = visitors.reply("anna", "return self", history)
    # Retry hands over the history as it was; clear hands over none.
    assert [*visitors.reply("anna", "return self", history)][-1] == second
    assert [*visitors.reply("anna", "# The", [])][-1] == reply
    assert visitors.chats["anna"].num_turns == 1
    for chat in visitors.chats.values():
        chat.close()
    assert not len(visitors.pool)


def test_gradio_takes_the_web_demo(chat_model, monkeypatch):
    gradio = pytest.importorskip("gradio")
    monkeypatch.setattr(gradio.ChatInterface, "launch", lambda demo: demos.append(demo))
    demos = []
    load_example("web_demo").main([str(chat_model), "--window", "100"])
    [demo] = demos
    assert {function.api_name for function in demo.fns.values()} >= {"respond", "leave"}
