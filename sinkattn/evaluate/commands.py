"""The command line of the evaluation kit: ``sinkattn eval ppl | streameval | stream-qa | latency | sinks``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from sinkattn.arguments import (
    add_command,
    add_model,
    check_writable,
    count,
    describe_model,
    load_model,
    model_line,
    positive,
)
from sinkattn.user_errors import UserError, as_user_error, require


def add_commands(commands: Any) -> None:
    """Add ``eval`` with its commands to a parser's."""
    text = "measure a model on long streams: the claims of StreamingLLM"
    parser = commands.add_parser("eval", help=text, description=text[0].upper() + text[1:] + ".")
    evaluations = parser.add_subparsers(dest="evaluation", required=True, metavar="evaluation")

    ppl = add_command(evaluations, "ppl", run_ppl, "loss along a stream, by method and cache size")
    add_model(ppl)
    _add_text(ppl)
    _add_caches(ppl)
    ppl.add_argument("--tokens", type=positive, default=50_000, help="length of the stream (default: %(default)s)")
    ppl.add_argument(
        "--dense-tokens",
        type=count,
        metavar="N",
        help="stop the dense model there; 0: leave it out (default: 5000, or twice the widest cache)",
    )
    ppl.add_argument(
        "--recompute-every",
        type=count,
        default=16,
        metavar="N",
        help="score recomputation at every Nth token; 0: leave it out (default: %(default)s)",
    )
    ppl.add_argument("--csv", type=Path, metavar="FILE", help="write the losses along the stream there")
    _add_output(ppl)

    lines = add_command(evaluations, "streameval", run_streameval, "look up a line so many lines back, again and again")
    add_model(lines)
    _add_caches(lines)
    lines.add_argument(
        "--distances",
        type=positive,
        nargs="+",
        default=[1, 2, 5, 10, 15, 20, 50],
        metavar="N",
        help="lines back; a stream for each (default: 1 2 5 10 15 20 50)",
    )
    lines.add_argument("--every", type=positive, default=10, metavar="N", help="lines for each question (default: 10)")
    _add_questions(lines, 150)
    lines.add_argument("--no-recompute", action="store_true", help="leave recomputation out")
    lines.add_argument("--seed", type=int, default=0, help="of the lines (default: 0)")
    _add_output(lines)

    qa = add_command(evaluations, "stream-qa", run_stream_qa, "question-answer pairs, end to end in one stream")
    add_model(qa)
    qa.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSONL with {"question": "...", "answer": "..."} in each line (default: code to complete)',
    )
    _add_caches(qa)
    _add_questions(qa, 1000)
    _add_output(qa)

    latency = add_command(evaluations, "latency", run_latency, "time and memory of a token, by window and by length")
    add_model(latency)
    latency.add_argument("--num-sinks", type=count, default=4, metavar="N", help="first tokens kept (default: 4)")
    latency.add_argument(
        "--sizes", type=positive, nargs="+", metavar="N", help="sinks and window together (default: by the model)"
    )
    latency.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[500, 1000, 2000, 4000, 8000],
        metavar="N",
        help="tokens of a stream, for the largest size and dense attention (default: 500 1000 2000 4000 8000)",
    )
    latency.add_argument("--rounds", type=positive, default=50, help="tokens timed in each case (default: 50)")
    _add_output(latency)

    sinks = add_command(evaluations, "sinks", run_sinks, "has a model attention sinks, and how many to keep")
    add_model(sinks)
    _add_text(sinks)
    sinks.add_argument("--size", type=positive, metavar="N", help="sinks and window together (default: by the model)")
    sinks.add_argument("--tokens", type=positive, default=10_000, help="of each stream (default: %(default)s)")
    _add_output(sinks)


