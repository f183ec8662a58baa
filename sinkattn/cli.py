"""The command line: ``sinkattn demo | generate | eval | info``, also as ``python -m sinkattn``.

Exit codes: 0 when done, 2 for what the user can put right (one line on stderr says what), 130 when interrupted.
`generate` has no end of its own, so Ctrl-C is how it ends: code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import sinkattn
from sinkattn.arguments import (
    add_command,
    add_layout,
    add_model,
    check_writable,
    describe_model,
    load_model,
    model_line,
    positive,
)
from sinkattn.evaluate import commands as evaluate
from sinkattn.user_errors import UserError, as_user_error, require


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _leave_stdout()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``."""
    parser = argparse.ArgumentParser(
        prog="sinkattn", description="Endless streams for transformers models, in constant memory."
    )
    parser.add_argument("--version", action="version", version=f"sinkattn {sinkattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = add_command(commands, "demo", run_demo, "compare four ways to stream a text through a model")
    add_model(demo)
    add_layout(demo, 124, "124")
    demo.add_argument("--text", metavar="FILE", help="UTF-8 text, - for stdin (default: Python's standard library)")
    demo.add_argument("--tokens", type=positive, default=16_000, help="length of the stream (default: %(default)s)")
    demo.add_argument(
        "--dense-tokens", type=positive, default=5_000, help="stop the dense model there (default: %(default)s)"
    )
    demo.add_argument(
        "--samples", type=positive, default=1_000, help="tokens scored in each part (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of the tokens that are scored (default: %(default)s)")
    demo.add_argument("--plot", type=Path, default=Path("demo.png"), metavar="FILE", help="picture (default: demo.png)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")

    generate = add_command(commands, "generate", run_generate, "generate text without end; Ctrl-C ends it")
    add_model(generate)
    add_layout(generate, None, "1020, or what the model was trained for")
    generate.add_argument("--prompt", metavar="TEXT", help="default: read from stdin")
    generate.add_argument("--max-new-tokens", type=positive, help="default: no end")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default: all)")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample from the top probability p (default: all)")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--stop-at-eos", action="store_true", help="end where the model ends its text")

    evaluate.add_commands(commands)

    info = add_command(commands, "info", run_info, "what was built, and which backend will run where")
    add_model(info, default="none; --model demo is the one that ships with sinkattn")
    add_layout(info, None, "1020, or what the model was trained for")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run_demo(args: argparse.Namespace) -> int:
    """Run ``sinkattn demo``."""
    for name in ("matplotlib.figure", "psutil", "rich"):
        require(name)
    from sinkattn import demo, report
    from sinkattn.plots import check_format, draw
    from sinkattn.progress import StreamProgress
    from sinkattn.recorder import Recorder
    from sinkattn.text import TokenStream, open_text

    settings = demo.Settings(**{field.name: getattr(args, field.name) for field in fields(demo.Settings)})
    check_writable(args.plot, args.json)
    with as_user_error(ValueError):
        check_format(args.plot)
        settings.check()
        text = open_text(args.text, sys.stdin)
    model, tokenizer = load_model(args)
    stream = TokenStream(text, tokenizer)
    about = {
        "model": describe_model(model, args.model),
        "text": {
            "description": text.description,
            "start_token": stream.start_token is not None,
        },
    }
    print(model_line(about["model"]))
    print(f"Text: {text.description}", flush=True)
    with as_user_error(ValueError, RuntimeError), StreamProgress() as progress:
        bars: dict[str, Callable[..., None]] = {}

        def watch(name: str, recorder: Recorder, tokens: int) -> None:
            if name not in bars:
                bars[name] = progress.add(name, tokens)
            bars[name](recorder.end, f"loss {recorder.running_loss:.3f}")

        result = demo.run(model, stream, settings, watch, progress.resident)
    about["text"]["started_over"] = stream.laps
    figures = report.as_dict(result, about)
    report.show(result, about)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    with as_user_error(OSError, ValueError):
        draw(figures, args.plot)
    print(f"Picture: {args.plot}" + (f", figures: {args.json}" if args.json else ""))
    return 0


def run_generate(args: argparse.Namespace) -> int:
    """Run ``sinkattn generate``."""
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("prompt: give --prompt TEXT, or pipe a text into stdin")
        prompt = sys.stdin.read()
    model, tokenizer = load_model(args)
    from sinkattn.hf import SinkCache
    from sinkattn.hf.stream import stream_text, stream_tokens

    stop_ids: list[int] = []
    if args.stop_at_eos:
        eos = model.generation_config.eos_token_id
        if eos is None:
            raise UserError("stop-at-eos: this model has no end token")
        stop_ids = eos if isinstance(eos, list) else [eos]
    prompt_ids = tokenizer(prompt, verbose=False).input_ids
    if not prompt_ids:
        raise UserError("prompt: is empty, and this model has no start token")
    with as_user_error(ValueError, RuntimeError):
        _enable(model, args)
        cache = SinkCache(model)
        tokens = stream_tokens(
            model,
            prompt_ids,
            cache,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stop_ids=stop_ids,
        )
        counter = _Counter(tokens)
        texts = stream_text(tokenizer, counter, prompt_ids)
    began = time.perf_counter()
    try:
        for text in texts:
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        _leave_stdout()
    seconds = time.perf_counter() - began
    count = counter.count
    from sinkattn.report import size_text

    print(
        f"\n{count:,} tokens, {count / seconds:.1f} tokens/s, KV cache {size_text(cache.nbytes)} "
        f"({cache.layout.num_sinks} sinks + window of {cache.layout.window})",
        file=sys.stderr,
    )
    return 0


def _leave_stdout() -> None:
    """Nobody reads any more; Python would complain when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Counter:
    """Counts what it hands through."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self.tokens = tokens
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        for token in self.tokens:
            self.count += 1
            yield token


def run_info(args: argparse.Namespace) -> int:
    """Run ``sinkattn info``."""
    from sinkattn import info

    facts = info.collect()
    if args.model is not None:
        name = args.model
        args.model = None if name == "demo" else name
        model, _ = load_model(args)
        facts["model"] = {"name": name, **info.model_facts(model, args.num_sinks, _window(model, args))}
    print(json.dumps(facts, indent=2) if args.json else "\n".join(info.lines(facts)))
    return 0


def _window(model: Any, args: argparse.Namespace) -> int:
    from sinkattn.hf.load import default_window

    return args.window or default_window(model, args.num_sinks)


def _enable(model: Any, args: argparse.Namespace) -> None:
    sinkattn.enable(model, args.num_sinks, _window(model, args))
