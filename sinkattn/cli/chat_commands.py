"""Commands within ``sinkattn chat``: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sinkattn.cli.formatting import count_text
from sinkattn.hf.chat.chat import Chat

# Characters of the longest bar, which has as many tokens as the cache.
BAR = 40
# Characters that are shown of a message.
EXCERPT = 60
NAMES = {"user": "you", "assistant": "model", "earlier": "earlier messages"}
COLOURS = {"user": "cyan", "assistant": "green", "earlier": "blue"}


class Command(NamedTuple):
    """What a line asks for."""

    usage: str
    help: str
    run: Callable[[Chat, str], RenderableType]
    """Gets what follows the name, and answers."""


def obey(chat: Chat, line: str) -> RenderableType | None:
    """Run the command in a line; returns the answer, None for /quit.

    Raises:
        ValueError, RuntimeError, OSError: as the methods of `Chat`; ValueError also for a line that is no command.
    """
    name, _, argument = line[1:].strip().partition(" ")
    argument = argument.strip()
    if name == "quit" and not argument:
        return None
    if name == "help":
        return _help()
    command = COMMANDS.get(name)
    if command is None:
        raise ValueError(f"/{name}: no such command; /help lists them, and //{name} is a message that begins with /")
    if bool(argument) != (" " in command.usage):
        raise ValueError(f"/{name}: expected {command.usage}")
    return command.run(chat, argument)


def _help() -> Table:
    table = Table.grid(padding=(0, 2))
    for command in COMMANDS.values():
        table.add_row(command.usage, command.help)
    table.add_row("/quit", "leave; so does Ctrl-C while no reply is written, or the end of the input")
    table.add_row("//...", "a message that begins with /")
    return table


def _save(chat: Chat, name: str) -> str:
    chat.save(Path(name).expanduser())
    return f"saved in {name}"


def _load(chat: Chat, name: str) -> str:
    chat.load(Path(name).expanduser())
    return f"loaded from {name}: {_where(chat)}"


def _fork(chat: Chat, _: str) -> str:
    chat.fork()
    return "in a copy; /back returns"


def _back(chat: Chat, _: str) -> str:
    chat.back()
    return f"in the other conversation: {_where(chat)}"


def _undo(chat: Chat, _: str) -> str:
    chat.undo()
    return f"the last question and its reply are forgotten: {_where(chat)}"


def _reset(chat: Chat, _: str) -> str:
    chat.reset()
    return "a new conversation"


def _system(chat: Chat, text: str) -> str:
    chat.begin(text)
    return f"a new conversation, with a system prompt of {count_text(chat.num_prefix, 'token')}"


def _where(chat: Chat) -> str:
    return f"turn {chat.num_turns:,}, {count_text(chat.num_in_sight, 'token')} in sight"


def _show(chat: Chat, _: str) -> Panel:
    """A picture of what the model sees: a bar for the system prompt and for each message."""
    rows = [("system prompt", "magenta", chat.num_prefix, "always in sight")]
    if chat.num_evicted:
        rows.append(("evicted", "dim", chat.num_evicted, "earlier messages"))
    rows += [(NAMES[x.role], COLOURS[x.role], x.num_tokens, shorten(x.excerpt, EXCERPT)) for x in chat.in_sight()]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    table.add_column()
    for name, colour, count, text in rows:
        bar = "" if name == "evicted" else "█" * max(1, round(BAR * count / chat.total)) if count else ""
        table.add_row(Text(name, colour), f"{count:,}", Text(bar, colour), Text(text, "dim"))
    title = f"{chat.num_in_sight:,} of {chat.total:,} tokens in sight, turn {chat.num_turns:,}"
    return Panel(table, title=title, expand=False)


COMMANDS = {
    each.usage.partition(" ")[0].removeprefix("/"): each
    for each in (
        Command("/save FILE", "save this conversation", _save),
        Command("/load FILE", "go on in one that was saved, with its system prompt and sampling", _load),
        Command("/fork", "go on in a copy; an earlier copy is forgotten", _fork),
        Command("/back", "change between the copy and what it was made of", _back),
        Command("/undo", "forget the last question and its reply", _undo),
        Command("/show", "what the model sees: messages and their tokens", _show),
        Command("/system TEXT", "begin a new conversation with this system prompt", _system),
        Command("/reset", "begin a new conversation with the same one", _reset),
    )
}
