"""Figures of `bench_serve.py`, and their tables in Markdown."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from serve_client import Reply
from serve_peer import Peer, agreement, reused_share

LOAD_HEAD = (
    *("sessions", "server", "turns", "rounds", "requests/s", "first token p50", "p95", "whole reply p50", "p95"),
    *("tokens before it", "of them kept", "same tokens", "other work"),
)
LATE_HEAD = (
    *("sent each time", "turn", "tokens kept", "first token p50", "p95", "in turn 2: p50", "p95"),
    *("p50 / p50", "p95 / p95", "other work"),
)
# Of a burst, in the order of the columns.
TIMES = ("first_p50_ms", "first_p95_ms", "whole_p50_ms", "whole_p95_ms")


def load_rows(sessions: int, peers: Sequence[Peer], other_work: float) -> list[dict[str, Any]]:
    """A row for each server, sinkattn's first; ``other_work`` in percent.

    * ``first``, ``later``: figures of such turns, medians over the rounds; None without any.
    * ``ratios``: of figures of later turns, this server's by sinkattn's, medians over the rounds; None without any.
    * ``equal``: share of the tokens of replies to the same messages that are sinkattn's, of ``compared`` tokens.
    * ``bursts``: seconds of each, and of its replies: seconds to the first token and to the end, tokens before it, and
      those of them that were kept.
    """
    ours, found = peers[0], []
    for peer in peers:
        same = agreement(ours.chats, peer.chats)
        pairs = zip(*([burst.figures() for burst in each.rounds] for each in (peer, ours)), strict=False)
        row = {
            "sessions": sessions,
            "server": peer.server.kind.name,
            "does": peer.server.kind.does,
            "rounds": len(peer.rounds),
            "first": _medians([burst.figures() for burst in peer.bursts[:1]]),
            "later": _medians([burst.figures() for burst in peer.rounds]),
            "ratios": _medians(
                [{name: x[name] / y[name] for name in ("requests_per_second", *TIMES)} for x, y in pairs]
            ),
            "equal": same.share,
            "compared": same.tokens,
            "other_work_percent": other_work,
            "resident_bytes": peer.resident_bytes,
            "error": peer.error,
            "bursts": [
                [burst.seconds, [(x.first, x.whole, x.prompt_tokens, x.reused_tokens) for x in burst.replies]]
                for burst in peer.bursts
            ],
        }
        found.append(row)
    return found


def late_row(
    sends: str, turn: int, late: Sequence[Reply], second: Sequence[Reply], other_work: float
) -> dict[str, Any]:
    """A row of the times to the first token in turns around ``turn``, and in second turns."""
    row: dict[str, Any] = {"sends": sends, "turn": turn, "other_work_percent": other_work}
    for percent in (50, 95):
        own, other = (1e3 * float(np.percentile([x.first for x in each], percent)) for each in (late, second))
        row |= {f"late_p{percent}_ms": own, f"second_p{percent}_ms": other, f"ratio_p{percent}": own / other}
    seconds = {"late_seconds": [x.first for x in late], "second_seconds": [x.first for x in second]}
    return {**row, "reused": reused_share(late), **seconds}


def table(content: dict[str, Any]) -> str:
    """The tables of the benchmark's JSON, with what is needed to read them, in Markdown."""
    load, late = content["load"], content["late"]
    lines = list[str]()
    if load:
        lines += [*_table(LOAD_HEAD, (cells for row in load for cells in _load_cells(row))), "", *_best(load), ""]
    if late:
        lines += [*_table(LATE_HEAD, map(_late_cells, late)), ""]
    machine, settings = content["machine"], content["settings"]
    lines += [
        f"{machine['processor']}, {machine['cores']} cores, {settings['threads']} threads for each server.",
        ", ".join(f"{name} {version}" for name, version in content["versions"].items()) + ".",
        f"{settings['model']} model in {settings['dtype']}, {settings['new_tokens']} tokens a reply. Times in ms, "
        "medians over the rounds; other work: CPU time of other processes, in percent of all cores.",
        *dict.fromkeys(f"{row['server']}: {row['does']}." for row in load),
        *(f"{row['sessions']} sessions, {row['server']}: {row['error']}." for row in load if row["error"]),
    ]
    return "\n".join(lines)


def _best(load: list[dict[str, Any]]) -> Iterator[str]:
    """What sinkattn's later turns are beside those of the other server that answers most requests per second."""
    for sessions in dict.fromkeys(row["sessions"] for row in load):
        others = [row for row in load if row["sessions"] == sessions and row["ratios"]][1:]
        if others:
            best = max(others, key=lambda row: row["ratios"]["requests_per_second"])
            ratios = best["ratios"]
            yield (
                f"{sessions} sessions, later turns: {1 / ratios['requests_per_second']:.2f} times the requests per "
                f"second of {best['server']}, whose time to the first token is {ratios['first_p50_ms']:.2f} (p50) and "
                f"{ratios['first_p95_ms']:.2f} (p95) times as long."
            )


def _load_cells(row: dict[str, Any]) -> Iterator[list[str]]:
    for turns in ("first", "later"):
        if (figures := row[turns]) is not None:
            yield [
                str(row["sessions"]),
                row["server"],
                turns,
                str(1 if turns == "first" else row["rounds"]),
                f"{figures['requests_per_second']:.3g}",
                *(f"{figures[name]:,.0f}" for name in TIMES),
                f"{figures['prompt_tokens']:,.0f}",
                _percent(figures["reused"]),
                f"{row['equal']:.1%}",
                f"{row['other_work_percent']:.1f} %",
            ]


def _late_cells(row: dict[str, Any]) -> list[str]:
    names = ("late_p50_ms", "late_p95_ms", "second_p50_ms", "second_p95_ms")
    ratios = (f"{row[name]:.2f}" for name in ("ratio_p50", "ratio_p95"))
    return [
        row["sends"],
        str(row["turn"]),
        _percent(row["reused"]),
        *(f"{row[name]:,.0f}" for name in names),
        *ratios,
        f"{row['other_work_percent']:.1f} %",
    ]


def _percent(share: float | None) -> str:
    return "not told" if share is None else f"{share:.0%}"


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(cells) + " |" for cells in body)


def _medians(figures: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of each figure, None where there is none; None of no figures."""
    if not figures:
        return None
    return {
        name: None if figures[0][name] is None else statistics.median(each[name] for each in figures)
        for name in figures[0]
    }
