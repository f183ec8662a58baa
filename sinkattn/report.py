"""What a demonstration found: as a table for people, as a dictionary for programs."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sinkattn
from sinkattn.demo import Measured, Result
from sinkattn.evaluate.methods import CHUNK
from sinkattn.recorder import Span


def machine() -> dict[str, Any]:
    """Processor, cores, threads and CUDA devices of this machine."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Versions of Python, sinkattn and what it runs on."""
    return {
        "sinkattn": sinkattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def labels(result: Result) -> dict[str, str]:
    """Name of each method for a reader."""
    settings = result.settings
    size = settings.cache_tokens
    return {
        "sinkattn": f"sinkattn, {settings.num_sinks} sinks + {settings.window}",
        "window": f"window of {size}, no sinks",
        "dense": "dense, cache grows",
        "recompute": f"{size} tokens, recomputed",
    }


def time_change(result: Result) -> float | None:
    """How much longer the last tokens of the sinkattn run took than those after the window filled, as a fraction."""
    recorder = result.methods["sinkattn"].recorder
    first, last = recorder.first_span(), recorder.last_span()
    return None if first is None or last is None else last.median / first.median - 1


def as_dict(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """The whole result in plain types; ``about`` (model, text) is put in front. Times in seconds, losses in nats."""
    sink = result.methods["sinkattn"].recorder
    return {
        **about,
        "versions": versions(),
        "machine": machine(),
        "build": sinkattn.build_info(),
        "settings": asdict(result.settings),
        "sinkattn_constant": {
            "resident_bytes_when_window_full": sink.resident_when_full,
            "resident_growth_bytes": sink.resident_growth,
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
    """Positions [begin, end) over which losses are compared: up to where dense attention got, and the rest."""
    settings = result.settings
    reached = result.methods["dense"].recorder.end
    # Between where dense attention stopped and where it was to stop, the samples are denser than after.
    edges = [settings.cache_tokens, reached, settings.dense_end, settings.tokens]
    spans = [(edges[0], edges[1]), (edges[2], edges[3])]
    return [(low, high) for low, high in spans if low < high]


def _score(method: Measured, low: int, high: int) -> dict[str, Any] | None:
    if (mean := method.recorder.mean_loss(low, high)) is None:
        return None
    return {"begin": low, "end": high, "samples": mean[1], "loss": mean[0], "perplexity": math.exp(mean[0])}


def size_text(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def laps_lines(text: dict[str, Any]) -> list[str]:
    """What a reader must know of a text that was read more than once."""
    laps = text["started_over"]
    return [f"The text was shorter than the stream: it was started over {count_text(laps, 'time')}."] if laps else []


def count_text(number: int, word: str) -> str:
    """A number of things."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def console(stderr: bool = False) -> Any:
    """Console of rich; wide enough for a table where there is no terminal."""
    from rich.console import Console

    out = Console(stderr=stderr, highlight=False)
    return out if out.is_terminal else Console(stderr=stderr, highlight=False, width=150)


def show(result: Result, about: dict[str, Any]) -> None:
    """Print the table and its remarks."""
    out = console()
    out.print(table(result))
    for line in remarks(result, about):
        out.print(line, markup=False)


def table(result: Result) -> Any:
    """The comparison as a table of rich."""
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
        reached = [_score(method, *part) for part in parts(result)]
        losses = [f"{score['loss']:.3f} ({score['perplexity']:.1f})" if score else "not reached" for score in reached]
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
    """What a reader of the table has to know, line by line."""
    sink = result.methods["sinkattn"].recorder
    first, last, change = sink.first_span(), sink.last_span(), time_change(result)
    turns, size = result.turns, result.settings.cache_tokens
    fed = f"the last {size} tokens"
    if about["text"]["start_token"]:
        why = ", which is the sink of this model" if about["model"]["shipped"] else ""
        fed = f"the start token{why}, and the last {size - 1} tokens"
    samples = " + ".join(f"{_score(result.methods['recompute'], *part)['samples']:,}" for part in parts(result))
    lines = [
        f"Losses are means over the same {samples} tokens, drawn at random, in every row.",
        f"first → last: median over the first and over the last {last.tokens:,} tokens with a full window; for dense, "
        f"{result.methods['dense'].recorder.last_span().tokens:,}.",
        f"[1] As sinkattn, so not timed. Fed in chunks of {CHUNK} tokens, which gives the losses of single tokens.",
        f"[2] A fresh forward over {fed}.",
        "",
        f"sinkattn, resident memory: {size_text(sink.resident_when_full)} when the window was full, at most "
        f"{size_text(sink.resident_growth)} more after.",
        f"sinkattn, median time per token: {_span_text(first)}; {_span_text(last)}; {change:+.1%}.",
        f"In turns with a new stream, so that other work on the machine slows both ({turns.rounds:,} tokens each): "
        f"{turns.young * 1e3:.3f} ms from token {turns.young_seen:,} on, {turns.old * 1e3:.3f} ms from token "
        f"{turns.old_seen:,} on; {turns.change:+.1%}.",
    ]
    return lines + laps_lines(about["text"])


def _span_text(span: Span) -> str:
    return f"{span.median * 1e3:.3f} ms over tokens {span.begin:,} to {span.begin + span.tokens - 1:,}"
