"""``sinkattn eval learn``: what learning on the stream brings, what it costs, and what it forgets."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, describe_text, positive
from sinkattn.cli.budget import SHARES, add_minutes, choose, stream_length
from sinkattn.cli.errors import UserError
from sinkattn.cli.eval.arguments import add_outputs, add_text
from sinkattn.cli.eval.session import open_session, write_json
from sinkattn.cli.learn_arguments import HELD_OUT, VARIANT, add_learning, held_out, variant, with_rate
from sinkattn.cli.learn_report import as_dict, draw, tables
from sinkattn.evaluate.variant import Variant

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands
    from sinkattn.cli.eval.session import Session
    from sinkattn.evaluate.learn import Result, Settings
    from sinkattn.evaluate.methods import CacheSize
    from sinkattn.evaluate.text import TokenStream

TOKENS = 20_000
NUM_STRETCHES = 10
MIN_HELD_OUT = 64
BEGINNING = "beginning of the text"
FILES = "files left out"
VARIANTS = ("lora", "lora+decay", "lora+reencode", "all")


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "learn", run, "learning on the stream: its losses, its cost, what is forgotten")
    add_model(parser)
    add_text(parser)
    parser.add_argument(
        "--drift",
        action="store_true",
        help="a text that changes: folders of Python's standard library, its reference in English, the first folder "
        "again",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        metavar="V",
        help=f"what learns beside the frozen model, each {VARIANT} (default: {' '.join(VARIANTS)}; in half "
        "precision without all)",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        help=f"length of the stream (default: up to {TOKENS}); with --drift rounded down to {NUM_STRETCHES} whole "
        "stretches of whole chunks",
    )
    add_learning(parser, "of the library every eighth file, of other text its beginning; the stream leaves it out")
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.drift and any((args.text, args.dataset, args.split, args.column)):
        raise UserError("drift: this is a text of its own; leave out --text, --dataset, --split and --column")
    variants = with_rate(args.variants or [*map(Variant.parse, VARIANTS)], args.rate)
    with open_session(args) as session:
        import torch

        from sinkattn.evaluate import learn
        from sinkattn.evaluate.methods import CacheSize
        from sinkattn.evaluate.sections import NUM_TEXTS, Sections

        if args.variants is None and learn.is_half(session.model):
            variants = tuple(each for each in variants if each.learn != "all")
        given = held_out(session)
        streams, order, description = _texts(session)
        cache = CacheSize.parse(args.cache) if args.cache else CacheSize(4, session.total - 4)
        texts = NUM_TEXTS if args.drift and not given else 1
        settings = choose(
            _candidates(args, cache, variants), lambda each: each.seconds(session.speed, texts), args.minutes
        )
        assert settings.tokens is not None
        sections = Sections(streams, order, 0 if given else settings.held_out)
        section = settings.tokens // len(order)

        def report(result: Result) -> dict[str, Any]:
            text = {**describe_text(streams[order[0]], sections.restarts), "description": description}
            names = [order[each.begin // section % len(order)] for each in result.stretches] if args.drift else None
            return {**as_dict(result, names), "text": text}

        with session.progress as progress:
            bar = progress.add("tokens", settings.tokens)

            def on_progress(result: Result) -> None:
                means = ((name, result.mean(name)) for name in result.seconds)
                bar(result.tokens, "  ".join(f"{name} {mean.loss:.3f}" for name, mean in means if mean))

            def on_stretch(result: Result) -> None:
                if args.json:
                    write_json(args.json, session.report(report(result)))

            kept = given or {name: torch.tensor(ids) for name, ids in sections.held_out.items()}
            result = learn.run(session.model, sections.read(section), settings, kept, on_progress, on_stretch)
        session.finish(report(result), tables(report(result)), draw)
    return 0


def _texts(session: Session) -> tuple[dict[str, TokenStream], list[str], str]:
    """The streams by name, the order of their sections, and the description of all."""
    from sinkattn.evaluate.sections import drifting_streams
    from sinkattn.evaluate.text import StandardLibrary

    if not session.args.drift:
        stream = session.stream()
        name = FILES if isinstance(stream.text, StandardLibrary) else BEGINNING
        return {name: stream}, [name], stream.text.description
    streams, order = drifting_streams(session.tokenizer, not session.args.no_start_token)
    description = f"{', then '.join(order)}, of Python {platform.python_version()}"
    print(f"Text: {description}", flush=True)
    return streams, order, description


def _candidates(args: argparse.Namespace, cache: CacheSize, variants: tuple[Variant, ...]) -> Iterator[Settings]:
    """What is given stays; for slow models the stream, its stretches and what is held out are shorter."""
    from sinkattn.evaluate.learn import Settings

    for share in SHARES:
        tokens = args.tokens or stream_length(TOKENS, share, cache.total)
        chunks = tokens / NUM_STRETCHES / args.chunk
        stretch = args.chunk * max(1, math.floor(chunks) if args.drift else math.ceil(chunks))
        # Sections of a text that drifts are of two whole stretches each.
        tokens = NUM_STRETCHES * stretch if args.drift else tokens
        held_out = HELD_OUT if args.held_out else min(HELD_OUT, max(MIN_HELD_OUT, tokens // NUM_STRETCHES))
        yield Settings(cache, variants, tokens, stretch, args.chunk, held_out, args.seed)
