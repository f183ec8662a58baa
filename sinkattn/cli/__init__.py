"""The command line: ``sinkattn demo | generate | chat | serve | learn | eval | info``, also as ``python -m sinkattn``.

Exit codes: 0 when done, 2 for an error that the user can correct (one line on stderr says how), 130 when interrupted.
`generate`, `chat` and `learn` run until Ctrl-C, so they exit with 0 when interrupted; `learn` once it has read a chunk,
`generate` unless JSON was interrupted. JSON that --max-new-tokens cuts off is an error of the user.

Each command has a module here with its arguments and what it prints. The modules import torch, transformers, the
packages of the extra ``cli``, and what needs them, only when a command runs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Sequence

import sinkattn
from sinkattn.cli import chat, demo, generate, info, learn, serve
from sinkattn.cli import eval as evaluations
from sinkattn.cli.errors import UserError, discard_stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = build_parser().parse_args(argv)
    for name in ("torchao", "torch.utils._pytree"):
        # transformers and peft import torchao, whose remarks on libraries that it does not find concern no model here.
        logging.getLogger(name).setLevel(logging.ERROR)
    # Imports leave hardly any garbage, and looking for it takes a sixth of their time; `load_model` enables it again.
    gc.disable()
    try:
        return args.run(args)
    except UserError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        discard_stdout()
        return 0
    finally:
        gc.unfreeze()
        gc.enable()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Parsed arguments have ``run``, the command's function, and ``prog``, its name."""
    parser = argparse.ArgumentParser(
        prog="sinkattn", description="Endless streams for transformers models, in constant memory."
    )
    parser.add_argument("--version", action="version", version=f"sinkattn {sinkattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (demo, generate, chat, serve, learn, evaluations, info):
        command.add_parser(commands)
    return parser
