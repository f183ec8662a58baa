"""``sinkattn serve``: a server with OpenAI's API."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
from contextlib import suppress
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import sinkattn
from sinkattn.cli.arguments import (
    MODEL,
    add_cache_dtype,
    add_command,
    add_compile,
    add_sampling,
    add_weights,
    announce_compilation,
    count,
    describe_model,
    load_model,
    model_lines,
    positive,
    sampling,
)
from sinkattn.cli.errors import UserError, as_user_error, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sinkattn.cli.arguments import Commands
    from sinkattn.serve.limits import Limits
    from sinkattn.serve.server import Server

PREFIX = 512
HEADROOM = 512
KEY_VARIABLE = "SINKATTN_API_KEYS"


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "serve", run, "serve a model with OpenAI's API, and a page to try it")
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_weights(parser)
    add_compile(parser)
    add_cache_dtype(parser)
    parser.add_argument("--name", help="by which requests name the model (default: MODEL)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s, for this machine alone)")
    parser.add_argument("--port", type=count, default=8000, metavar="N", help="default: %(default)s; 0 for any")
    parser.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help=f"a key in each line, or NAME:KEY; also in the environment as {KEY_VARIABLE}, with commas; needed for any "
        "host but this machine",
    )
    parser.add_argument("--window", type=positive, metavar="N", help="most recent tokens kept besides a system prompt")
    parser.add_argument(
        "--max-prefix", type=positive, default=PREFIX, metavar="N", help="most tokens of a system prompt (%(default)s)"
    )
    parser.add_argument("--max-streams", type=positive, default=16, metavar="N", help="on the device (%(default)s)")
    parser.add_argument("--max-parked", type=count, default=64, metavar="N", help="in host memory (%(default)s)")
    parser.add_argument("--sessions", type=Path, metavar="DIR", help="where sessions are saved, also at the end")
    parser.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N[-M]",
        help="servers with a model each, by Ray Serve, that share --sessions: N, or as many as it takes up to M",
    )
    group = parser.add_argument_group("limits")
    group.add_argument("--max-tokens", type=positive, default=4096, metavar="N", help="of a reply (%(default)s)")
    group.add_argument("--max-body", type=positive, default=4, metavar="MIB", help="of a request (%(default)s)")
    group.add_argument("--max-requests", type=positive, default=64, metavar="N", help="at a time (%(default)s)")
    group.add_argument("--sessions-per-key", type=positive, default=64, metavar="N", help="default: %(default)s")
    group.add_argument("--idle-minutes", type=positive, default=60, metavar="N", help="of a session (%(default)s)")
    add_sampling(parser, seed=None)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    uvicorn = require("uvicorn", "'sinkattn[serve]'")
    for name in ("fastapi", "prometheus_client", "pythonjsonlogger", "sse_starlette"):
        require(name, "'sinkattn[serve]'")
    keys = _keys(args)
    if not keys and not _is_loopback(args.host):
        raise UserError(f"--host {args.host}: expected --api-keys with it, as others can reach it")
    rank, ranks = _rank()
    if args.replicas is not None:
        if ranks > 1:
            raise UserError("--replicas: expected none under torchrun, whose processes have a model together")
        return _run_replicas(args, keys)
    model, tokenizer = load_model(args, spread=ranks > 1)
    if rank:
        return _join(model, args)
    print(model_lines(describe_model(model, args)), flush=True)
    with as_user_error(ValueError, RuntimeError, OSError):
        server = make_server(model, tokenizer, args, keys, leads=ranks > 1)
    from sinkattn.serve.app import create_app
    from sinkattn.serve.events import CUT_WITHIN

    _log_as_json()
    config = uvicorn.Config(
        create_app(server),
        host=args.host,
        port=args.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(CUT_WITHIN),
        ws_max_size=args.max_body << 20,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()
    return 0


def _rank() -> tuple[int, int]:
    """The number of this process among those that torchrun has started, and how many they are."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _join(model: PreTrainedModel, args: argparse.Namespace) -> int:
    """Do on another rank what the model of rank 0 does, until its server ends."""
    from sinkattn.hf import join_pool

    with as_user_error(ValueError, RuntimeError):
        _enable(model, args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # torchrun sends it to all, and rank 0 still has replies to end
    with as_user_error(ValueError):
        join_pool(model)
    return 0


def _run_replicas(args: argparse.Namespace, keys: dict[str, str]) -> int:
    import torch

    if args.sessions is None:
        raise UserError("--replicas: expected --sessions with it, which they share")
    require("ray.serve", "'sinkattn[ray]'")
    from sinkattn.serve.ray_app import Replicas, application, run

    args.sessions = args.sessions.resolve()

    def make() -> Server:
        return make_server(*load_model(args), args, keys)

    least, most = args.replicas
    has_gpu = args.device != "cpu" and torch.cuda.is_available()
    replicas = Replicas(least=least, most=most, num_gpus=int(has_gpu))
    run(
        application(make, max_streams=args.max_streams, requests=args.max_requests, replicas=replicas),
        args.host,
        args.port,
    )
    return 0


def make_server(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    keys: dict[str, str],
    *,
    leads: bool = False,
) -> Server:
    """Make a model stream, and a server of it; ``leads``: it is spread over ranks, of which this is the first."""
    from sinkattn.serve.access import Keys
    from sinkattn.serve.server import Server

    announce_compilation(args)
    window, max_prefix = _enable(model, args)
    pool = sinkattn.StreamPool(
        model, args.max_streams, max_parked=args.max_parked, tokenizer=tokenizer, max_prefix=max_prefix, leads=leads
    )
    params = sampling(args, model)
    defaults = {each.name: getattr(params, each.name) for each in fields(params) if each.name != "seed"}
    path = Path(args.model)
    name = args.name or (path.name if path.exists() else args.model)
    return Server(pool, name, window, defaults, Keys(keys), _limits(args), args.sessions)


def _enable(model: PreTrainedModel, args: argparse.Namespace) -> tuple[int, int]:
    """Make a model stream; returns the window, and the most tokens of a system prompt."""
    from sinkattn.hf.model_config import default_window, trained_length

    trained = trained_length(model)
    max_prefix = args.max_prefix if trained is None else min(args.max_prefix, max(1, trained // 4))
    window = args.window or default_window(model, max_prefix)
    # The sinks are the system prompt, whose length each chat has of its own.
    headroom = min(window, HEADROOM)
    sinkattn.enable(model, 0, window, headroom, compile=args.compile, cache_dtype=args.cache_dtype)
    return window, max_prefix


def _limits(args: argparse.Namespace) -> Limits:
    from sinkattn.serve.limits import Limits

    return Limits(
        body_bytes=args.max_body << 20,
        max_tokens=args.max_tokens,
        sessions_per_key=args.sessions_per_key,
        requests=args.max_requests,
        idle_seconds=60.0 * args.idle_minutes,
    )


def _keys(args: argparse.Namespace) -> dict[str, str]:
    """Keys by the names of clients."""
    lines = os.environ.get(KEY_VARIABLE, "").split(",")
    if args.api_keys is not None:
        with as_user_error(OSError, UnicodeDecodeError):
            lines += args.api_keys.read_text(encoding="utf-8").splitlines()
    keys: dict[str, str] = {}
    for line in (x for line in lines if (x := line.strip()) and not x.startswith("#")):
        name, _, key = (part.strip() for part in line.rpartition(":"))
        # Without a name, sessions that are saved belong to the key, wherever its line is.
        name = name or hashlib.sha256(key.encode()).hexdigest()
        if not key or name in keys:
            raise UserError(
                f"--api-keys: expected NAME:KEY, each name once, got {'no key' if not key else 'another'} of {name!r}"
            )
        keys[name] = key
    if args.api_keys is not None and not keys:
        raise UserError(f"--api-keys: expected a key or more in {args.api_keys}, got none")
    return keys


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    numbers = positive(least), positive(most or least)
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"expected N or N-M with N up to M, got {text!r}")
    return numbers


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_as_json() -> None:
    """Log lines of JSON to stderr."""
    from pythonjsonlogger.core import RESERVED_ATTRS
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler()
    fields = "{asctime}{levelname}{name}{message}"
    handler.setFormatter(JsonFormatter(fields, style="{", reserved_attrs=[*RESERVED_ATTRS, "color_message"]))
    for name in ("uvicorn", "sinkattn.serve"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
