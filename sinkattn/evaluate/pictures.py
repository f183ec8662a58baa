"""Pictures of evaluations, drawn from the figures that are written as JSON."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from sinkattn.plots import COLOURS, merged
from sinkattn.user_errors import require

SINKS = ("#0072b2", "#56b4e9", "#332288", "#88ccee", "#004488")
WINDOW = COLOURS["window"]
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the picture of an evaluation's figures to a file; its ending says which format.

    Raises:
        UserError: if matplotlib is missing.
        OSError, ValueError: a file that cannot be written, or a format that matplotlib does not know.
    """
    figure = require("matplotlib.figure").Figure(layout="constrained")
    PICTURES[figures["evaluation"]](figure, figures)
    text = f", {figures['text']['description']}" if "text" in figures else ""
    figure.suptitle(f"sinkattn eval {figures['evaluation']}: {figures['model']['name']}{text}", fontsize=10)
    figure.savefig(path, dpi=150)


def styles(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How to draw each method: blues for sinks, fixed colours for others, and nothing hidden where lines coincide."""
    fixed = {"dense": COLOURS["dense"], "recomputed": COLOURS["recompute"], "one-shot": COLOURS["dense"]}
    totals = sorted({total for name in methods if (total := _total(name))})
    counts = sorted({int(name.split("+")[0]) for name in methods if "+" in name})
    chosen = {}
    for name, method in methods.items():
        word, place = name.split()[0], totals.index(_total(name)) if _total(name) else 0
        if word in fixed:
            chosen[name] = {"color": fixed[word], "linewidth": 1.8}
        else:
            rank = counts.index(int(name.split("+")[0]))
            colour = WINDOW if word.startswith("0+") else SINKS[rank % len(SINKS)]
            chosen[name] = {
                "color": colour,
                "linewidth": max(1.0, 3.0 - 0.7 * rank),
                "linestyle": LINES[place % len(LINES)],
            }
        if word == "recomputed":
            marker = MARKERS[place % len(MARKERS)]
            chosen[name] |= {"linestyle": "", "marker": marker, "markersize": 8, "markerfacecolor": "none"}
        chosen[name]["label"] = method["label"]
    return chosen


def _total(name: str) -> int | None:
    """Tokens in sight of a method, by its name."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return sum(numbers) if numbers else None


def _perplexity(figure: Any, figures: dict[str, Any]) -> None:
    figure.set_size_inches(9, 4.8)
    axes = figure.subplots()
    settings = figures["settings"]
    for name, style in styles(figures["methods"]).items():
        axes.plot(*merged(figures["methods"][name]["series"], "loss"), **style)
    places = {"widest window full": settings["counted_from"], "trained length": figures["model"]["trained_length"]}
    for text, place in places.items():
        if place is not None and place < settings["tokens"]:
            axes.axvline(place, color="black", linewidth=0.8, linestyle=":", zorder=0)
            at = ("data", "axes fraction")
            axes.annotate(text, (place, 0.02), (-2, 0), at, "offset points", rotation=90, fontsize=7.5, ha="right")
    axes.set(xscale="log", xlabel="token of the stream", ylabel="loss, nats per token")
    axes.set_xlim(min(50, settings["tokens"] / 10), settings["tokens"])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Loss along the stream")
    _finish(figure, [axes])


def _streameval(figure: Any, figures: dict[str, Any]) -> None:
    figure.set_size_inches(11, 4.4)
    by_distance, by_quarter = figure.subplots(1, 2, sharey=True)
    inside = _farthest_known(figures)
    for name, style in styles(figures["methods"]).items():
        style = {"marker": "o", "markersize": 3, **style}
        tallies = figures["methods"][name]["by_distance"]
        distances = [int(distance) for distance in tallies]
        middles = [100 * tally["accuracy"] for tally in tallies.values()]
        spread = [
            [max(0.0, 100 * (tally["accuracy"] - tally["low"])) for tally in tallies.values()],
            [max(0.0, 100 * (tally["high"] - tally["accuracy"])) for tally in tallies.values()],
        ]
        by_distance.errorbar(distances, middles, spread, **style)
        quarters = tallies[inside]["accuracy_by_quarter"]
        by_quarter.plot([1, 2, 3, 4], [math.nan if share is None else 100 * share for share in quarters], **style)
    by_distance.set(xlabel="lines back", ylabel="right answers, %", ylim=(-3, 103), xscale="log")
    by_distance.set_xticks(distances, [str(distance) for distance in distances])
    by_distance.minorticks_off()
    by_distance.set_title("By distance")
    by_quarter.set(xlabel="quarter of the stream", xticks=[1, 2, 3, 4])
    by_quarter.set_title(f"Along the stream, {inside} lines back")
    _finish(figure, [by_distance, by_quarter])


def _farthest_known(figures: dict[str, Any]) -> Any:
    """The greatest distance at which some method answers at least half; the smallest if there is none."""
    distances = list(figures["stream_tokens"])
    known = [
        distance
        for distance in distances
        if max(method["by_distance"][distance]["accuracy"] for method in figures["methods"].values()) >= 0.5
    ]
    return max(known, key=int) if known else min(distances, key=int)


def _stream_qa(figure: Any, figures: dict[str, Any]) -> None:
    figure.set_size_inches(7, 0.9 + 0.6 * len(figures["methods"]))
    axes = figure.subplots()
    methods = figures["methods"]
    spread = [
        [max(0.0, 100 * (method["accuracy"] - method["low"])) for method in methods.values()],
        [max(0.0, 100 * (method["high"] - method["accuracy"])) for method in methods.values()],
    ]
    names = [method["label"] for method in methods.values()]
    accuracies = [100 * method["accuracy"] for method in methods.values()]
    axes.barh(names, accuracies, xerr=spread, color=[style["color"] for style in styles(methods).values()])
    axes.invert_yaxis()
    axes.set(xlabel="right answers, %", xlim=(0, 100))
    _finish(figure, [axes], legend=False)


def _latency(figure: Any, figures: dict[str, Any]) -> None:
    figure.set_size_inches(11, 7)
    names = {"sinkattn": "sinkattn", "dense": "dense", "recomputed": "recompute"}
    panels = figure.subplots(2, 2)
    kinds = (("by_window", "size", "tokens in sight"), ("by_length", "seen", "tokens of the stream so far"))
    for column, (kind, key, text) in enumerate(kinds):
        time, memory = panels[:, column]
        for name, colour in names.items():
            costs = [cost for cost in figures[kind] if cost["method"] == name]
            if not costs:
                continue
            width = 3.2 if name == "sinkattn" else 1.4  # to be seen under another
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
    _finish(figure, [*panels.flat])


def _sinks(figure: Any, figures: dict[str, Any]) -> None:
    mass = figures["attention_on_first_tokens"]
    figure.set_size_inches(11 if mass else 6, 4)
    axes, *rest = [figure.subplots()] if mass is None else figure.subplots(1, 2)
    for name, each in figures["beginnings"].items():
        gains = each["gains"]
        margins = [gain["margin"] or 0.0 for gain in gains.values()]
        losses = [gain["loss"] for gain in gains.values()]
        axes.errorbar(list(map(str, gains)), losses, margins, marker="o", capsize=3, label=name)
    axes.set(xlabel=f"sinks, in a cache of {figures['cache']} tokens", ylabel="loss minus that without, nats per token")
    axes.set_title("What sinks are worth, by how the stream begins")
    axes.legend(frameon=False)
    for heat in rest:
        most = max(len(rows[0]) for rows in mass)
        weights = [rows[0] + [math.nan] * (most - len(rows[0])) for rows in mass]
        image = heat.imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        heat.set(xlabel="head", ylabel="attention layer")
        heat.xaxis.get_major_locator().set_params(integer=True)
        heat.yaxis.get_major_locator().set_params(integer=True)
        heat.set_title("Mean attention on the first token")
        figure.colorbar(image, ax=heat)
    _finish(figure, [axes], legend=False)


def _finish(figure: Any, panels: list[Any], legend: bool = True) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


PICTURES = {
    "ppl": _perplexity,
    "streameval": _streameval,
    "stream-qa": _stream_qa,
    "latency": _latency,
    "sinks": _sinks,
}
