"""What the commands of the command line share: arguments, and the model they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sinkattn.user_errors import UserError, as_user_error


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A new command; its parser sets ``run`` and ``prog``, its whole name."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def add_model(parser: argparse.ArgumentParser, default: str = "the small one that ships with sinkattn") -> None:
    """Which model, where and how."""
    where = "on the Hugging Face hub, or a folder"
    parser.add_argument("--model", metavar="NAME_OR_PATH", help=f"{where} (default: {default})")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help="default: the checkpoint's"
    )


def add_layout(parser: argparse.ArgumentParser, window: int | None, default: str) -> None:
    """Sinks and window."""
    parser.add_argument("--num-sinks", type=count, default=4, metavar="N", help="first tokens kept (default: 4)")
    parser.add_argument("--window", type=positive, default=window, metavar="N", help=f"last ones (default: {default})")


def count(text: str) -> int:
    """A number that may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A number that may not be 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def check_writable(*paths: Path | None) -> None:
    """Say before a long run, not after it, that its results cannot be written."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'write-protected'}")
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise UserError(f"cannot write {path}: {path.parent} is no folder that can be written to")


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer that were asked for."""
    with as_user_error(ImportError):
        from sinkattn.hf.load import load
    with as_user_error(ValueError, RuntimeError):
        model, tokenizer = load(args.model, device=args.device, dtype=args.dtype)
    if args.model is None and "OMP_NUM_THREADS" not in os.environ:
        # The shipped model is so small that a second thread costs far more than it brings.
        torch.set_num_threads(1)
    return model, tokenizer


def describe_model(model: Any, name: str | None) -> dict[str, Any]:
    """What a report says of a model."""
    from sinkattn.hf.model_config import trained_length

    return {
        "name": name or "the one that ships with sinkattn",
        "shipped": name is None,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "trained_length": trained_length(model),
    }


def model_line(facts: dict[str, Any]) -> str:
    """The same for people."""
    return f"Model: {facts['name']} ({facts['class']}, {facts['dtype']}, {facts['device']})"
