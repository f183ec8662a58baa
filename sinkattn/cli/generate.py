"""``sinkattn generate``: endless text from a model."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

import sinkattn
from sinkattn.cli import follow
from sinkattn.cli.arguments import (
    add_cache_dtype,
    add_command,
    add_compile,
    add_layout,
    add_model,
    add_sampling,
    announce_compilation,
    describe_model,
    json_schema,
    load_model,
    model_lines,
    open_stdin,
    positive,
    sampling,
    window_of,
)
from sinkattn.cli.errors import UserError, as_user_error, discard_stdout
from sinkattn.cli.formatting import size_text
from sinkattn.cli.limited import Limited, asked, cut_off

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "generate", run, "generate text without end; Ctrl-C ends it")
    add_model(parser)
    add_compile(parser)
    add_cache_dtype(parser)
    add_layout(parser, None, "1020, or what the model was trained for")
    parser.add_argument("--prompt", metavar="TEXT", help="default: read from stdin")
    parser.add_argument("--max-new-tokens", type=positive, help="default: no limit")
    add_sampling(parser, seed=None, is_chat=False)
    text = "say JSON of this schema, then end; it is an error if --max-new-tokens cuts it off"
    parser.add_argument("--json-schema", type=json_schema, metavar="FILE", help=text)
    parser.add_argument("--stop-at-eos", action="store_true", help="stop at the model's end token")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, in the model's chat template; stop at the end of the reply",
    )
    follow.add_follow(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if follow.is_asked_for(args):
        return follow.run(args)
    prompt = args.prompt
    if prompt is None:
        if open_stdin(replaces=True).isatty():
            raise UserError("prompt: give --prompt TEXT, or pipe a text into stdin")
        prompt = sys.stdin.read()
    model, tokenizer = load_model(args)
    print(model_lines(describe_model(model, args)), file=sys.stderr, flush=True)
    from sinkattn.hf import SinkCache
    from sinkattn.hf.stream import end_ids, stream_text, stream_tokens

    if args.chat and not tokenizer.chat_template:
        raise UserError("chat: this model's tokenizer has no chat template")
    stop_ids = end_ids(model) if args.stop_at_eos or args.chat else []
    if (args.stop_at_eos or args.chat) and not stop_ids:
        raise UserError(f"{'chat' if args.chat else 'stop-at-eos'}: this model has no end token")
    if args.chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=not args.chat, verbose=False).input_ids
    if not prompt_ids:
        raise UserError("prompt: is empty, and this model has no start token")
    with as_user_error(ValueError, RuntimeError, ImportError):
        announce_compilation(args)
        sinkattn.enable(
            model, args.num_sinks, window_of(model, args), compile=args.compile, cache_dtype=args.cache_dtype
        )
        cache = SinkCache(model)
        tokens = stream_tokens(
            model,
            prompt_ids,
            cache,
            max_new_tokens=asked(args.max_new_tokens, has_grammar=args.json_schema is not None),
            stop_ids=stop_ids,
            sampling=sampling(args, model, grammar=args.json_schema),
            tokenizer=tokenizer,
        )
        limited = Limited(tokens, args.max_new_tokens)
        pieces = stream_text(tokenizer, limited, prompt_ids)
    began, is_interrupted = time.perf_counter(), False
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        is_interrupted = True
    except BrokenPipeError:
        discard_stdout()
    seconds = time.perf_counter() - began
    count = limited.count
    print(
        f"\n{count:,} tokens, {count / seconds:.1f} tokens/s, KV cache {size_text(cache.nbytes)} "
        f"({cache.layout.num_sinks} sinks + window of {cache.layout.window})",
        file=sys.stderr,
    )
    if is_interrupted and args.json_schema is not None:
        raise KeyboardInterrupt
    if limited.is_cut_off:
        raise cut_off("the text was", args.max_new_tokens)
    return 0
