"""``sinkattn chat``: on a terminal, in a pipe, its commands, and Ctrl-C."""

import builtins
import io
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from chat_models import CHATML, THINKING, tiny_model, with_template

from sinkattn import cli
from sinkattn.cli import chat as command
from sinkattn.hf.load import load

OPTIONS = ["--device", "cpu", "--window", "96", "--max-reply", "6", "--seed", "0"]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_chat")
    tokenizer = with_template(tokenizer, CHATML)
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def opened(monkeypatch):
    """The chats that the command opens."""
    chats, open_chat = [], command.open_chat

    def noted(*args):
        pool, chat = open_chat(*args)
        chats.append(chat)
        return pool, chat

    monkeypatch.setattr(command, "open_chat", noted)
    return chats


@pytest.fixture
def piped(folder, monkeypatch):
    """Run the command with these lines as its stdin."""

    def run(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return cli.main(["chat", str(folder), *OPTIONS, *options])

    return run


@pytest.fixture
def typed(folder, monkeypatch, capsys):
    """Run the command on a terminal on which these lines are typed; an exception is what is pressed."""

    def run(*lines, options=()):
        lines = iter(lines)

        def read(prompt):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setenv("COLUMNS", "120")
        return cli.main(["chat", str(folder), *OPTIONS, *options])

    return run


def replies(folder, *questions, options=()):
    """What a chat with the same options replies."""
    args = cli.build_parser().parse_args(["chat", str(folder), *OPTIONS, *options])
    _, chat = command.open_chat(*load(folder, device="cpu"), args)
    return ["".join(chat.say(question)) for question in questions]


def text_in_sight(chat):
    return chat._pool.tokenizer.decode(chat._current.stream.in_sight)


def test_in_a_pipe_stdout_has_the_replies_alone(piped, folder, capsys):
    lines = ["What is it?", "", "/show", "//etc", "Why?"]
    assert piped(*lines, options=["--system", "Be brief."]) == 0
    out, err = capsys.readouterr()
    want = replies(folder, "What is it?", "/etc", "Why?", options=["--system", "Be brief."])
    assert out == "".join(f"{reply}\n" for reply in want)
    assert "Model: " in err
    assert "system prompt" in err
    assert "3 turns, " in err
    assert "tokens in sight, KV cache" in err
    # Another seed says something else, another temperature too.
    assert piped(*lines, options=["--temperature", "0"]) == 0
    assert capsys.readouterr().out != out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_replaced(errors, folder, monkeypatch, capsys):
    options = ["chat", str(folder), *OPTIONS, "--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One \xff?\n"), encoding="utf-8", errors=errors))
    assert cli.main(options) == 0
    assert capsys.readouterr().out == "".join(f"{x}\n" for x in replies(folder, "One \ufffd?", options=options[-2:]))


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_replies(piped, capsys):
    assert piped("What is it?", "Why?", options=["--temperature", "0"]) == 0
    plain = capsys.readouterr()
    assert piped("What is it?", "Why?", options=["--temperature", "0", "--compile"]) == 0
    compiled = capsys.readouterr()
    assert compiled.out == plain.out
    assert "Compiling the decode step" in compiled.err


def test_in_a_pipe_an_error_ends_it(piped, capsys):
    for line, message in (
        ("/nonsense", "/nonsense: no such command; /help lists them, and //nonsense is a message that begins with /"),
        ("/save", "/save: expected /save FILE"),
        ("/undo twice", "/undo: expected /undo"),
        ("/undo", "undo: nothing has been said"),
        ("<|end|>", "message: expected text without special tokens, got '<|end|>'"),
    ):
        assert piped(line, "And now?") == 2
        out, err = capsys.readouterr()
        assert not out
        assert f"sinkattn chat: {message}" in err


def test_commands(typed, opened, capsys):
    lines = [
        "/help",
        "One.",
        "/fork",
        "Two.",
        "/show",
        "/undo",
        "/back",
        "Three.",
        "/back",
        "/reset",
        "/system Be odd.",
    ]
    assert typed(*lines, "Four.", "/show", "/nonsense", "/quit", "never read") == 0
    out, err = capsys.readouterr()
    [chat] = opened
    assert text_in_sight(chat).startswith("<|begin|>system\nBe odd.<|end|>\n<|begin|>user\nFour.<|end|>\n")
    assert chat.num_turns == 1
    chat.back()
    assert "One." in text_in_sight(chat)
    assert "Three." in text_in_sight(chat)
    for text in (
        "/load FILE",
        "in a copy; /back returns",
        "the last question and its reply are forgotten: turn 1, ",
        "in the other conversation: turn 1, ",
        "a new conversation, with a system prompt of ",
        "/nonsense: no such command",
        "/s, the first after ",
        "turn 2",
    ):
        assert text in out
    assert "never read" not in out
    assert "turn, " in err or "turns, " in err


