"""``sinkattn learn``: a model learns from a text as it comes, beside its frozen twin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, describe_text, new_folder, open_stdin, positive
from sinkattn.cli.eval.arguments import add_outputs
from sinkattn.cli.eval.session import open_session, write_json
from sinkattn.cli.learn_arguments import VARIANT, add_learning, held_out, save_learned, variant, with_rate
from sinkattn.cli.learn_report import as_dict, draw, live_line, tables

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands
    from sinkattn.cli.eval.session import Session
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
    parser.add_argument(
        "--variant", type=variant, default="lora", metavar="V", help=f"{VARIANT} (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=positive, help="stop after so many (default: at the end of the text)")
    parser.add_argument(
        "--stretch",
        type=positive,
        metavar="N",
        help=f"print a line every N tokens; longer later (default: {CHUNKS_OF_A_STRETCH} chunks)",
    )
    add_learning(parser, "none")
    parser.add_argument("--save", type=new_folder, metavar="DIR", help="new or empty folder for what was learned")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command. However the stream ends, what was learned until then is saved."""
    variants = with_rate([args.variant], args.rate)
    is_finished = False
    try:
        with open_session(args) as session:
            from sinkattn.evaluate import learn
            from sinkattn.evaluate.interruption import awaited
            from sinkattn.evaluate.methods import CacheSize
            from sinkattn.evaluate.text import Feed, TextFile, TokenStream

            kept = held_out(session)
            stream = TokenStream(
                Feed(open_stdin()) if args.text == "-" else TextFile(Path(args.text)), session.tokenizer
            )
            print(f"Text: {stream.text.description}", flush=True)
            cache = CacheSize.parse(args.cache) if args.cache else CacheSize(4, session.total - 4)
            stretch = args.stretch or CHUNKS_OF_A_STRETCH * args.chunk
            settings = learn.Settings(cache, variants, args.tokens, stretch, args.chunk, seed=args.seed)
            result: Result | None = None

            def report(result: Result) -> dict[str, Any]:
                return {**as_dict(result), "text": describe_text(stream, 0)}

            def on_progress(so_far: Result) -> None:
                nonlocal result
                result = so_far

            def on_stretch(result: Result) -> None:
                print(live_line(report(result)), flush=True)
                if args.json:
                    write_json(args.json, session.report(report(result)))

            failure: Exception | None = None
            ids = awaited(stream.once(), session.interrupted)
            try:
                result = learn.run(session.model, ids, settings, kept, on_progress, on_stretch)
            except BrokenPipeError:
                raise  # nobody reads the tables
            except Exception as error:
                if result is None:
                    raise
                failure = error
            finally:
                if args.save and result:
                    _save(session, result)
            session.finish(report(result), tables(report(result)), draw)
            if failure:
                raise failure
            is_finished = True
    except KeyboardInterrupt:
        if not is_finished:
            raise
    return 0


def _save(session: Session, result: Result) -> None:
    """Save what was learned, if anything was, and say so."""
    [learner] = result.learners.values()
    print(save_learned(learner, session.args.variant, session.tokenizer, session.args.save))
