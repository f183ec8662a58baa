"""``sinkattn eval latency``: time and memory per token, by window and along a stream."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, add_num_sinks, positive
from sinkattn.cli.budget import SHARES, add_minutes, choose
from sinkattn.cli.eval.arguments import add_cache_dtypes, add_outputs
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, range_text, size_text
from sinkattn.cli.pictures import COLOURS, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.latency import Cost, Settings
    from sinkattn.evaluate.methods import CacheSize

LENGTHS = (500, 1000, 2000, 4000, 8000)
ROUNDS = 50
# Time for a case if the rounds are not given.
CASE_SECONDS = 5.0


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "latency", run, "time and memory of a token, by window and by length")
    add_model(parser)
    add_num_sinks(parser)
    add_cache_dtypes(parser)
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        metavar="N",
        help="sinks and window together (default: depends on the model)",
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="N",
        help="tokens of a stream, for the largest size and dense attention (default: up to 500 1000 2000 4000 8000)",
    )
    parser.add_argument("--rounds", type=positive, help="tokens timed in each case (default: 50 within 5 seconds)")
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import latency
        from sinkattn.evaluate.methods import CacheSize

        sizes = session.sizes(args.num_sinks)
        settings = choose(_candidates(args, sizes), lambda each: each.seconds(session.speed), args.minutes)
        with session.progress as progress:
            bar = progress.add("window", len(settings.sizes))
            by_window = latency.by_window(session.model, args.num_sinks, settings, lambda done, total: bar(done))
            bar = progress.add("length", len(settings.lengths))
            cache = CacheSize(args.num_sinks, settings.sizes[-1] - args.num_sinks)
            by_length = latency.by_length(session.model, cache, settings, lambda done, total: bar(done))
        report = as_dict(by_window, by_length, cache, settings.rounds)
        session.finish(report, table(report), draw)
    return 0


def _candidates(args: argparse.Namespace, sizes: list[int]) -> Iterator[Settings]:
    """``sizes`` are the default ones. What is given stays; for slow models the largest of the others are left out."""
    from sinkattn.evaluate.latency import Settings

    for share in SHARES:
        chosen = args.sizes or [size for size in sizes if size <= share * sizes[-1]] or sizes[:1]
        lengths = args.lengths or [length for length in LENGTHS if length <= share * LENGTHS[-1]] or LENGTHS[:1]
        rounds, seconds = (args.rounds, math.inf) if args.rounds else (ROUNDS, CASE_SECONDS)
        cache_dtypes = tuple(dict.fromkeys(args.cache_dtype))
        yield Settings(tuple(sorted({*chosen})), tuple(sorted({*lengths})), rounds, seconds, cache_dtypes)


def as_dict(by_window: list[Cost], by_length: list[Cost], cache: CacheSize, rounds: int) -> dict[str, Any]:
    """The report. Times are in seconds, memory in bytes."""
    return {
        "settings": {"rounds": rounds, "cache_of_lengths": str(cache)},
        "by_window": [asdict(cost) for cost in by_window],
        "by_length": [asdict(cost) for cost in by_length],
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each size and each length, and one more for each dtype of 8 bits."""
    methods = ("sinkattn", "dense", "recomputed")
    out = captioned_table()
    out.add_column("")
    for name in methods:
        out.add_column(f"{name}\nms per token", justify="right")
    out.add_column("recomputed /\nsinkattn", justify="right")
    out.add_column("KV cache,\nsinkattn", justify="right")
    out.add_column("KV cache,\ndense", justify="right")
    cache = report["settings"]["cache_of_lengths"]
    for kind, key, text in (
        ("by_window", "size", "{:,} tokens in sight"),
        ("by_length", "seen", f"{{:,}} tokens seen, cache of {cache}"),
    ):
        for value in dict.fromkeys(cost[key] for cost in report[kind]):
            costs = {cost["method"]: cost for cost in report[kind] if cost[key] == value}
            ms = [_ms_text(costs[name]) if name in costs else "" for name in methods]
            ratio = ""
            if "recomputed" in costs:
                ratio = f"{costs['recomputed']['seconds'] / costs['sinkattn']['seconds']:.1f}"
            sizes = [size_text(costs[name]["kv_bytes"]) if name in costs else "" for name in methods[:2]]
            out.add_row(text.format(value), *ms, ratio, *sizes)
            for name in _streamed(report)[1:]:
                kept = size_text(costs[name]["kv_bytes"])
                out.add_row(f"    {name.split()[1]}", _ms_text(costs[name]), "", "", "", kept, "")
        out.add_section()
    rounds = range_text((cost["rounds"] for kind in ("by_window", "by_length") for cost in report[kind]), "token")
    out.caption = f"Medians of {rounds}, the methods in turns."
    return out


def _streamed(report: dict[str, Any]) -> list[str]:
    """Names of sinkattn: in full precision, then with each dtype of 8 bits."""
    methods = dict.fromkeys(cost["method"] for kind in ("by_window", "by_length") for cost in report[kind])
    return [name for name in methods if name.startswith("sinkattn")]


def _ms_text(cost: dict[str, Any]) -> str:
    return f"{cost['seconds'] * 1e3:.2f}"


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw time and memory, by window and along the stream."""
    figure.set_size_inches(11, 7)
    names = {**dict.fromkeys(_streamed(report), "sinkattn"), "dense": "dense", "recomputed": "recompute"}
    panels = figure.subplots(2, 2)
    kinds = (("by_window", "size", "tokens in sight"), ("by_length", "seen", "tokens of the stream so far"))
    for column, (kind, key, text) in enumerate(kinds):
        time, memory = panels[:, column]
        for name, colour in names.items():
            costs = [cost for cost in report[kind] if cost["method"] == name]
            if not costs:
                continue
            width = 3.2 if name == "sinkattn" else 1.4  # stays visible under another line
            style = {"color": COLOURS[colour], "marker": "o", "markersize": 4, "linewidth": width, "label": name}
            if name.startswith("sinkattn "):  # of 8 bits
                style |= {"linestyle": "--", "marker": "^" if name.endswith("fp8") else "s"}
            values = [cost[key] for cost in costs]
            time.plot(values, [cost["seconds"] * 1e3 for cost in costs], **style)
            if costs[0]["kv_bytes"] is not None:
                memory.plot(values, [cost["kv_bytes"] / 2**20 for cost in costs], **style)
        for axes, unit, title in ((time, "ms per token", "Time"), (memory, "MiB", "KV cache")):
            axes.set(xscale="log", xlabel=text, ylabel=unit, ylim=(0, None))
            ticks = sorted({cost[key] for cost in report[kind]})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(f"{title}, {'by window' if kind == 'by_window' else 'along a stream'}")
    finish(figure, [*panels.flat])