def _add_text(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 text, - for stdin (default: Python's standard library)")
    source.add_argument("--dataset", metavar="NAME[:CONFIG]", help="data set of the Hugging Face hub, or a folder")
    parser.add_argument("--split", help="of the data set (default: test)")
    parser.add_argument("--column", help="of the data set (default: text)")
    parser.add_argument("--no-start-token", action="store_true", help="begin the stream without one")


def _add_caches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", nargs="+", metavar="S+W", help="sinks + window, 0 sinks for a window alone (default: by the model)"
    )


def _add_questions(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--count", type=positive, default=default, help="questions in a stream (default: %(default)s)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture there")


def run_ppl(args: argparse.Namespace) -> int:
    """Run ``sinkattn eval ppl``."""
    with _session(args, args.csv) as session:
        from sinkattn.evaluate import perplexity
        from sinkattn.evaluate.report import perplexity_dict, perplexity_table, write_csv

        stream = session.stream()
        caches = session.caches((0, 1, 4))
        dense = args.dense_tokens
        if dense is None:
            dense = max(5_000, 2 * max(cache.total for cache in caches))
        settings = perplexity.Settings(caches, args.tokens, min(dense, args.tokens), args.recompute_every)
        with session.progress as progress:
            bar = progress.add("tokens", args.tokens)

            def watch(done: int, tracks: list[perplexity.Track]) -> bool:
                losses = ((track.method.name, track.all.mean()) for track in tracks)
                bar(done, "  ".join(f"{name} {mean.loss:.3f}" for name, mean in losses if mean))
                return not interrupted.is_set()

            with _ctrl_c() as interrupted:
                result = perplexity.run(session.model, stream, settings, watch)
        figures = {**perplexity_dict(result), "text": session.text_facts(stream, stream.laps)}
        session.finish(figures, perplexity_table(figures))
        if args.csv:
            write_csv(figures, args.csv)
    if interrupted.is_set():
        print(f"{args.prog}: interrupted after {result.settings.tokens:,} tokens", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _ctrl_c() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that what has been measured so far is not lost; a second one interrupts."""
    pressed = Event()
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def run_streameval(args: argparse.Namespace) -> int:
    """Run ``sinkattn eval streameval``."""
    with _session(args) as session:
        from sinkattn.evaluate import exact_match
        from sinkattn.evaluate.items import line_items
        from sinkattn.evaluate.methods import Recomputed, Streamed
        from sinkattn.evaluate.report import streameval_dict, streameval_table

        streams = {distance: line_items(distance, args.every, args.seed) for distance in sorted(args.distances)}
        caches = session.caches((0, 4))
        predictors = [Streamed(session.model, cache) for cache in caches]
        if not args.no_recompute:
            start = session.tokenizer.bos_token_id
            predictors += [
                Recomputed(session.model, total, start) for total in sorted({cache.total for cache in caches})
            ]
        tallies = {}
        with session.progress as progress:
            for distance, items in streams.items():
                bar = progress.add(f"{distance} lines back", args.count)
                tallies[distance] = exact_match.run(
                    predictors, items, session.tokenizer, args.count, session.accuracies(predictors, bar)
                )
        figures = streameval_dict(args, predictors, tallies)
        session.finish(figures, streameval_table(figures))
    return 0


def run_stream_qa(args: argparse.Namespace) -> int:
    """Run ``sinkattn eval stream-qa``."""
    with _session(args) as session:
        from sinkattn.evaluate import exact_match
        from sinkattn.evaluate.items import code_items, read_items
        from sinkattn.evaluate.methods import OneShot, Streamed, dense_limit
        from sinkattn.evaluate.report import stream_qa_dict, stream_qa_table
        from sinkattn.text import StandardLibrary

        if args.questions is None:
            items = list(islice(code_items(StandardLibrary().pieces()), args.count))
        else:
            items = read_items(args.questions)[: args.count]
        number = len(items)
        first = exact_match.first_token(session.tokenizer)
        streamed = [Streamed(session.model, cache) for cache in session.caches((0, 4))]
        predictors = [OneShot(session.model, first, dense_limit(streamed[0])), *streamed]
        with session.progress as progress:
            watch = session.accuracies(predictors, progress.add("questions", number))
            tallies, tokens = exact_match.run(predictors, items, session.tokenizer, number, watch)
        figures = stream_qa_dict(args, predictors, tallies, tokens)
        session.finish(figures, stream_qa_table(figures))
    return 0


def run_latency(args: argparse.Namespace) -> int:
    """Run ``sinkattn eval latency``."""
    with _session(args) as session:
        from sinkattn.evaluate import latency
        from sinkattn.evaluate.methods import CacheSize
        from sinkattn.evaluate.report import latency_dict, latency_table

        sizes = sorted(set(args.sizes or session.sizes(args.num_sinks)))
        lengths = sorted(set(args.lengths))
        with session.progress as progress:
            bar = progress.add("window", len(sizes))
            by_window = latency.by_window(session.model, args.num_sinks, sizes, args.rounds, bar)
            bar = progress.add("length", len(lengths))
            cache = CacheSize(args.num_sinks, sizes[-1] - args.num_sinks)
            by_length = latency.by_length(session.model, cache, lengths, args.rounds, bar)
        figures = latency_dict(by_window, by_length, cache, args.rounds)
        session.finish(figures, latency_table(figures))
    return 0


def run_sinks(args: argparse.Namespace) -> int:
    """Run ``sinkattn eval sinks``."""
    with _session(args) as session:
        from sinkattn.evaluate import sinks
        from sinkattn.evaluate.report import sinks_table

        stream = session.stream()
        bars: dict[str, Any] = {}
        with session.progress as progress:

            def watch(name: str, done: int) -> None:
                if name not in bars:
                    bars[name] = progress.add(name, args.tokens)
                bars[name](done)

            result = sinks.run(session.model, stream, args.size or session.total, args.tokens, watch)
        figures = {**result.as_dict(), "text": session.text_facts(stream, result.laps)}
        session.finish(figures, sinks_table(figures))
    return 0


class _Session:
    """Model, tokenizer, progress and output of one evaluation."""

    def __init__(self, args: argparse.Namespace) -> None:
        from sinkattn.progress import StreamProgress

        self.args = args
        self.model, self.tokenizer = load_model(args)
        self.facts = describe_model(self.model, args.model)
        self.progress = StreamProgress()
        print(model_line(self.facts), flush=True)

    @property
    def total(self) -> int:
        """Sinks and window together, where nobody says: half of what the model can take, at most 1024."""
        return max(16, self._most(2048) // 2)

    def sizes(self, num_sinks: int) -> list[int]:
        """Several totals up to what the model can take, at most 4096."""
        most = self._most(4096)
        return [most // 2**power for power in range(4, -1, -1) if most // 2**power > num_sinks] or [most]

    def _most(self, most: int) -> int:
        from sinkattn.hf.load import default_window

        return default_window(self.model, 0, most)

    def caches(self, sink_counts: tuple[int, ...]) -> tuple[Any, ...]:
        """Sizes that were asked for; by default of the usual total, with so many sinks."""
        from sinkattn.evaluate.methods import CacheSize

        if self.args.cache:
            return tuple(dict.fromkeys(map(CacheSize.parse, self.args.cache)))
        return tuple(CacheSize(sinks, self.total - sinks) for sinks in sink_counts)

    def stream(self) -> Any:
        """The text that was asked for."""
        from sinkattn.text import HubDataset, TokenStream, open_text

        args = self.args
        if args.dataset:
            text = HubDataset(args.dataset, args.split or "test", args.column or "text")
        elif args.split or args.column:
            raise UserError("split, column: these are of a data set; give --dataset NAME")
        else:
            text = open_text(args.text, sys.stdin)
        print(f"Text: {text.description}", flush=True)
        return TokenStream(text, self.tokenizer, not args.no_start_token)

    def text_facts(self, stream: Any, laps: int) -> dict[str, Any]:
        """What a report says of the text."""
        return {
            "description": stream.text.description,
            "start_token": stream.start_token is not None,
            "started_over": laps,
        }

    def accuracies(self, predictors: list[Any], bar: Any) -> Any:
        """A watch for `exact_match.run` that shows accuracies."""

        def watch(done: int, tokens: int, tallies: list[Any]) -> None:
            pairs = zip(predictors, tallies, strict=True)
            bar(done, "  ".join(f"{predictor.name} {tally.accuracy:.0%}" for predictor, tally in pairs))

        return watch

    def finish(self, figures: dict[str, Any], table: Any) -> None:
        """Print the table; write the figures and the picture that were asked for."""
        from sinkattn.evaluate import pictures
        from sinkattn.report import console, machine, versions

        console().print(table)
        figures = {
            "evaluation": self.args.evaluation,
            "model": self.facts,
            "versions": versions(),
            "machine": machine(),
            **figures,
        }
        if self.args.json:
            self.args.json.write_text(json.dumps(figures, indent=2) + "\n")
            print(f"Figures: {self.args.json}")
        if self.args.plot:
            pictures.draw(figures, self.args.plot)
            print(f"Picture: {self.args.plot}")


@contextmanager
def _session(args: argparse.Namespace, *outputs: Path | None) -> Any:
    for name in ("matplotlib.figure", "psutil", "rich", "scipy"):
        require(name)
    from sinkattn.plots import check_format

    check_writable(args.json, args.plot, *outputs)
    with as_user_error(ValueError, RuntimeError, OSError):
        if args.plot:
            check_format(args.plot)
        yield _Session(args)
