"""``sinkattn eval latency``: time and memory per token, by window and along a stream."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, add_num_sinks, positive
from sinkattn.cli.eval.arguments import add_outputs
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, size_text
from sinkattn.cli.pictures import COLOURS, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.latency import Cost
    from sinkattn.evaluate.methods import CacheSize


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "latency", run, "time and memory of a token, by window and by length")
    add_model(parser)
    add_num_sinks(parser)
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
        default=[500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="tokens of a stream, for the largest size and dense attention (default: 500 1000 2000 4000 8000)",
    )
    parser.add_argument("--rounds", type=positive, default=50, help="tokens timed in each case (default: 50)")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import latency
        from sinkattn.evaluate.methods import CacheSize

        sizes = sorted(set(args.sizes or session.sizes(args.num_sinks)))
        lengths = sorted(set(args.lengths))
        with session.progress as progress:
            bar = progress.add("window", len(sizes))
            by_window = latency.by_window(
                session.model, args.num_sinks, sizes, args.rounds, lambda done, total: bar(done)
            )
            bar = progress.add("length", len(lengths))
            cache = CacheSize(args.num_sinks, sizes[-1] - args.num_sinks)
            by_length = latency.by_length(session.model, cache, lengths, args.rounds, lambda done, total: bar(done))
        report = as_dict(by_window, by_length, cache, args.rounds)
        session.finish(report, table(report), draw)
    return 0


def as_dict(by_window: list[Cost], by_length: list[Cost], cache: CacheSize, rounds: int) -> dict[str, Any]:
    """The report. Times are in seconds, memory in bytes."""
    return {
        "settings": {"rounds": rounds, "cache_of_lengths": str(cache)},
        "by_window": [asdict(cost) for cost in by_window],
        "by_length": [asdict(cost) for cost in by_length],
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each size and each length."""
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
            ms = [f"{costs[name]['seconds'] * 1e3:.2f}" if name in costs else "" for name in methods]
            ratio = ""
            if "recomputed" in costs:
                ratio = f"{costs['recomputed']['seconds'] / costs['sinkattn']['seconds']:.1f}"
            sizes = [size_text(costs[name]["kv_bytes"]) if name in costs else "" for name in methods[:2]]
            out.add_row(text.format(value), *ms, ratio, *sizes)
        out.add_section()
    out.caption = f"Medians of {report['settings']['rounds']} tokens, the methods in turns."
    return out


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw time and memory, by window and along the stream."""
    figure.set_size_inches(11, 7)
    names = {"sinkattn": "sinkattn", "dense": "dense", "recomputed": "recompute"}
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
            values = [cost[key] for cost in costs]
            time.plot(values, [cost["seconds"] * 1e3 for cost in costs], **style)
            if costs[0]["kv_bytes"] is not None:
                memory.plot(values, [cost["kv_bytes"] / 2**20 for cost in costs], **style)
        for axes, unit, title in ((time, "ms per token", "Time"), (memory, "MiB", "KV cache")):
            axes.set(xscale="log", xlabel=text, ylabel=unit, ylim=(0, None))
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
            axes.set_title(f"{title}, {'by window' if kind == 'by_window' else 'along a stream'}")
    finish(figure, [*panels.flat])
