"""``sinkattn eval``: a module for each evaluation, with its arguments and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkattn.cli.arguments import sentence
from sinkattn.cli.eval import chat, endless, eviction, latency, learn, ppl, sinks, stream_qa, streameval

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add ``eval`` and its commands to those of a parser."""
    text = "measure a model on long streams: the claims of StreamingLLM"
    parser = commands.add_parser("eval", help=text, description=sentence(text))
    evaluations = parser.add_subparsers(dest="evaluation", required=True, metavar="evaluation")
    for command in (ppl, endless, streameval, stream_qa, chat, eviction, latency, sinks, learn):
        command.add_parser(evaluations)
