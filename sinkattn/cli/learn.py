"""``sinkattn learn``: a model learns from a text as it comes, beside its frozen twin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, describe_text, positive
from sinkattn.cli.errors import as_user_error
from sinkattn.cli.eval.arguments import add_outputs
from sinkattn.cli.eval.session import open_session, write_json
from sinkattn.cli.learn_arguments import VARIANT, add_learning, held_out, parse_variants
from sinkattn.cli.learn_report import as_dict, draw, live_line, tables

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.learn import Result

CHUNKS_OF_A_STRETCH = 8


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(
        commands, "learn", run, "learn from a text as it comes, beside the frozen model; Ctrl-C ends it"
    )
    parser.set_defaults(evaluation="learn")
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, - for stdin, which may never end")
    parser.add_argument("--variant", default="lora", metavar="V", help=f"{VARIANT} (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, help="stop after so many (default: at the end of the text)")
    parser.add_argument(
        "--stretch",
        type=positive,
        metavar="N",
        help=f"tell about so many tokens at a time, at first (default: {CHUNKS_OF_A_STRETCH} chunks)",
    )
    add_learning(parser, "none")
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder to save what was learned to")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    variants = parse_variants([args.variant], args.rate)
    if args.save:
        with as_user_error(OSError):
            args.save.mkdir(parents=True, exist_ok=True)
    is_finished = False
    try:
        with open_session(args) as session:
            from sinkattn.evaluate import learn
            from sinkattn.evaluate.methods import CacheSize
            from sinkattn.evaluate.text import Feed, TextFile, TokenStream

            kept = held_out(session)
            stream = TokenStream(Feed(sys.stdin) if args.text == "-" else TextFile(Path(args.text)), session.tokenizer)
            print(f"Text: {stream.text.description}", flush=True)
            cache = CacheSize.parse(args.cache) if args.cache else CacheSize(4, session.total - 4)
            stretch = args.stretch or CHUNKS_OF_A_STRETCH * args.chunk
            settings = learn.Settings(cache, variants, args.tokens, stretch, args.chunk, seed=args.seed)

            def report(result: Result) -> dict[str, Any]:
                return {**as_dict(result), "text": describe_text(stream, 0)}

            def on_stretch(result: Result) -> None:
                print(live_line(report(result)), flush=True)
                if args.json:
                    write_json(args.json, session.report(report(result)))

            result = learn.run(session.model, _waiting(stream.once()), settings, kept, lambda result: None, on_stretch)
            session.finish(report(result), tables(report(result)), draw)
            if args.save:
                [learner] = result.learners.values()
                learner.save(args.save)
                print(f"Learned: {args.save}")
            is_finished = True
    except KeyboardInterrupt:
        if not is_finished:
            raise
    return 0


def _waiting(ids: Iterator[int]) -> Iterator[int]:
    """The same ids; Ctrl-C ends the wait for the next one."""
    from sinkattn.evaluate.interruption import waiting

    while True:
        with waiting():
            token = next(ids, None)
        if token is None:
            return
        yield token
