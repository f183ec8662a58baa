"""The result of `sinkattn demo`, as a table and as the dictionary that is written as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import sinkattn
from sinkattn.cli.formatting import console, restart_lines, size_text, turns_line
from sinkattn.evaluate.demo import Measured, Result
from sinkattn.evaluate.environment import machine, versions
from sinkattn.evaluate.methods import CHUNK_TOKENS
from sinkattn.evaluate.recorder import Span

if TYPE_CHECKING:
    from rich.table import Table


def labels(result: Result) -> dict[str, str]:
    """Labels of the methods that were measured, in the table and the picture."""
    settings = result.settings
    size = settings.cache_tokens
    texts = {
        "sinkattn": f"sinkattn, {settings.num_sinks} sinks + {settings.window}",
        "window": f"window of {size}, no sinks",
        "dense": "dense, cache grows",
        "recompute": f"{size} tokens, recomputed",
    }
    return {name: text for name, text in texts.items() if name in result.methods}


def time_change(result: Result) -> float | None:
    """Median time of the last tokens of sinkattn relative to that of the first with a full window, minus 1."""
    recorder = result.methods["sinkattn"].recorder
    first, last = recorder.first_span(), recorder.last_span()
    return None if first is None or last is None else last.median / first.median - 1


def as_dict(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """The report: ``about`` (model, text), then the result. Times are in seconds, losses in nats."""
    sinks = result.methods["sinkattn"].recorder
    return {
        **about,
        "versions": versions(),
        "machine": machine(),
        "build": sinkattn.build_info(),
        "settings": asdict(result.settings),
        "sinkattn_constant": {
            "resident_bytes_when_window_full": sinks.resident_when_full,
            "resident_growth_bytes": sinks.resident_growth,
            "median_seconds_change": time_change(result),
            "in_turns": result.turns and asdict(result.turns),
        },
        "methods": {name: _method_dict(result, name, label) for name, label in labels(result).items()},
    }


def _method_dict(result: Result, name: str, label: str) -> dict[str, Any]:
    method = result.methods[name]
    first, last = method.recorder.first_span(), method.recorder.last_span()
    return {
        "label": label,
        "tokens": method.recorder.recorded,
        "end": method.recorder.end,
        "stopped": method.stopped,
        "kv_cache_bytes": method.cache_bytes,
        "scored": [score for score in (_score(method, *part) for part in parts(result)) if score],
        "first_times": first and asdict(first),
        "last_times": last and asdict(last),
        "series": method.recorder.series(),
    }


def parts(result: Result) -> list[tuple[int, int]]:
    """Positions [begin, end) over which losses are compared: up to where the dense model got, and the rest."""
    settings = result.settings
    dense = result.methods.get("dense")
    reached = dense.recorder.end if dense else settings.dense_end
    # Positions from `reached` to `dense_end` belong to neither part: they are sampled more densely than the rest.
    spans = [(settings.cache_tokens, min(reached, settings.tokens)), (settings.dense_end, settings.tokens)]
    return [(low, high) for low, high in spans if low < high]


def _score(method: Measured, low: int, high: int) -> dict[str, Any] | None:
    if (mean := method.recorder.mean_loss(low, high)) is None:
        return None
    return {"begin": low, "end": high, "samples": mean[1], "loss": mean[0], "perplexity": math.exp(mean[0])}


def show(result: Result, about: dict[str, Any]) -> None:
    """Print the table and the remarks."""
    out = console()
    out.print(table(result))
    for line in remarks(result, about):
        out.print(line, markup=False)


def table(result: Result) -> Table:
    """The comparison, one row for each method."""
    from rich.table import Table

    out = Table(header_style="bold")
    out.add_column("method")
    for low, high in parts(result):
        out.add_column(f"loss (perplexity)\ntokens {low:,} to {high - 1:,}", justify="right")
    out.add_column("ms per token\nfirst → last", justify="right")
    out.add_column("KV cache\nat the end", justify="right")
    out.add_column("notes")
    for name, label in labels(result).items():
        method = result.methods[name]
        scores = [_score(method, *part) for part in parts(result)]
        losses = [f"{score['loss']:.3f} ({score['perplexity']:.1f})" if score else "not reached" for score in scores]
        cache = "none" if method.cache_bytes is None else size_text(method.cache_bytes)
        out.add_row(label, *losses, _times(name, method), cache, _note(result, name))
    return out


def _times(name: str, method: Measured) -> str:
    first, last = method.recorder.first_span(), method.recorder.last_span()
    if name == "window" or first is None or last is None:
        return "not timed"
    if name == "recompute":
        return f"{last.median * 1e3:.2f}"
    return f"{first.median * 1e3:.2f} → {last.median * 1e3:.2f}"


def _note(result: Result, name: str) -> str:
    method = result.methods[name]
    if name == "sinkattn":
        return f"ran all {method.recorder.end:,} tokens"
    if name == "window":
        return "same code and cache size [1]"
    if name == "dense":
        return f"stopped at {method.recorder.end:,}: {method.stopped}" if method.stopped else "ran all tokens"
    return f"{method.recorder.recorded:,} sampled tokens [2]"


def remarks(result: Result, about: dict[str, Any]) -> list[str]:
    """Notes below the table, line by line."""
    sinks = result.methods["sinkattn"].recorder
    first, last, change = sinks.first_span(), sinks.last_span(), time_change(result)
    turns, size = result.turns, result.settings.cache_tokens
    # The stream of sinkattn is longer than its window.
    assert first is not None
    assert last is not None
    assert change is not None
    dense = result.methods["dense"].recorder.last_span() if "dense" in result.methods else None
    context = f"the last {size} tokens"
    if about["text"]["start_token"]:
        why = ", which is the sink of this model" if about["model"]["shipped"] else ""
        context = f"the start token{why}, and the last {size - 1} tokens"
    scores = [_score(result.methods["sinkattn"], *part) for part in parts(result)]
    samples = " + ".join(f"{score['samples'] if score else 0:,}" for score in scores)
    lines = [
        f"Losses are means over the same {samples} tokens, drawn at random, in every row.",
        f"first → last: median over the first and over the last {last.tokens:,} tokens with a full window; for dense, "
        f"{dense.tokens if dense else 0:,}.",
        f"[1] As sinkattn, so not timed. Fed in chunks of {CHUNK_TOKENS} tokens, which gives the losses of single "
        "tokens.",
        f"[2] A fresh forward over {context}.",
        "",
        f"sinkattn, resident memory: {size_text(sinks.resident_when_full)} when the window was full, at most "
        f"{size_text(sinks.resident_growth)} more after.",
        f"sinkattn, median time per token: {_span_text(first)}; {_span_text(last)}; {change:+.1%}.",
    ]
    if turns:
        lines.append(turns_line(asdict(turns)))
    if about["interrupted"]:
        lines.append("Interrupted: these are the figures until then.")
    return lines + restart_lines(about["text"])


def _span_text(span: Span) -> str:
    return f"{span.median * 1e3:.3f} ms over tokens {span.begin:,} to {span.begin + span.tokens - 1:,}"
