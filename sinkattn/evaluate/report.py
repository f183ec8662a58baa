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
from sinkattn.report import size_text


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
    """One row for each method."""
    settings = figures["settings"]
    begin, dense, tokens = settings["counted_from"], settings["dense_tokens"], settings["tokens"]
    out = Table(header_style="bold", caption_justify="left", caption_style="")
    out.add_column("method")
    if dense and dense < tokens:
        out.add_column(f"loss, perplexity\ntokens {begin:,} to {dense - 1:,}", justify="right")
    out.add_column(f"loss, perplexity\ntokens {begin:,} to {tokens - 1:,}", justify="right")
    out.add_column("perplexity /\nrecomputed", justify="right")
    out.add_column("ms per token\nat the end", justify="right")
    out.add_column("KV cache\nat the end", justify="right")
    for method in figures["methods"].values():
        means = [method["early"], method["all"]] if dense and dense < tokens else [method["all"]]
        if method["end"] < tokens:
            means[-1] = None
        cells = [_mean_text(mean) if mean else "not reached" for mean in means]
        bytes_text = "none" if method["kv_cache_bytes"] is None else size_text(method["kv_cache_bytes"])
        ms = f"{method['seconds_per_token'] * 1e3:.2f}"
        out.add_row(method["label"], *cells, _ratio_text(method["minus_recomputed"]), ms, bytes_text)
    lines = ["± is half a 95 % confidence interval, from means over blocks of the stream."]
    if every := settings["recompute_every"]:
        lines.append(f"Recomputation is scored at one token in {every}; ratios are over the same tokens on both sides.")
    lines.append("Times are medians of tokens taken in turns at the end of the stream; dense at its own end.")
    out.caption = "\n".join(lines)
    return out


def _mean_text(mean: dict[str, Any]) -> str:
    margin = "" if mean["margin"] is None else f" ± {mean['margin']:.3f}"
    perplexity = mean["perplexity"]
    return f"{mean['loss']:.3f}{margin}, {perplexity:.{2 if perplexity < 100 else 0}f}"


def _ratio_text(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    ratio = math.exp(difference["loss"])
    return f"{ratio:.4f}" + ("" if difference["margin"] is None else f" ± {ratio * difference['margin']:.4f}")


def write_csv(figures: dict[str, Any], path: Path) -> None:
    """The losses along the stream, one row for each method and stretch."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "begin", "end", "tokens", "loss", "perplexity"])
        for name, method in figures["methods"].items():
            for each in method["series"]:
                perplexity = math.exp(min(each["loss"], 700))
                writer.writerow([name, each["begin"], each["end"], each["tokens"], each["loss"], perplexity])


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
    out.add_column("lines back", justify="right")
    out.add_column("tokens of\nthe stream", justify="right")
    for method in methods:
        out.add_column(f"{method['label']}\nright (last quarter)", justify="right")
    for distance, tokens in figures["stream_tokens"].items():
        cells = [_accuracy_text(method["by_distance"][distance]) for method in methods]
        out.add_row(f"{distance}", f"{tokens:,}", *cells)
    out.caption = (
        f"{settings['count']:,} questions for each distance, one every {settings['every']} lines. "
        "In brackets, the last quarter of the stream."
    )
    return out


def _accuracy_text(tally: dict[str, Any]) -> str:
    return f"{tally['accuracy']:.1%} ({tally['accuracy_by_quarter'][-1]:.1%})"


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
        quarters = "  ".join(f"{accuracy:.1%}" for accuracy in method["accuracy_by_quarter"])
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
    out.add_column("KV cache\nsinkattn", justify="right")
    out.add_column("\ndense", justify="right")
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
    out.add_column("the stream begins with")
    beginnings = figures["beginnings"]
    counts = list(next(iter(beginnings.values()))["losses"])
    for count in counts:
        out.add_column(f"{count} sinks\nloss", justify="right")
    for name, each in beginnings.items():
        out.add_row(name, *(_loss_text(each["losses"][count]) for count in counts))
    lines = [figures["verdict"], f"Recommended: num_sinks={figures['recommended_num_sinks']}."]
    mass = figures["attention_on_first_tokens"]
    if mass is None:
        lines.append("This model does not tell its attention.")
    else:
        heads = [(weight, layer, head) for layer, row in enumerate(mass[0]) for head, weight in enumerate(row)]
        strongest = ", ".join(
            f"{weight:.2f} (layer {layer}, head {head})" for weight, layer, head in sorted(heads)[:-6:-1]
        )
        lines.append(f"Attention on the first token, in the second half of {figures['cache']} tokens: {strongest}")
    out.caption = "\n".join(lines)
    return out


def _loss_text(mean: dict[str, Any]) -> str:
    return f"{mean['loss']:.3f}" + ("" if mean["margin"] is None else f" ± {mean['margin']:.3f}")
