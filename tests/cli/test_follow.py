"""``sinkattn generate --follow``: what is said about a text that grows, where, and how it ends."""

import copy
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cli import start

import sinkattn
from sinkattn import cli
from sinkattn.cli.follow_speaker import first_line
from sinkattn.evaluate import growing_text
from sinkattn.hf.load import load
from sinkattn.hf.stream import stream_tokens

SMALL = ["generate", "--device", "cpu", "--window", "60", "--max-new-tokens", "12"]
GREEDY = [*SMALL, "--temperature", "0", "--repetition-penalty", "1", "--follow"]
LINES = [f"def f{i}(x):\n" if i % 2 else f"    return x + é{i}\n" for i in range(1, 41)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def enabled(model):
    return sinkattn.enable(copy.deepcopy(model), 4, 60)


@pytest.fixture
def expected(enabled, tokenizer):
    """The line that the model says after a text, or after these ids."""

    def line(text, ids=None, **options):
        ids = tokenizer(text).input_ids if ids is None else ids
        said = list(stream_tokens(enabled, ids, **{"max_new_tokens": 12, **options}))
        return re.fullmatch(r"(?:\s*\n)?([^\n]*).*", tokenizer.decode(said), re.DOTALL)[1]

    return line


def prefixes(lines):
    return ["".join(lines[: i + 1]) for i in range(len(lines))]


@pytest.fixture
def happens(monkeypatch):
    """Make things happen, one whenever there is nothing to read, and press Ctrl-C after the last of them."""

    def prepare(*happenings):
        rest = iter(happenings)

        def sleep(seconds):
            happening = next(rest, None)
            if happening is None:
                signal.raise_signal(signal.SIGINT)
            else:
                happening()

        monkeypatch.setattr(growing_text.time, "sleep", sleep)

    return prepare


@pytest.fixture(autouse=True)
def python_hears_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def write(text, mode="ab"):
    data = text if isinstance(text, bytes) else text.encode()

    def happen():
        with Path("app.log").open(mode) as file:
            file.write(data)

    return happen


def replace(text):
    def happen():
        Path("new").write_text(text)
        Path("new").rename("app.log")

    return happen


def test_a_file_that_appears_grows_is_cut_and_replaced(happens, expected, capsys):
    texts = prefixes([*LINES[:4], LINES[0], LINES[1], LINES[2], LINES[5]])
    first, second = LINES[1].encode().split(b"\xa9")
    happens(
        write(LINES[0]),
        write(first),
        write(b"\xa9" + second),
        write(LINES[2] + LINES[3]),
        write(LINES[0], "wb"),
        write(LINES[1]),
        replace(LINES[2]),
        write(LINES[5]),
    )
    assert cli.main([*GREEDY, "app.log"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [*map(expected, texts)]
    assert "Text: app.log, not there yet\n" in printed.err
    summary = r"\d+ tokens read, \d+ said, [\d.,]+ tokens/s, KV cache 128\.0 KiB \(4 sinks \+ window of 60\)"
    assert re.fullmatch(summary, printed.err.splitlines()[-1])


def piped(monkeypatch, writes):
    """Let a thread write these to stdin."""
    read, written = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))

    def run():
        with os.fdopen(written, "wb", buffering=0) as pipe:
            for seconds, data in writes:
                time.sleep(seconds)
                pipe.write(data)

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.parametrize("seconds", [0.005, 0])
def test_a_pipe_whose_writer_is_slower_or_faster(seconds, expected, monkeypatch, capsys):
    """Slower: byte by byte. Faster: all at once, after more than a pipe holds."""
    lines = LINES[:6] if seconds else ["self.assertEqual(" * 4_000 + "\n", *LINES[:6]]
    data = "".join(lines).encode()
    writes = [(seconds, data[i : i + 1]) for i in range(len(data))] if seconds else [(0, data)]
    piped(monkeypatch, writes)
    assert cli.main([*GREEDY, "-", *([] if seconds else ["--pattern", "^def|é"])]) == 0
    if seconds:
        assert capsys.readouterr().out.splitlines() == [*map(expected, prefixes(lines))]
    else:
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 6
        assert int(printed.err.splitlines()[-1].split()[0].replace(",", "")) > 10_000


def test_the_last_word_is_about_the_rest(expected, monkeypatch, capsys):
    text = LINES[0] + "\n    ret"
    piped(monkeypatch, [(0, text.encode())])
    assert cli.main([*GREEDY, "-", "--prompt", "urn"]) == 0
    assert capsys.readouterr().out.splitlines() == [expected(LINES[0] + "urn"), expected(text + "urn")]
    piped(monkeypatch, [])
    assert cli.main([*GREEDY, "-", "--prompt", "urn"]) == 0
    assert capsys.readouterr().out == ""


def test_only_after_lines_with_a_pattern(happens, expected, capsys):
    happens(write("".join(LINES)), write("and é1"), write("3 is here\n"))
    assert cli.main([*GREEDY, "app.log", "--pattern", r"é\d*3 is|f31\b"]) == 0
    whole = "".join(LINES)
    texts = [whole[: whole.index("f31(x):\n") + 8], whole + "and é13 is here\n"]
    assert capsys.readouterr().out.splitlines() == [*map(expected, texts)]


@pytest.mark.parametrize("pieces", [1, 7])
def test_every_so_many_tokens(pieces, happens, expected, tokenizer, capsys):
    text = "".join(LINES)
    size = -(-len(text) // pieces)
    happens(*(write(text[i : i + size]) for i in range(0, len(text), size)))
    assert cli.main([*GREEDY, "app.log", "--every", "50"]) == 0
    ids = tokenizer(text).input_ids
    # The start token does not count.
    places = range(51, len(ids) - 10, 50)
    assert len(places) > 4
    assert capsys.readouterr().out.splitlines() == [expected("", ids[:place]) for place in places]


def test_sampling_is_repeatable_and_differs_from_time_to_time(monkeypatch, expected, capsys):
    piped(monkeypatch, [(0, "".join(LINES[:3]).encode())])
    assert cli.main([*SMALL, "--follow", "-", "--seed", "5", "--temperature", "1", "--min-p", "0"]) == 0
    options = {"temperature": 1.0, "repetition_penalty": 1.1}
    lines = [expected(text, seed=5 + i, **options) for i, text in enumerate(prefixes(LINES[:3]))]
    assert capsys.readouterr().out.splitlines() == lines


def test_it_may_say_json(monkeypatch, capsys):
    pytest.importorskip("llguidance")
    Path("schema.json").write_text('{"enum": ["fine", "broken"]}')
    piped(monkeypatch, [(0, "".join(LINES[:3]).encode())])
    assert cli.main([*GREEDY, "-", "--json-schema", "schema.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert {*lines} <= {'"fine"', '"broken"'}
    piped(monkeypatch, [(0, "".join(LINES[:3]).encode())])
    assert cli.main([*GREEDY, "-", "--json-schema", "schema.json", "--max-new-tokens", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ['"'] * 3
    message = "json-schema: 3 of 3 texts were cut off after 1 tokens; give more --max-new-tokens"
    assert captured.err.splitlines()[-1] == f"sinkattn generate: {message}"


def test_what_is_said_may_stay_in_the_stream(enabled, tokenizer, monkeypatch, capsys):
    piped(monkeypatch, [(0, "".join(LINES[:3]).encode())])
    assert cli.main([*GREEDY, "-", "--keep", "--prompt", "# "]) == 0
    ids, lines = tokenizer("").input_ids, []
    for line in LINES[:3]:
        ids += tokenizer(line, add_special_tokens=False).input_ids
        ids += tokenizer("# ", add_special_tokens=False).input_ids
        said = []
        for token in stream_tokens(enabled, ids, max_new_tokens=12):
            said.append(token)
            if re.search(r"\S.*\n", tokenizer.decode(said), re.DOTALL):
                break
        lines.append("".join(first_line([tokenizer.decode(said)])))
        ids += said
        if "\n" not in tokenizer.decode(said).lstrip():
            ids += tokenizer("\n", add_special_tokens=False).input_ids
    assert capsys.readouterr().out.splitlines() == lines


def test_a_chat_replies(chat_model, monkeypatch, capsys):
    """In the template the text is what a user says; its end token is a line break."""
    piped(monkeypatch, [(0, "".join(LINES[:3]).encode())])
    assert cli.main([*GREEDY, "-", "--model", str(chat_model), "--chat", "--prompt", "def"]) == 0
    model, tokenizer = load(chat_model, device="cpu")
    sinkattn.enable(model, 4, 60)
    lines = []
    for text in prefixes(LINES[:3]):
        ids = tokenizer("<s>" + text + "def", add_special_tokens=False).input_ids
        ids += tokenizer("\n", add_special_tokens=False).input_ids
        stop_ids = [model.generation_config.eos_token_id]
        lines.append(tokenizer.decode(list(stream_tokens(model, ids, max_new_tokens=12, stop_ids=stop_ids))))
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in lines)


def loss(error):
    return float(re.search(r"loss ([\d.]+), KV cache", error)[1])


def test_it_learns_from_what_it_reads(monkeypatch, capsys):
    text = "".join(LINES).replace("é", "") * 6
    losses = []
    for learn in ("all@0.001", "all@1e-9"):
        piped(monkeypatch, [(0, text.encode())])
        arguments = ["--pattern", "f39", "--learn", learn, "--save", learn[:6]]
        assert cli.main([*GREEDY, "-", *arguments]) == 0
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 7
        assert re.search(rf"^Learned: {learn[:6]} \(\d+ updates\)$", printed.err, re.MULTILINE)
        losses.append(loss(printed.err))
    assert losses[0] < losses[1] - 0.05
    assert load("all@0.", device="cpu")[0].dtype == load(None, device="cpu")[0].dtype


def test_adapters_learn_by_default(monkeypatch, capsys):
    pytest.importorskip("peft")
    piped(monkeypatch, [(0, "".join(LINES).encode())])
    assert cli.main([*GREEDY, "-", "--pattern", "never", "--learn", "--save", "new"]) == 0
    assert Path("new/adapter_model.safetensors").exists()
    assert loss(capsys.readouterr().err) > 0


def test_a_terminal_gets_a_status_line(happens, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    happens(write("".join(LINES) * 20))
    assert cli.main([*GREEDY, "app.log", "--pattern", "never"]) == 0
    error = capsys.readouterr().err
    assert re.search(r"[\d,]+ tokens read, 0 said, [\d.,]+ tokens/s, cache 100% full, 0 B behind", error)


def test_ctrl_c_ends_a_pipe_that_never_ends():
    process = start(*GREEDY, "-", stdin=subprocess.PIPE)
    for text in ("def f(x):\n", "    return x\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    error = process.stderr.read()
    assert re.search(r"\d\d tokens read, \d+ said, .* KV cache 128\.0 KiB \(4 sinks \+ window of 60\)$", error.strip())
    assert "Traceback" not in error
    process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "5"], "every: needs a text to follow; give --follow FILE, or - for stdin"),
        (["--on-line"], "on-line: needs a text to follow"),
        (["--follow", "-", "--every", "5", "--pattern", "a"], "pattern: is looked for in lines"),
        (["--follow", "-", "--save", "new"], "save: nothing is learned; give --learn"),
        (["--follow", "-", "--keep", "--chat"], "keep: in a chat"),
        (["--follow", "-", "--chat"], "chat: the model that ships with sinkattn has no chat template"),
        (["--follow", "-", "--top-p", "2"], "top_p: expected more than 0 and at most 1, got 2.0"),
        (["--follow", "."], "follow: cannot read .: Is a directory"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(arguments, message, capsys):
    assert cli.main([*SMALL, *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sinkattn generate: {message}")


def test_a_pattern_is_checked_at_once(capsys):
    with pytest.raises(SystemExit):
        cli.main([*SMALL, "--follow", "-", "--pattern", "("])
    assert "argument --pattern: expected a regular expression, got '('" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        (["a", "b\n", "c"], "ab"),
        (["\n\n ", " a b\nc"], "  a b"),
        ([" ", "\n", " x"], " x"),
        (["\n", " "], ""),
        (["", "a"], "a"),
    ],
)
def test_the_first_line_that_is_not_blank(pieces, line):
    assert "".join(first_line(pieces)) == line
