"""``sinkattn chat``: a conversation without end with a model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import sinkattn
from sinkattn.cli.arguments import (
    MODEL,
    add_cache_dtype,
    add_command,
    add_compile,
    add_sampling,
    add_weights,
    announce_compilation,
    describe_model,
    load_model,
    model_lines,
    open_stdin,
    positive,
    sampling,
)
from sinkattn.cli.errors import UserError, as_user_error, discard_stdout, require
from sinkattn.cli.formatting import console, count_text, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sinkattn.cli.arguments import Commands
    from sinkattn.hf.chat.chat import Chat
    from sinkattn.hf.pool.pool import StreamPool

# Room for a system prompt, in tokens; a longer one gets more, and a model of short texts has a quarter of their length.
PREFIX = 256
MAX_REPLY = 512
# The most tokens of a question and its reply that can be undone.
HEADROOM = 512


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "chat", run, "chat with a model without end; /help says what else it does")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_weights(parser)
    add_compile(parser)
    add_cache_dtype(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: that of the model, if it has one)")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help="most recent tokens kept besides the system prompt (default: 1020, or what the model was trained for)",
    )
    parser.add_argument(
        "--max-reply",
        type=positive,
        metavar="N",
        help=f"tokens after which a reply is cut off (default: {MAX_REPLY}, at most half of the window)",
    )
    add_sampling(parser, seed=None)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    is_piped = not (open_stdin(replaces=True).isatty() and sys.stdout.isatty())
    require("rich")
    model, tokenizer = load_model(args)
    print(model_lines(describe_model(model, args)), file=sys.stderr, flush=True)
    with as_user_error(ValueError, RuntimeError):
        pool, chat = open_chat(model, tokenizer, args)
    if not chat.num_prefix:
        # Its first tokens leave, and with them the attention sinks.
        print("Nothing stays in sight, which most models need: give --system TEXT", file=sys.stderr, flush=True)
    dialogue = _Dialogue(chat, console(stderr=is_piped), is_piped)
    try:
        dialogue.run()
    except BrokenPipeError:
        discard_stdout()
    print(f"{dialogue.summary()}, KV cache {size_text(pool.nbytes)}", file=sys.stderr)
    return 0


def open_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[StreamPool, Chat]:
    """Make a model stream, and begin a chat with it."""
    from sinkattn.hf.chat.chat import Chat
    from sinkattn.hf.chat.encoder import MessageEncoder
    from sinkattn.hf.model_config import default_window, trained_length
    from sinkattn.hf.pool.pool import StreamPool

    trained = trained_length(model)
    num_prefix = len(MessageEncoder(tokenizer, args.system).prefix)
    max_prefix = max(num_prefix, PREFIX if trained is None else min(PREFIX, trained // 4))
    window = args.window or default_window(model, max_prefix)
    if trained is not None:
        max_prefix = max(num_prefix, min(max_prefix, trained - window))
    # The sinks are the system prompt, whose length each conversation has of its own.
    announce_compilation(args)
    headroom = min(window, HEADROOM)
    sinkattn.enable(model, 0, window, headroom, compile=args.compile, cache_dtype=args.cache_dtype)
    # One conversation is in the memory of the device; the others that a chat needs room for wait in that of the host.
    pool = StreamPool(model, 1, max_parked=2, tokenizer=tokenizer, max_prefix=max_prefix)
    max_reply = args.max_reply or max(1, min(MAX_REPLY, window // 2))
    return pool, Chat(pool, window, max_reply, system=args.system, sampling=sampling(args, model))


class _Dialogue:
    """Reads what the user says, and writes the replies to stdout.

    On a terminal there is a prompt with a history, and a line of figures after each reply; otherwise every line of
    stdin is a message, and stdout has the replies alone.

    Args:
        chat: to lead.
        notes: where everything but the replies is printed.
        is_piped: whether stdin or stdout is no terminal.
    """

    def __init__(self, chat: Chat, notes: Console, is_piped: bool) -> None:
        self._chat, self._notes, self._is_piped = chat, notes, is_piped
        self._num_replies, self._num_tokens, self._seconds = 0, 0, 0.0

    def run(self) -> None:
        """Go on until the input ends, or /quit, or Ctrl-C where no reply is written."""
        from sinkattn.cli.chat_commands import obey

        with suppress(KeyboardInterrupt, EOFError):
            for line in self._lines():
                try:
                    with as_user_error(ValueError, RuntimeError, OSError):
                        if line.startswith("/") and not line.startswith("//"):
                            if (answer := obey(self._chat, line)) is None:
                                return
                            self._notes.print(answer, markup=False)
                        elif line.strip():
                            self._reply(line.removeprefix("/"))
                except UserError as error:
                    if self._is_piped:
                        raise
                    self._notes.print(str(error), style="red", markup=False)

    def _lines(self) -> Iterator[str]:
        if self._is_piped:
            yield from (line.rstrip("\n") for line in iter(sys.stdin.readline, ""))
            return
        with suppress(ImportError):  # not on Windows, whose console has a history
            import readline  # noqa: F401  # gives `input` one
        self._notes.print("/help lists the commands; Ctrl-C stops a reply, and otherwise leaves.", style="dim")
        while True:
            yield input("> ")

    def _reply(self, text: str) -> None:
        from sinkattn.evaluate.interruption import noticed

        began = first = time.perf_counter()
        with noticed() as pressed, closing(self._chat.say(text)) as pieces:
            for number, piece in enumerate(pieces):
                if not number:
                    first = time.perf_counter()
                sys.stdout.write(piece)
                sys.stdout.flush()
                if pressed.is_set():
                    break
        sys.stdout.write("\n")
        sys.stdout.flush()
        count, seconds = self._chat.reply_tokens, time.perf_counter() - first
        # The first token waits for the question.
        self._num_replies, self._num_tokens = self._num_replies + 1, self._num_tokens + max(count - 1, 0)
        self._seconds += seconds
        if not self._is_piped:
            self._notes.print(
                f"{count_text(count, 'token')}, {max(count - 1, 0) / seconds:.1f}/s, the first after "
                f"{first - began:.2f} s; {fill_text(self._chat)}; turn {self._chat.num_turns:,}",
                style="dim",
            )

    def summary(self) -> str:
        """Turns, speed and fill of the cache."""
        speed = f", {self._num_tokens / self._seconds:.1f} tokens/s" if self._num_tokens else ""
        return f"{count_text(self._num_replies, 'turn')}{speed}, {fill_text(self._chat)}"


def fill_text(chat: Chat) -> str:
    """How much of the cache is filled."""
    return f"{chat.num_in_sight:,} of {chat.total:,} tokens in sight"
