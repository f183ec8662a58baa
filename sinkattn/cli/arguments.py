"""Arguments that several commands share, and loading what they name: models, texts, output files."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sinkattn.cli.errors import UserError, as_user_error
from sinkattn.cli.formatting import size_text

if TYPE_CHECKING:
    from typing import TypeAlias

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sinkattn.evaluate.text import Text, TokenStream
    from sinkattn.hf import SamplingParams

    Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

Parsed = TypeVar("Parsed")

# Dtypes of 8 bits that a cache may hold tokens in: `sinkattn.ring_cache.CacheDtype`.
CACHE_DTYPES = ("int8", "fp8")

# What names a model.
MODEL = "name on the Hugging Face hub, a folder, FILE.gguf, or FILE.gguf in either (NAME:FILE.gguf)"


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command; ``text`` is its help. Parsed arguments have ``run`` and ``prog``, the full name of the command."""
    parser = commands.add_parser(name, help=text, description=sentence(text))
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def sentence(text: str) -> str:
    """The help of a command as a sentence, for its description."""
    return text[0].upper() + text[1:] + "."


def add_model(parser: argparse.ArgumentParser, default: str = "the small one that ships with sinkattn") -> None:
    """Add the arguments that say which model to load, where, in which dtype and with which weights.

    default: describes the default model.
    """
    parser.add_argument("--model", metavar="NAME_OR_PATH", help=f"{MODEL} (default: {default})")
    add_weights(parser)


def add_chat_model(parser: argparse.ArgumentParser) -> None:
    """The same for a command that needs a chat template, which the model that ships does not have."""
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help=f"{MODEL}; one with a chat template (required)"
    )
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where a model is loaded to, in which dtype and with which weights."""
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="default: the checkpoint's; bfloat16 with --quantize",
    )
    parser.add_argument("--quantize", choices=("int8", "int4"), help="quantize the weights (default: as they are)")


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Add whether the decode step is compiled."""
    parser.add_argument(
        "--compile", action="store_true", help="compile the decode step first; takes about half a minute, later less"
    )


def add_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """Add whether caches hold tokens in 8 bits."""
    help_text = "hold tokens that are not sinks in 8 bits (default: in the dtype of the model)"
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help=help_text)


def add_layout(parser: argparse.ArgumentParser, window: int | None, default: str) -> None:
    """Add the number of sinks and the window; ``default`` describes the default window."""
    add_num_sinks(parser)
    parser.add_argument(
        "--window", type=positive, default=window, metavar="N", help=f"most recent tokens kept (default: {default})"
    )


def add_num_sinks(parser: argparse.ArgumentParser) -> None:
    """Add the number of sinks."""
    parser.add_argument("--num-sinks", type=count, default=4, metavar="N", help="first tokens kept (default: 4)")


# Without a penalty a small model says one sentence for ever: docs/evaluation.md, "Endless text and chat".
SAMPLING = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


# Replies need the words of the question, which a penalty counts, too; without one long replies repeat themselves.
REPLY_SAMPLING = {**SAMPLING, "temperature": 0.5, "min_p": 0.1, "repetition_penalty": 1.05}


def add_sampling(parser: argparse.ArgumentParser, seed: int | None, *, is_chat: bool = True) -> None:
    """Add how tokens are sampled.

    Args:
        parser: of a command.
        seed: the default, None for another text each time.
        is_chat: whether the command always chats; if False, only with ``--chat``.
    """
    group = parser.add_argument_group("sampling", "The model's generation configuration goes before these defaults.")
    texts = {
        "temperature": "0 is greedy",
        "top_k": "sample from the k likeliest tokens; 0 for all",
        "top_p": "sample from the likeliest tokens that together reach this probability; 1 for all",
        "min_p": "sample from tokens at least this likely, compared with the likeliest; 0 for all",
        "repetition_penalty": "divides the logits of tokens in the cache if positive, else multiplies; 1 for none",
        "presence_penalty": "subtracted from the logits of tokens in the cache",
        "frequency_penalty": "subtracted from the logit of a token for each time that it is in the cache",
    }
    for name, text in texts.items():
        default, of_reply = (REPLY_SAMPLING if is_chat else SAMPLING)[name], REPLY_SAMPLING[name]
        default_text = f"default: {default}" + ("" if default == of_reply else f", with --chat {of_reply}")
        option, metavar = "--" + name.replace("_", "-"), name[-1].upper() if name.startswith(("top", "min")) else "X"
        group.add_argument(option, type=type(default), metavar=metavar, help=f"{text} ({default_text})")
    group.add_argument("--seed", type=int, default=seed, help="makes sampling repeatable (default: %(default)s)")


