"""What an evaluation found: as a dictionary of plain types for programs, and as a table for people.

Tables and pictures are made from the dictionaries, so that a figures file can be drawn again.
"""

from __future__ import annotations

import csv
import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from sinkattn.evaluate.exact_match import Tally
from sinkattn.evaluate.latency import Cost
from sinkattn.evaluate.methods import CacheSize, Dense, Predictor, Recomputed, Streamed
from sinkattn.evaluate.perplexity import Result, Track
from sinkattn.evaluate.statistics import perplexity
from sinkattn.report import count_text, laps_lines, size_text


def label(predictor: Predictor) -> str:
    """Name of a method for a reader."""
    if isinstance(predictor, Streamed):
        return f"{predictor.size} sinks + window" if predictor.size.num_sinks else f"{predictor.size} window alone"
    if isinstance(predictor, Recomputed):
        return f"{predictor.size} tokens, recomputed"
    return "dense, cache grows" if isinstance(predictor, Dense) else "one question at a time"


# Perplexity


def perplexity_dict(result: Result) -> dict[str, Any]:
    """Losses in nats, times in seconds, memory in bytes."""
    settings = result.settings
    return {
        "settings": {
            "caches": [str(cache) for cache in settings.caches],
            "tokens": settings.tokens,
            "counted_from": settings.begin,
            "dense_tokens": settings.dense_tokens and settings.dense_end,
            "recompute_every": settings.recompute_every,
        },
        "methods": {track.method.name: _track_dict(result, track) for track in result.tracks},
    }


def _track_dict(result: Result, track: Track) -> dict[str, Any]:
    other = result.recomputed(track)
    against = other and track.sampled.difference(other.sampled)
    means = {name: getattr(track, name).mean() for name in ("early", "all", "sampled")}
    return {
        "label": label(track.method),
        "end": track.end,
        **{name: mean and mean.as_dict() for name, mean in means.items()},
        "minus_recomputed": against and asdict(against),
        "seconds_per_token": track.seconds,
        "kv_cache_bytes": track.kv_bytes,
        "series": [
            {"begin": begin, "end": end, "tokens": tokens, "loss": loss}
            for begin, end, tokens, loss in track.series.means()
        ],
    }


def perplexity_table(figures: dict[str, Any]) -> Table:
    """One row for each method; figures in a column are of the same tokens."""
    settings, methods = figures["settings"], figures["methods"]
    begin, tokens, every = settings["counted_from"], settings["tokens"], settings["recompute_every"]
    dense = settings["dense_tokens"]
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    out.add_column("method")
    columns = {}
    if dense and dense < tokens:
        columns["early"] = f"perplexity,\n{begin:,} to {dense - 1:,}"
    columns["all"] = f"loss, perplexity,\ntokens {begin:,} to {tokens - 1:,}"
    if every:
        columns["sampled"] = f"perplexity, at\none in {every}"
        columns["ratio"] = "perplexity /\nrecomputed"
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
            "ms": f"{method['seconds_per_token'] * 1e3:.2f}",
            "bytes": "none" if method["kv_cache_bytes"] is None else size_text(method["kv_cache_bytes"]),
        }
        out.add_row(method["label"], *(cells[column] for column in columns))
    lines = ["± and brackets are 95 % confidence intervals, from means over blocks of the stream."]
    if every:
        lines.append("Ratios are over the same tokens on both sides.")
    end = "; dense at its own end" if dense else ""
    lines.append(f"Times are medians of tokens taken in turns at the end of the stream{end}.")
    out.caption = "\n".join(lines + laps_lines(figures["text"]))
    return out


def _perplexity_text(mean: dict[str, Any]) -> str:
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


