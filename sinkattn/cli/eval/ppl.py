"""``sinkattn eval ppl``: loss and perplexity along a stream, for all methods."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, count, describe_text, positive
from sinkattn.cli.budget import SHARES, add_minutes, choose, stream_length
from sinkattn.cli.eval.arguments import add_cache_dtypes, add_caches, add_outputs, add_text
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, count_text, restart_lines, size_text
from sinkattn.cli.pictures import finish, merge_buckets, styles, vertical_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.methods import CacheSize
    from sinkattn.evaluate.perplexity import Result, Settings, Track

TOKENS = 50_000
DENSE_TOKENS = 5_000
RECOMPUTE_EVERY = 16
# Recomputation is scored at so many tokens, or at every 16th.
MIN_RECOMPUTED = 8


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "ppl", run, "loss along a stream, by method and cache size")
    add_model(parser)
    add_text(parser)
    add_caches(parser)
    add_cache_dtypes(parser)
    parser.add_argument("--tokens", type=positive, help=f"length of the stream (default: up to {TOKENS})")
    parser.add_argument(
        "--dense-tokens",
        type=count,
        metavar="N",
        help=f"stop the dense model after N tokens; 0: leave it out "
        f"(default: up to {DENSE_TOKENS}, or twice the widest cache)",
    )
    parser.add_argument(
        "--recompute-every",
        type=count,
        metavar="N",
        help=f"score recomputation at every Nth token; 0: leave it out (default: {RECOMPUTE_EVERY} or more)",
    )
    add_minutes(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="CSV file to write the losses along the stream to")
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args, args.csv) as session:
        from sinkattn.evaluate import perplexity

        stream = session.stream()
        caches = session.caches((0, 1, 4))
        settings = choose(_candidates(args, caches), lambda each: each.seconds(session.speed), args.minutes)
        with session.progress as progress:
            bar = progress.add("tokens", settings.tokens)

            def on_progress(done: int, tracks: list[Track]) -> None:
                losses = ((track.method.name, track.all.mean()) for track in tracks)
                bar(done, "  ".join(f"{name} {mean.loss:.3f}" for name, mean in losses if mean))

            result = perplexity.run(session.model, stream, settings, on_progress)
        report = {**as_dict(result), "text": describe_text(stream, stream.restarts)}
        session.finish(report, table(report), draw)
        if args.csv:
            write_csv(report, args.csv)
    return 0


def _candidates(args: argparse.Namespace, caches: tuple[CacheSize, ...]) -> Iterator[Settings]:
    """What is given stays; for slow models the stream is shorter, and recomputation is scored more rarely."""
    from sinkattn.evaluate.perplexity import Settings

    begin = max(cache.total for cache in caches)
    for share in SHARES:
        tokens = args.tokens or stream_length(TOKENS, share, begin)
        dense = max(round(DENSE_TOKENS * share), 2 * begin) if args.dense_tokens is None else args.dense_tokens
        every = args.recompute_every
        if every is None:
            most = (tokens - begin) // MIN_RECOMPUTED
            every = max(RECOMPUTE_EVERY, min(round(RECOMPUTE_EVERY / share), most))
        yield Settings(caches, tokens, min(dense, tokens), every, tuple(dict.fromkeys(args.cache_dtype)))


def as_dict(result: Result) -> dict[str, Any]:
    """The report of a result. Losses are in nats, times in seconds, memory in bytes."""
    settings = result.settings
    return {
        "settings": {
            "caches": [str(cache) for cache in settings.caches],
            "cache_dtypes": [*settings.cache_dtypes],
            "tokens": settings.tokens,
            "counted_from": settings.begin,
            "dense_tokens": settings.dense_tokens and settings.dense_end,
            "recompute_every": settings.recompute_every,
            "timed_tokens": result.rounds,
        },
        "methods": {track.method.name: _track_dict(result, track) for track in result.tracks},
    }


def _track_dict(result: Result, track: Track) -> dict[str, Any]:
    from sinkattn.cli.eval.labels import label

    recomputed = result.recomputed(track)
    difference = recomputed and track.sampled.difference(recomputed.sampled)
    whole, divergence = result.whole(track), track.divergences.mean()
    from_whole = whole and track.all.difference(whole.all)
    means = {"early": track.early.mean(), "all": track.all.mean(), "sampled": track.sampled.mean()}
    return {
        "label": label(track.method),
        "end": track.end,
        **{name: mean and mean.as_dict() for name, mean in means.items()},
        "minus_recomputed": difference and asdict(difference),
        "minus_full_precision": from_whole and asdict(from_whole),
        "divergence": divergence and {"nats": divergence.loss, "margin": divergence.margin},
        "seconds_per_token": track.seconds,
        "kv_cache_bytes": track.kv_bytes,
        "series": _buckets(track.series.means()),
        "estimated_series": _buckets(result.estimates(track)),
    }


def _buckets(means: list[tuple[int, int, int, float]]) -> list[dict[str, Any]]:
    return [{"begin": begin, "end": end, "tokens": tokens, "loss": loss} for begin, end, tokens, loss in means]


def table(report: dict[str, Any]) -> Table:
    """One row for each method; the values of a column are over the same tokens."""
    settings, methods = report["settings"], report["methods"]
    begin, tokens, every = settings["counted_from"], settings["tokens"], settings["recompute_every"]
    dense = settings["dense_tokens"]
    out = captioned_table()
    out.add_column("method")
    columns = {}
    if dense and dense < tokens:
        columns["early"] = f"perplexity,\n{begin:,} to {dense - 1:,}"
    columns["all"] = f"loss, perplexity,\ntokens {begin:,} to {tokens - 1:,}"
    if every:
        columns["sampled"] = f"perplexity, at\none in {every}"
        columns["ratio"] = "perplexity /\nrecomputed"
    if settings["cache_dtypes"]:
        columns["whole"] = "perplexity /\nfull precision"
        columns["divergence"] = "KL from full\nprecision, nats"
    columns |= {"ms": "ms per\ntoken", "bytes": "KV cache\nat the end"}
    for header in columns.values():
        out.add_column(header, justify="right")
    for name, method in methods.items():
        whole, sampled = method["end"] == tokens, name.startswith("recomputed")
        cells = {
            "early": "" if sampled else _perplexity_text(method["early"]),
            "all": "" if sampled else _mean_text(method["all"]) if whole else "not reached",
            "sampled": _perplexity_text(method["sampled"]) if whole and every else "",
            "ratio": _ratio_text(method["minus_recomputed"]),
            "whole": _ratio_text(method["minus_full_precision"]),
            "divergence": _divergence_text(method["divergence"]),
            "ms": f"{method['seconds_per_token'] * 1e3:.2f}" if settings["timed_tokens"] else "not timed",
            "bytes": "none" if method["kv_cache_bytes"] is None else size_text(method["kv_cache_bytes"]),
        }
        out.add_row(method["label"], *(cells[column] for column in columns))
    lines = ["± and brackets are 95 % confidence intervals, from means over blocks of the stream."]
    if every or settings["cache_dtypes"]:
        lines.append("Ratios are over the same tokens on both sides.")
    end = "; dense at its own end" if dense else ""
    if timed := settings["timed_tokens"]:
        lines.append(f"Times are medians of {count_text(timed, 'token')} taken in turns at the end of the stream{end}.")
    out.caption = "\n".join(lines + restart_lines(report["text"]))
    return out


def _perplexity_text(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return ""
    return f"{mean['perplexity']:.{2 if mean['perplexity'] < 100 else 0}f}"


def _mean_text(mean: dict[str, Any]) -> str:
    margin = "" if mean["margin"] is None else f" ± {mean['margin']:.3f}"
    return f"{mean['loss']:.3f}{margin}, {_perplexity_text(mean)}"


def _ratio_text(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    loss, margin = difference["loss"], difference["margin"]
    if margin is None:
        return f"{math.exp(loss):.4f}"
    return f"{math.exp(loss):.4f} ({math.exp(loss - margin):.4f} to {math.exp(loss + margin):.4f})"


def _divergence_text(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return ""
    return f"{mean['nats']:.1e}" + ("" if mean["margin"] is None else f" ± {mean['margin']:.0e}")


def write_csv(report: dict[str, Any], path: Path) -> None:
    """Write the losses along the stream, one row for each method and bucket."""
    from sinkattn.evaluate.statistics import perplexity

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "begin", "end", "tokens", "loss", "perplexity"])
        for name, method in report["methods"].items():
            for each in method["series"]:
                row = [name, each["begin"], each["end"], each["tokens"], each["loss"], perplexity(each["loss"])]
                writer.writerow(row)


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw the losses along the stream."""
    figure.set_size_inches(9, 4.8)
    axes = figure.subplots()
    settings = report["settings"]
    for name, style in styles(report["methods"]).items():
        method = report["methods"][name]
        axes.plot(*merge_buckets(method["estimated_series"] or method["series"], "loss"), **style)
    marks = {"widest window full": settings["counted_from"], "trained length": report["model"]["trained_length"]}
    vertical_lines(axes, marks, settings["tokens"])
    axes.set(xscale="log", xlabel="token of the stream", ylabel="loss, nats per token")
    axes.set_xlim(min(50, settings["tokens"] / 10), settings["tokens"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Loss along the stream")
    finish(figure, [axes])