def test_a_picture_of_what_is_in_sight(typed, opened, capsys):
    # Text that looks like markup stays as it is.
    assert typed(*["Tell [bold]me[/bold] more, please."] * 6, "/show") == 0
    [chat] = opened
    shown = capsys.readouterr().out.splitlines()
    [top] = (number for number, line in enumerate(shown) if line.startswith("╭"))
    rows = [line.strip("│ ").split() for line in shown[top + 1 :] if line.startswith("│")]
    assert f"{chat.num_in_sight} of {chat.total} tokens in sight, turn 6" in shown[top]
    assert [row[:3] for row in rows[:2]] == [
        ["system", "prompt", str(chat.num_prefix)],
        ["evicted", str(chat.num_evicted), "earlier"],
    ]
    names = {"user": "you", "assistant": "model"}
    assert [row[:2] for row in rows[2:]] == [[names[x.role], str(x.num_tokens)] for x in chat.in_sight()]
    assert [row[3:] for row in rows if row[0] == "you"][-1] == ["Tell", "[bold]me[/bold]", "more,", "please."]


def test_save_and_load(typed, opened, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed("One.", "Two.", "/save ~/[b]a chat", "/save /no/such/folder/b") == 0
    assert "saved in ~/[b]a chat" in capsys.readouterr().out
    assert (tmp_path / "[b]a chat").is_file()
    assert typed("/load ~/other", "Three?", "/load ~/[b]a chat", "/show") == 0
    out = capsys.readouterr().out
    assert f"loaded from ~/[b]a chat: turn 2, {opened[0].num_in_sight} tokens in sight" in out
    for line in (r"you .* One\.", r"you .* Two\.", r"model "):
        assert re.search(line, out), out
    assert text_in_sight(opened[1]) == text_in_sight(opened[0])


@pytest.fixture
def ctrl_c(monkeypatch):
    """Press Ctrl-C when so many tokens of a reply have been written."""

    def press_at(*counts):
        from sinkattn.hf.chat.chat import Chat

        say, number = Chat.say, iter(counts)

        def pressing(chat, text):
            at = next(number, None)
            pieces = say(chat, text)
            try:
                for count, piece in enumerate(pieces, 1):
                    if count == at:
                        signal.raise_signal(signal.SIGINT)
                    yield piece
            finally:
                pieces.close()

        monkeypatch.setattr(Chat, "say", pressing)

    return press_at


@pytest.mark.parametrize("way", ["piped", "typed"])
def test_ctrl_c_stops_a_reply(way, request, opened, ctrl_c, capsys, folder):
    first, second = replies(folder, "One.")[0], "Two."
    ctrl_c(2)
    assert request.getfixturevalue(way)("One.", second) == 0
    chat = opened[-1]
    said = capsys.readouterr().out
    text = text_in_sight(chat)
    assert chat.num_turns == 2
    # The first two tokens of the reply, then the template's end, then the next turn.
    stopped = text.partition("One.<|end|>\n<|begin|>assistant\n")[2].partition("<|end|>\n<|begin|>user\nTwo.<|end|>\n")
    assert stopped[1]
    assert first.startswith(stopped[0])
    assert 0 < len(stopped[0]) < len(first)
    assert f"{stopped[0]}\n" in said
    assert text.endswith("<|end|>\n")


def test_ctrl_c_leaves_where_no_reply_is_written(typed, opened, capsys):
    assert typed("One.", KeyboardInterrupt(), "never read") == 0
    assert opened[0].num_turns == 1
    assert "1 turn, " in capsys.readouterr().err


def test_what_cannot_chat_is_refused(piped, folder, tokenizer, tmp_path, capsys):
    for options, message in (
        (["--system", "<|begin|>"], "system: expected text without special tokens"),
        (["--max-reply", "96"], "max_reply: expected fewer tokens than the window has, 96, got 96"),
        (["--temperature", "-1"], "temperature: expected 0 or more, got -1.0"),
    ):
        assert piped("Hello?", options=options) == 2
        assert message in capsys.readouterr().err
    with_template(tokenizer, THINKING).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    assert cli.main(["chat", str(tmp_path), "--device", "cpu"]) == 2
    assert "chat: this model's chat template cannot be cut into messages" in capsys.readouterr().err