def write_csv(figures: dict[str, Any], path: Path) -> None:
    """The losses along the stream, one row for each method and stretch."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "begin", "end", "tokens", "loss", "perplexity"])
        for name, method in figures["methods"].items():
            for each in method["series"]:
                row = [name, each["begin"], each["end"], each["tokens"], each["loss"], perplexity(each["loss"])]
                writer.writerow(row)


# Questions


def streameval_dict(
    args: Namespace, predictors: list[Predictor], tallies: dict[int, tuple[list[Tally], int]]
) -> dict[str, Any]:
    """Accuracy by method and distance."""
    return {
        "settings": {"distances": args.distances, "every": args.every, "count": args.count, "seed": args.seed},
        "stream_tokens": {distance: tokens for distance, (_, tokens) in tallies.items()},
        "methods": {
            predictor.name: {
                "label": label(predictor),
                "by_distance": {distance: each[place].as_dict() for distance, (each, _) in tallies.items()},
            }
            for place, predictor in enumerate(predictors)
        },
    }


def streameval_table(figures: dict[str, Any]) -> Table:
    """One row for each distance, one column for each method."""
    settings = figures["settings"]
    methods = figures["methods"].values()
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    for header in ("lines back", "tokens back,\nabout", "tokens of\nthe stream"):
        out.add_column(header, justify="right")
    for method in methods:
        out.add_column(f"{method['label']}\nright (last quarter)", justify="right")
    for distance, tokens in figures["stream_tokens"].items():
        cells = [_accuracy_text(method["by_distance"][distance]) for method in methods]
        back = distance * tokens / (settings["count"] * settings["every"])
        out.add_row(f"{distance}", f"{back:.0f}", f"{tokens:,}", *cells)
    out.caption = (
        f"{settings['count']:,} questions for each distance, one every {settings['every']} lines. "
        "In brackets, the last quarter of the stream.\n"
        "What stands further back than a window reaches cannot be known: there 0 % is right."
    )
    return out


def _accuracy_text(tally: dict[str, Any]) -> str:
    return f"{tally['accuracy']:.1%} ({_share_text(tally['accuracy_by_quarter'][-1])})"


def _share_text(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def stream_qa_dict(args: Namespace, predictors: list[Predictor], tallies: list[Tally], tokens: int) -> dict[str, Any]:
    """Accuracy by method."""
    return {
        "questions": None if args.questions is None else args.questions.name,
        "stream_tokens": tokens,
        "methods": {
            predictor.name: {"label": label(predictor), **tally.as_dict()}
            for predictor, tally in zip(predictors, tallies, strict=True)
        },
    }


def stream_qa_table(figures: dict[str, Any]) -> Table:
    """One row for each method."""
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    for name in ("method", "right answers", "95 % interval", "by quarter of the stream"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for method in figures["methods"].values():
        quarters = "  ".join(map(_share_text, method["accuracy_by_quarter"]))
        interval = f"{method['low']:.1%} to {method['high']:.1%}"
        out.add_row(method["label"], f"{method['accuracy']:.1%}", interval, quarters)
    asked = max(method["questions"] for method in figures["methods"].values())
    out.caption = f"{asked:,} questions, a stream of {figures['stream_tokens']:,} tokens."
    return out


# Latency


def latency_dict(by_window: list[Cost], by_length: list[Cost], cache: CacheSize, rounds: int) -> dict[str, Any]:
    """Times in seconds, memory in bytes."""
    return {
        "settings": {"rounds": rounds, "cache_of_lengths": str(cache)},
        "by_window": [asdict(cost) for cost in by_window],
        "by_length": [asdict(cost) for cost in by_length],
    }


def latency_table(figures: dict[str, Any]) -> Table:
    """One row for each size and each length."""
    methods = ("sinkattn", "dense", "recomputed")
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    out.add_column("")
    for name in methods:
        out.add_column(f"{name}\nms per token", justify="right")
    out.add_column("recomputed /\nsinkattn", justify="right")
    out.add_column("KV cache,\nsinkattn", justify="right")
    out.add_column("KV cache,\ndense", justify="right")
    cache = figures["settings"]["cache_of_lengths"]
    for kind, key, text in (
        ("by_window", "size", "{:,} tokens in sight"),
        ("by_length", "seen", f"{{:,}} tokens seen, cache of {cache}"),
    ):
        for value in dict.fromkeys(cost[key] for cost in figures[kind]):
            costs = {cost["method"]: cost for cost in figures[kind] if cost[key] == value}
            ms = [f"{costs[name]['seconds'] * 1e3:.2f}" if name in costs else "" for name in methods]
            ratio = ""
            if "recomputed" in costs:
                ratio = f"{costs['recomputed']['seconds'] / costs['sinkattn']['seconds']:.1f}"
            kept = [size_text(costs[name]["kv_bytes"]) if name in costs else "" for name in methods[:2]]
            out.add_row(text.format(value), *ms, ratio, *kept)
        out.add_section()
    out.caption = f"Medians of {figures['settings']['rounds']} tokens, the methods in turns."
    return out


# Sinks


def sinks_table(figures: dict[str, Any]) -> Table:
    """One row for each beginning of the stream, one column for each number of sinks."""
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    out.add_column("the stream\nbegins with")
    beginnings = figures["beginnings"]
    none, *counts = next(iter(beginnings.values()))["losses"]
    out.add_column("no sinks\nloss", justify="right")
    for count in counts:
        out.add_column(f"{count_text(int(count), 'sink')}\nless by", justify="right")
    for name, each in beginnings.items():
        gains = [_margin_text(-each["gains"][count]["loss"], each["gains"][count]["margin"]) for count in counts]
        out.add_row(name, _margin_text(each["losses"][none]["loss"], each["losses"][none]["margin"]), *gains)
    lines = [figures["verdict"], f"Recommended: num_sinks={figures['recommended_num_sinks']}."]
    mass = figures["attention_on_first_tokens"]
    if mass is None:
        lines.append("This model does not tell its attention.")
    else:
        tokens = figures["attention_tokens"]
        heads = [(weight, layer, head) for layer, rows in enumerate(mass) for head, weight in enumerate(rows[0])]
        most = ", ".join(f"{weight:.2f} (layer {layer}, head {head})" for weight, layer, head in sorted(heads)[:-5:-1])
        lines.append(
            f"Attention on the first token, in the second half of {tokens} tokens, where even attention would be "
            f"{2 * math.log(2) / tokens:.3f}: {most}"
        )
    out.caption = "\n".join(lines + laps_lines(figures["text"]))
    return out


def _margin_text(loss: float, margin: float | None) -> str:
    return f"{loss:.3f}" + ("" if margin is None else f" ± {margin:.3f}")
