"""Arguments that several commands of ``sinkattn eval`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from sinkattn.cli.arguments import CACHE_DTYPES, positive
from sinkattn.cli.budget import SHARES, add_minutes

MIN_COUNT = 8


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which text to stream."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, - for stdin (default: Python's standard library)")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]", help="data set of the Hugging Face hub, or a folder")
    parser.add_argument("--split", help="split of the data set (default: test)")
    parser.add_argument("--column", help="column of the data set (default: text)")
    parser.add_argument("--no-start-token", action="store_true", help="begin the stream without a start token")


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Add whether questions are asked in a chat."""
    help_text = "ask as the user and answer as the assistant of one chat, in the model's chat template"
    parser.add_argument("--chat", action="store_true", help=help_text)


def add_caches(parser: argparse.ArgumentParser, default: list[str] | None = None) -> None:
    """Add the cache sizes to compare; ``default`` None for sizes that depend on the model."""
    text = "depends on the model" if default is None else " ".join(default)
    parser.add_argument(
        "--cache",
        nargs="+",
        default=default,
        metavar="S+W",
        help=f"sinks + window; 0 sinks for window attention (default: {text})",
    )


def add_cache_dtypes(parser: argparse.ArgumentParser) -> None:
    """Add the dtypes of 8 bits to compare with caches of full precision."""
    help_text = "also caches that hold tokens that are not sinks in 8 bits, compared with those that do not"
    parser.add_argument("--cache-dtype", nargs="+", choices=CACHE_DTYPES, default=[], help=help_text)


def add_count(parser: argparse.ArgumentParser, most: int) -> None:
    """Add the number of questions, and the time that it is chosen for."""
    parser.add_argument("--count", type=positive, help=f"questions in a stream (default: up to {most})")
    add_minutes(parser)


def counts(given: int | None, most: int) -> list[int]:
    """Numbers of questions for `choose`: the one that was given, or ``most`` and fewer, down to eight."""
    return [given or max(round(most * share), min(most, MIN_COUNT)) for share in SHARES]


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the files to write."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write all figures to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture to write")
