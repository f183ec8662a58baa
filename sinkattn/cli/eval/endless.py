"""``sinkattn eval endless``: one stream through one cache, without a break, stretch by stretch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import (
    add_command,
    add_compile,
    add_model,
    announce_compilation,
    describe_text,
    positive,
)
from sinkattn.cli.budget import SHARES, add_minutes, choose, stream_length
from sinkattn.cli.eval.arguments import add_outputs, add_text
from sinkattn.cli.eval.session import open_session, write_json
from sinkattn.cli.formatting import captioned_table, restart_lines, size_text, turns_line
from sinkattn.cli.pictures import COLOURS, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.endless import Result, Settings, Stretch
    from sinkattn.evaluate.methods import CacheSize

TOKENS = 20_000
# Default: as many stretches, of at most so many tokens.
NUM_STRETCHES = 10
MAX_STRETCH = 100_000


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "endless", run, "one stream without a break: loss, memory and time, by stretch")
    add_model(parser)
    add_compile(parser)
    add_text(parser)
    parser.add_argument("--cache", metavar="S+W", help="sinks + window (default: 4 sinks, window by the model)")
    parser.add_argument("--tokens", type=positive, help=f"length of the stream (default: up to {TOKENS})")
    parser.add_argument(
        "--stretch",
        type=positive,
        metavar="N",
        help=f"tokens of a stretch (default: a tenth of the stream, at most {MAX_STRETCH})",
    )
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import endless
        from sinkattn.evaluate.methods import CacheSize

        stream = session.stream()
        cache = CacheSize.parse(args.cache) if args.cache else CacheSize(4, session.total - 4)
        settings = choose(_candidates(args, cache), lambda each: each.seconds(session.speed), args.minutes)
        with session.progress as progress:
            bar = progress.add("tokens", settings.tokens)

            def on_progress(done: int, loss: float) -> None:
                bar(done, f"loss {loss:.3f}")

            def report(result: Result) -> dict[str, Any]:
                return {**as_dict(result), "text": describe_text(stream, stream.restarts)}

            def on_stretch(result: Result) -> None:
                if args.json:
                    write_json(args.json, session.report(report(result)))

            announce_compilation(args)
            result = endless.run(session.model, stream, settings, on_progress, on_stretch, progress.resident)
        session.finish(report(result), table(report(result)), draw)
    return 0


def _candidates(args: argparse.Namespace, cache: CacheSize) -> Iterator[Settings]:
    """What is given stays; for slow models the stream and its stretches are shorter."""
    from sinkattn.evaluate.endless import Settings

    for share in SHARES:
        tokens = args.tokens or stream_length(TOKENS, share, cache.total)
        stretch = args.stretch or min(MAX_STRETCH, max(2 * cache.total, tokens // NUM_STRETCHES))
        yield Settings(cache, tokens, stretch, args.compile)


def as_dict(result: Result) -> dict[str, Any]:
    """The report of a result. Losses are in nats, times in seconds, memory in bytes."""
    settings, mean = result.settings, result.all.mean()
    sizes = {name: getattr(settings, name) for name in ("tokens", "stretch", "timed")}
    return {
        "settings": {"cache": str(settings.cache), **sizes},
        "all": mean and mean.as_dict(),
        "stretches": [_stretch_dict(stretch) for stretch in result.stretches],
        "in_turns": result.turns and asdict(result.turns),
    }


def _stretch_dict(stretch: Stretch) -> dict[str, Any]:
    return {
        "begin": stretch.begin,
        "end": stretch.end,
        **stretch.mean.as_dict(),
        "timed_tokens": stretch.timed,
        "seconds_per_token": stretch.seconds,
        "kv_cache_bytes": stretch.kv_bytes,
        "resident_bytes": stretch.resident_bytes,
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each stretch."""
    out = captioned_table()
    for header in ("tokens", "loss", "perplexity", "95 % interval", "ms per\ntoken", "KV cache", "resident\nmemory"):
        out.add_column(header, justify="right")
    for each in report["stretches"]:
        seconds = each["seconds_per_token"]
        out.add_row(
            f"{each['begin']:,} to {each['end'] - 1:,}",
            f"{each['loss']:.3f}",
            f"{each['perplexity']:.2f}",
            "{:.2f} to {:.2f}".format(*_interval(each)) if each["margin"] is not None else "",
            "" if seconds is None else f"{seconds * 1e3:.2f}",
            size_text(each["kv_cache_bytes"]),
            size_text(each["resident_bytes"]),
        )
    settings, whole, turns = report["settings"], report["all"], report["in_turns"]
    resident = [each["resident_bytes"] for each in report["stretches"]]
    lines = [
        f"One cache of {settings['cache']} for all {whole['tokens']:,} tokens: loss {whole['loss']:.3f}, "
        f"perplexity {whole['perplexity']:.2f}.",
        f"Times are medians of the first {settings['timed']:,} tokens of a stretch with a full window, fed one by "
        "one; the others are fed in chunks.",
        f"Resident memory: {size_text(resident[0])} after the first stretch, at most "
        f"{size_text(max(resident) - resident[0])} more after.",
    ]
    if turns:
        lines.append(turns_line(turns))
    out.caption = "\n".join(lines + restart_lines(report["text"]))
    return out


def _interval(mean: dict[str, Any]) -> tuple[float, float]:
    """The 95 % confidence interval of the perplexity of a mean loss that has a margin."""
    from sinkattn.evaluate.statistics import perplexity

    return perplexity(mean["loss"] - mean["margin"]), perplexity(mean["loss"] + mean["margin"])


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw perplexity, memory and time by stretch, each beside the paper's claim."""
    figure.set_size_inches(12, 4.2)
    stretches, colour = report["stretches"], COLOURS["sinkattn"]
    ends = [each["end"] for each in stretches]
    perplexities, memory, times = figure.subplots(1, 3)
    known = [each for each in stretches if each["margin"] is not None]
    middles = [(each["begin"] + each["end"]) / 2 for each in stretches]
    perplexities.plot(middles, [each["perplexity"] for each in stretches], ".-", color=colour)
    perplexities.fill_between(
        [(each["begin"] + each["end"]) / 2 for each in known],
        *([_interval(each)[side] for each in known] for side in (0, 1)),
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    memory.plot(ends, [each["resident_bytes"] / 2**20 for each in stretches], ".-", color="black", label="process")
    memory.plot(ends, [each["kv_cache_bytes"] / 2**20 for each in stretches], ".-", color=colour, label="KV cache")
    memory.legend(frameon=False)
    timed = [each for each in stretches if each["seconds_per_token"] is not None]
    times.plot(
        [each["begin"] for each in timed], [each["seconds_per_token"] * 1e3 for each in timed], ".-", color=colour
    )
    perplexities.set_title("Perplexity, 95 % interval\n(the paper, figure 5: stable over 4 million tokens)")
    memory.set_title("Memory\n(the paper: the cache does not grow)")
    times.set_title("Time per token\n(the paper: does not grow)")
    for axes, unit in ((perplexities, "perplexity"), (memory, "MiB"), (times, "ms")):
        axes.set(xlabel="token of the stream", ylabel=unit, ylim=(0, 1.1 * axes.get_ylim()[1]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4)
    finish(figure, [perplexities, memory, times], legend=False)
