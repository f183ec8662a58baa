"""Figures of a comparison, and its table in Markdown."""

import math
import statistics
from itertools import chain
from typing import Any

from measure import Result

BASELINE = "sinkattn fp32"
TARGET = 1.3


def figures(results: list[Result]) -> list[dict[str, Any]]:
    """One row per peer; a figure that there is none of is None.

    * ``median_ms``: of a token, over all rounds.
    * ``worst_ms``: of the slowest token of a round, median over the rounds: a hiccup of the machine is no peer's.
    * ``to_llama_cpp``: median over the rounds of the ratio to the fastest llama.cpp with as many bits of a weight.
    * ``perplexity``, over ``predictions`` tokens.
    * ``perplexity_to_baseline``: ratio to the baseline's perplexity over the same tokens.
    * ``agreement``: share of those tokens where both have the same likeliest next token.
    """
    baseline = next((result for result in results if result.name == BASELINE), None)
    rows = []
    for result in results:
        row = {
            "name": result.name,
            "bits": result.bits,
            "versions": result.versions,
            "median_ms": statistics.median(chain(*result.ms)) if result.ms else None,
            "worst_ms": statistics.median(map(max, result.ms)) if result.ms else None,
            "to_llama_cpp": _ratio_to_llama_cpp(result, results),
            "kv_bytes": result.kv_bytes,
            "resident_bytes": result.resident_bytes,
            **_predictions(result, baseline),
            "error": result.error,
        }
        rows.append(row)
    return rows


def _ratio_to_llama_cpp(result: Result, results: list[Result]) -> float | None:
    medians = [list(map(statistics.median, each.ms)) for each in results if _is_llama_cpp(each, result.bits)]
    if not result.ms or not any(medians):
        return None
    fastest = min(filter(None, medians), key=statistics.median)
    own = map(statistics.median, result.ms)
    # After a failure there are fewer rounds.
    return statistics.median(ours / theirs for ours, theirs in zip(own, fastest, strict=False))


def _is_llama_cpp(result: Result, bits: int) -> bool:
    return result.name.startswith("llama.cpp") and result.bits == bits


def _predictions(result: Result, baseline: Result | None) -> dict[str, Any]:
    losses = [loss for loss in result.losses if loss is not None]
    row: dict[str, Any] = {
        "predictions": len(losses),
        "perplexity": math.exp(statistics.fmean(losses)) if losses else None,
        "perplexity_to_baseline": None,
        "agreement": None,
    }
    if baseline is None or result is baseline:
        return row
    both = [
        (loss - other, token == likeliest)
        for loss, other, token, likeliest in zip(
            result.losses, baseline.losses, result.likeliest, baseline.likeliest, strict=False
        )
        if loss is not None and other is not None
    ]
    if both:
        row["perplexity_to_baseline"] = math.exp(statistics.fmean(difference for difference, _ in both))
        row["agreement"] = statistics.fmean(same for _, same in both)
    return row


def table(content: dict[str, Any]) -> str:
    """The table of a comparison's JSON, with what is needed to read it, in Markdown."""
    head = ["", "ms, median", "worst", "/ llama.cpp", "perplexity", f"/ {BASELINE}", "agreement", "KV", "memory"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in content["rows"]:
        cells = [
            row["name"],
            _text(row["median_ms"], ".1f"),
            _text(row["worst_ms"], ".1f"),
            _text(row["to_llama_cpp"], ".2f"),
            _text(row["perplexity"], ".2f") + _one_in(row, content["plan"]["text_tokens"]),
            _text(row["perplexity_to_baseline"], ".3f"),
            _text(row["agreement"], ".1%"),
            _mebibytes(row["kv_bytes"]),
            _mebibytes(row["resident_bytes"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_remarks(content)]
    return "\n".join(lines)


def _remarks(content: dict[str, Any]) -> list[str]:
    machine, settings, rows = content["machine"], content["settings"], content["rows"]
    lines = [
        f"{machine['processor']}, {settings['threads']} threads of {machine['cores']} cores; other work "
        f"{content['other_work_percent']:.1f} %.",
        f"{settings['model']}, {settings['text']}; {settings['cache']} tokens in sight, {settings['sinks']} of them "
        "sinks.",
        "; ".join(dict.fromkeys(_versions(row["versions"]) for row in rows if row["versions"])) + ".",
        *(f"{row['name']}: failed: {row['error']}" for row in rows if row["error"]),
    ]
    for row in rows:
        if row["name"].startswith("sinkattn") and row["to_llama_cpp"] is not None:
            met = "met" if row["to_llama_cpp"] <= TARGET else "MISSED"
            lines.append(f"{met}: {row['name']} / llama.cpp at most {TARGET}: {row['to_llama_cpp']:.2f}")
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _text(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)


def _one_in(row: dict[str, Any], tokens: int) -> str:
    """That the perplexity is over few of the tokens, if it is."""
    one_in = tokens // row["predictions"] if row["predictions"] else 0
    return f" (one in {one_in})" if one_in > 1 else ""


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"