def sampling(args: argparse.Namespace, model: PreTrainedModel, **others: Any) -> SamplingParams:
    """The arguments of `add_sampling`, and ``others`` of `SamplingParams`, with the defaults for a model."""
    from sinkattn.hf import SamplingParams
    from sinkattn.hf.sampling.params import set_values

    defaults = REPLY_SAMPLING if getattr(args, "chat", True) else SAMPLING  # a command without --chat is one
    names = [each.name for each in fields(SamplingParams)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    with as_user_error(ValueError):
        return SamplingParams(**{**defaults, **set_values(model.generation_config), **given, **others})


def json_schema(text: str) -> dict[str, Any]:
    """Parse the name of a file with a JSON schema: returns the schema."""
    try:
        schema = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read a JSON schema from {text}: {error}") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"expected an object as JSON schema in {text}, got {type(schema).__name__}")
    return schema


def count(text: str) -> int:
    """Parse a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number, 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def as_argument(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """A parser for argparse, which tells the message of a ValueError that ``parse`` raises."""

    def parse_argument(text: str) -> Parsed:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def check_writable(*paths: Path | None) -> None:
    """Raise UserError for output files that cannot be written, before a long run rather than after it."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'write-protected'}")
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise UserError(f"cannot write {path}: {path.parent} is no folder that can be written to")


def new_folder(text: str) -> Path:
    """Parse a folder that is new or empty, and in which files can be written."""
    path = Path(text)
    parent = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not text or (path.is_dir() and any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"expected a new or empty folder, got {text!r}")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {parent} is no folder that can be written to")
    return path


def open_stdin(*, replaces: bool = False) -> TextIO:
    """Stdin; ``replaces``: bytes that are no text are replaced, and not an error. Raises UserError if it is closed."""
    if sys.stdin is None:
        raise UserError("stdin is closed")
    if replaces and isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


def open_text(name: str | None) -> Text:
    """Open the text that ``--text`` names: a file, ``-`` for stdin, None for the standard library."""
    from sinkattn.evaluate.text import Pipe, StandardLibrary, TextFile

    if name is None:
        return StandardLibrary()
    return Pipe(open_stdin()) if name == "-" else TextFile(Path(name))


def load_model(args: argparse.Namespace, *, spread: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that the arguments name, maybe spread over processes, and its tokenizer."""
    if args.model is None and getattr(args, "chat", False):
        raise UserError("chat: the model that ships with sinkattn has no chat template; give --model")
    with as_user_error(ImportError):
        import torch

        from sinkattn.hf.load import load
    gc.freeze()  # what was imported stays: no collection, between tokens either, need look through it
    gc.enable()  # `main` has disabled it
    with as_user_error(ValueError, RuntimeError, ImportError):
        model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, quantize=args.quantize, spread=spread)
    if args.model is None and "OMP_NUM_THREADS" not in os.environ:
        # The shipped model is so small that a second thread costs more than it gains.
        torch.set_num_threads(1)
    return model, tokenizer


def announce_compilation(args: argparse.Namespace) -> None:
    """Say on stderr what takes so long, if the decode step is compiled."""
    if args.compile:
        print("Compiling the decode step, once for each cache ...", file=sys.stderr, flush=True)


def window_of(model: PreTrainedModel, args: argparse.Namespace) -> int:
    """The window that was given, or the default one of the model."""
    from sinkattn.hf.model_config import default_window

    return args.window or default_window(model, args.num_sinks)


def describe_model(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """The entry of a model in a report, which the arguments name."""
    from sinkattn.hf.load import advised_sinks
    from sinkattn.hf.model_config import default_window, trained_length
    from sinkattn.hf.quantize import quantized_share, weight_bytes

    num_sinks, why = advised_sinks(model)
    loaded_as = getattr(model.config, "quantization_config", None)
    return {
        "name": args.model or "the one that ships with sinkattn",
        "shipped": args.model is None,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": args.quantize or (loaded_as and str(loaded_as.quant_method)),
        "quantized_share": quantized_share(model) if args.quantize else None,
        "device": str(model.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": weight_bytes(model),
        "trained_length": trained_length(model),
        "suits": {"num_sinks": num_sinks, "why": why, "window": default_window(model, num_sinks)},
    }


def model_lines(model: dict[str, Any]) -> str:
    """The entry of `describe_model` as two lines: what was loaded, and what suits it."""
    dtype, quantization, share = (model[key] for key in ("dtype", "quantization", "quantized_share"))
    if quantization:
        dtype += f" with {quantization} weights" + ("" if share is None else f" ({share:.0%} of them)")
    size = f"{model['parameters'] / 1e6:,.2f} M parameters, {size_text(model['weight_bytes'])}"
    length, suits = model["trained_length"], model["suits"]
    trained = "with no limit to its length" if length is None else f"trained on up to {length:,} tokens"
    sinks = f"{suits['num_sinks']} sinks recommended" if suits["num_sinks"] else "no sinks recommended"
    return (
        f"Model: {model['name']} ({model['class']}, {dtype}, {size}, {model['device']})\n"
        f"Suits it: a window of {suits['window']:,} ({trained}); {sinks}: {suits['why']}"
    )


def describe_text(stream: TokenStream, restarts: int) -> dict[str, Any]:
    """The entry of a text in a report."""
    return {
        "description": stream.text.description,
        "start_token": stream.start_token is not None,
        "started_over": restarts,
    }
