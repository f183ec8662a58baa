"""``sinkattn eval streameval``: whether a model recalls a line from a fixed number of lines back, along a stream."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, positive
from sinkattn.cli.budget import choose
from sinkattn.cli.eval.arguments import add_caches, add_chat, add_count, add_outputs, counts
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, percent_text, range_text
from sinkattn.cli.pictures import error_bars, finish, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.exact_match import Tally
    from sinkattn.evaluate.methods import Predictor

COUNT = 150
# With fewer questions at a distance than this, because recomputation is so slow, it is left out.
MIN_RECOMPUTED = 30


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "streameval", run, "recall a line from a fixed number of lines back, repeatedly")
    add_model(parser)
    add_chat(parser)
    add_caches(parser)
    parser.add_argument(
        "--distances",
        type=positive,
        nargs="+",
        default=[1, 2, 5, 10, 15, 20, 50],
        metavar="N",
        help="lines back; a stream for each (default: 1 2 5 10 15 20 50)",
    )
    parser.add_argument("--every", type=positive, default=10, metavar="N", help="lines per question (default: 10)")
    add_count(parser, COUNT)
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help=f"whether to ask recomputation too (default: if there is time for {MIN_RECOMPUTED} questions each)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the lines (default: 0)")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import exact_match
        from sinkattn.evaluate.interruption import Interrupted
        from sinkattn.evaluate.items import line_items
        from sinkattn.evaluate.methods import Recomputed, Streamed
        from sinkattn.hf.chat.template import ChatTemplate

        template = ChatTemplate.of(session.tokenizer) if args.chat else None
        streams = {distance: line_items(distance, args.every, args.seed) for distance in sorted({*args.distances})}
        caches = session.caches((0, 4))
        totals = sorted({cache.total for cache in caches})
        # The first items are longer: they reach back to the line that is asked for.
        sample = next(islice(line_items(1, args.every, args.seed), 1, None))
        ids, is_answer = exact_match.encode(sample, session.tokenizer, template)
        asked = len(caches) * session.speed.forward(len(ids))
        recomputed = int(is_answer.sum()) * sum(map(session.speed.forward, totals))

        def seconds(sizes: tuple[int, bool]) -> float:
            number, recompute = sizes
            first = sum(distance // args.every for distance in streams)
            return (len(streams) * number + first) * asked + len(streams) * number * recompute * recomputed

        number, recompute = choose(_candidates(args), seconds, args.minutes)
        predictors: list[Predictor] = [Streamed(session.model, cache) for cache in caches]
        if recompute:
            start = session.tokenizer.bos_token_id
            predictors += [Recomputed(session.model, total, start) for total in totals]
        tallies = {}
        with session.progress as progress:
            try:
                for distance, items in streams.items():
                    bar = progress.add(f"{distance} lines back", number)
                    tallies[distance] = exact_match.run(
                        predictors, items, session.tokenizer, number, session.show_accuracies(predictors, bar), template
                    )
            except Interrupted:
                if not tallies:
                    raise
        settings = {
            "distances": args.distances,
            "every": args.every,
            "count": number,
            "recompute": recompute,
            "seed": args.seed,
            "chat": args.chat,
        }
        report = as_dict(settings, predictors, tallies)
        session.finish(report, table(report), draw)
    return 0


def _candidates(args: argparse.Namespace) -> Iterator[tuple[int, bool]]:
    """Questions at each distance, and whether to ask recomputation: rather few without it than very few with it."""
    numbers = counts(args.count, COUNT)
    if args.recompute is None:
        yield from ((number, True) for number in numbers if args.count or number >= MIN_RECOMPUTED)
    yield from ((number, bool(args.recompute)) for number in numbers)


def as_dict(
    settings: dict[str, Any], predictors: list[Predictor], tallies: dict[int, tuple[list[Tally], int]]
) -> dict[str, Any]:
    """The report; ``tallies`` has the tallies of all predictors and the tokens of the stream, by distance."""
    from sinkattn.cli.eval.labels import label

    return {
        "settings": settings,
        "stream_tokens": {distance: tokens for distance, (_, tokens) in tallies.items()},
        "methods": {
            predictor.name: {
                "label": label(predictor),
                "by_distance": {distance: each[index].as_dict() for distance, (each, _) in tallies.items()},
            }
            for index, predictor in enumerate(predictors)
        },
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each distance, one column for each method."""
    settings = report["settings"]
    methods = report["methods"].values()
    out = captioned_table()
    for header in ("lines back", "tokens back,\nabout", "tokens of\nthe stream"):
        out.add_column(header, justify="right")
    for method in methods:
        out.add_column(f"{method['label']}\nright (last quarter)", justify="right")
    asked = {
        distance: max(method["by_distance"][distance]["questions"] for method in methods)
        for distance in report["stream_tokens"]
    }
    for distance, tokens in report["stream_tokens"].items():
        cells = [_accuracy_text(method["by_distance"][distance]) for method in methods]
        back = distance * tokens / (asked[distance] * settings["every"])
        out.add_row(f"{distance}", f"{back:.0f}", f"{tokens:,}", *cells)
    out.caption = (
        f"{range_text(asked.values(), 'question')} for each distance, one every {settings['every']} lines. "
        "In brackets, the last quarter of the stream.\n"
        "Lines from before the window cannot be known: 0 % is expected there."
        + ("" if settings["recompute"] else "\nRecomputation was left out; --recompute asks it too.")
    )
    return out


def _accuracy_text(tally: dict[str, Any]) -> str:
    return f"{tally['accuracy']:.1%} ({percent_text(tally['accuracy_by_quarter'][-1])})"


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw the accuracies by distance, and along the stream at one distance."""
    figure.set_size_inches(11, 4.4)
    by_distance, by_quarter = figure.subplots(1, 2, sharey=True)
    recalled = _largest_recalled(report)
    for name, style in styles(report["methods"]).items():
        style = {"marker": "o", "markersize": 3, **style}
        tallies = report["methods"][name]["by_distance"]
        distances = [int(distance) for distance in tallies]
        by_distance.errorbar(distances, *error_bars([*tallies.values()]), **style)
        quarters = tallies[recalled]["accuracy_by_quarter"]
        by_quarter.plot([1, 2, 3, 4], [math.nan if share is None else 100 * share for share in quarters], **style)
    by_distance.set(xlabel="lines back", ylabel="right answers, %", ylim=(-3, 103), xscale="log")
    by_distance.set_xticks(distances, [str(distance) for distance in distances])
    by_distance.minorticks_off()
    by_distance.set_title("By distance")
    by_quarter.set(xlabel="quarter of the stream", xticks=[1, 2, 3, 4])
    by_quarter.set_title(f"Along the stream, {recalled} lines back")
    finish(figure, [by_distance, by_quarter])


def _largest_recalled(report: dict[str, Any]) -> int | str:
    """The largest distance at which some method answers at least half; the smallest distance if there is none.

    Distances are numbers, or strings in a report that was read from JSON.
    """
    distances = list(report["stream_tokens"])
    recalled = [
        distance
        for distance in distances
        if max(method["by_distance"][distance]["accuracy"] for method in report["methods"].values()) >= 0.5
    ]
    return max(recalled, key=int) if recalled else min(distances, key=int)
