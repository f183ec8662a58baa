"""``sinkattn generate --follow``: a model reads a text that grows, and says something about it in between."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sinkattn
from sinkattn.cli.arguments import (
    announce_compilation,
    as_argument,
    describe_model,
    load_model,
    model_lines,
    new_folder,
    open_stdin,
    positive,
    sampling,
    window_of,
)
from sinkattn.cli.errors import UserError, as_user_error, discard_stdout, require
from sinkattn.cli.formatting import console, size_text
from sinkattn.cli.learn_arguments import VARIANT, save_learned, variant
from sinkattn.cli.limited import cut_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sinkattn.cli.follow_speaker import Manner
    from sinkattn.evaluate.growing_text import GrowingFile, OpenPipe
    from sinkattn.hf.follow import Follower
    from sinkattn.hf.tokenize_stream import TokenizeStream

MAX_NEW_TOKENS = 64
# Stands for what a user says, to find out what a chat template puts before and after it.
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
# Tokens of an update of the learner.
LEARNED_CHUNK = 256


def add_follow(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of following a text."""
    group = parser.add_argument_group(
        "following a text",
        "With --follow the model reads a text as it comes and says in between what comes next, a line of at most "
        f"--max-new-tokens ({MAX_NEW_TOKENS}), each time after --prompt, if it is given. With --chat the text and the "
        "prompt are what a user says, and what the model says is its reply.",
    )
    group.add_argument(
        "--follow", metavar="FILE", help="file that grows, as for tail -F, from its beginning; - for stdin"
    )
    places = group.add_mutually_exclusive_group()
    places.add_argument("--every", type=positive, metavar="N", help="say something every N tokens")
    places.add_argument("--on-line", action="store_true", help="say something after every line (the default)")
    group.add_argument(
        "--pattern", type=as_argument(_pattern), metavar="REGEX", help="only after lines in which it is found"
    )
    group.add_argument(
        "--keep", action="store_true", help="what is said stays in the stream (default: it leaves no trace there)"
    )
    group.add_argument(
        "--learn", nargs="?", const="lora", type=variant, metavar="V", help=f"learn from the text: {VARIANT}"
    )
    group.add_argument("--save", type=new_folder, metavar="DIR", help="new or empty folder for what was learned")


def is_asked_for(args: argparse.Namespace) -> bool:
    """Whether a text is to be followed. Raises UserError for options that need another one."""
    if args.follow is None:
        for name in ("every", "on_line", "pattern", "keep", "learn", "save"):
            if getattr(args, name):
                raise UserError(f"{name.replace('_', '-')}: needs a text to follow; give --follow FILE, or - for stdin")
        return False
    if args.pattern and args.every:
        raise UserError("pattern: is looked for in lines, and --every speaks after tokens; give one of them")
    if args.save and not args.learn:
        raise UserError("save: nothing is learned; give --learn")
    if args.learn and args.cache_dtype:
        raise UserError("learn: a cache of 8 bits has no gradients; leave --cache-dtype out")
    if args.keep and args.chat:
        raise UserError("keep: in a chat what the model says is not part of what the user says; leave it out")
    return True


def run(args: argparse.Namespace) -> int:
    """Follow a text until it ends, or until Ctrl-C."""
    if args.learn and args.learn.learn == "lora":
        require("peft", "'sinkattn[learn]'")
    source = _open(args.follow)
    model, tokenizer = load_model(args)
    from sinkattn.cli.follow_speaker import Speaker
    from sinkattn.evaluate.interruption import awaited, interruptible
    from sinkattn.hf.follow import Follower
    from sinkattn.hf.tokenize_stream import TokenizeStream

    opening, closing = _around(tokenizer, args.chat)
    if args.chat:
        args.num_sinks = max(args.num_sinks, len(opening))
    print(model_lines(describe_model(model, args)), file=sys.stderr)
    is_there = args.follow == "-" or Path(args.follow).exists()
    print(f"Text: {source.description}{'' if is_there else ', not there yet'}", file=sys.stderr, flush=True)
    learner = None
    with interruptible(model) as pressed:
        with as_user_error(ValueError, RuntimeError, ImportError):
            announce_compilation(args)
            sinkattn.enable(
                model, args.num_sinks, window_of(model, args), compile=args.compile, cache_dtype=args.cache_dtype
            )
            if args.learn:
                from sinkattn.evaluate.learn import new_learner

                learner = new_learner(model, args.learn, LEARNED_CHUNK)
            follower, manner = Follower(model, learner), _manner(args, model, tokenizer, closing)
            follower.say([0], sampling=manner.sampling, **manner.options)  # says nothing yet, but checks the options
        text = TokenizeStream(tokenizer)
        status = _Status(source, follower, text)
        speaker = Speaker(follower, tokenizer, text, manner, status.hide)
        try:
            follower.read(opening)
            for piece in awaited(status.shown(source.pieces()), pressed):
                speaker.read(piece)
            speaker.finish()
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            discard_stdout()
        finally:
            status.hide()
            if learner is not None and args.save:
                print(save_learned(learner, args.learn, tokenizer, args.save), file=sys.stderr)
    cache = follower.cache
    print(
        f"\n{status.work()}, KV cache {size_text(cache.nbytes)} "
        f"({cache.layout.num_sinks} sinks + window of {cache.layout.window})",
        file=sys.stderr,
    )
    if speaker.num_cut_off:
        what = f"{speaker.num_cut_off} of {speaker.num_times} texts were"
        raise cut_off(what, manner.max_new_tokens)
    return 0


def _manner(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closing: list[int]
) -> Manner:
    from sinkattn.cli.follow_speaker import Manner
    from sinkattn.hf.stream import end_ids

    return Manner(
        every=args.every,
        pattern=args.pattern or Manner.pattern,
        prompt=args.prompt or "",
        closing=closing,
        one_line=not args.chat and args.json_schema is None,
        keep=args.keep,
        max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS,
        sampling=sampling(args, model, grammar=args.json_schema),
        options={
            "stop_ids": end_ids(model),
            "tokenizer": tokenizer,
        },
    )


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"expected a regular expression, got {text!r}: {error}") from error


def _open(name: str) -> GrowingFile | OpenPipe:
    from sinkattn.evaluate.growing_text import OpenPipe, open_growing

    if name == "-":
        return OpenPipe(open_stdin().buffer, "stdin")
    with as_user_error(ValueError):
        return open_growing(Path(name))


def _around(tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> tuple[list[int], list[int]]:
    """Ids in front of the text, and those between the prompt and what the model says."""
    if not is_chat:
        return tokenizer("").input_ids, []
    if not tokenizer.chat_template:
        raise UserError("chat: this model's tokenizer has no chat template")
    message = [{"role": "user", "content": MARK}]
    text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    if text.count(MARK) != 1:
        raise UserError("chat: expected a template that has what a user says once, in which a text can grow")
    opening, closing = (tokenizer(part, add_special_tokens=False).input_ids for part in text.split(MARK))
    return opening, closing


class _Status:
    """A line on stderr, if it is a terminal: what was read and said, how fast, and how far behind that is."""

    def __init__(self, source: GrowingFile | OpenPipe, follower: Follower, text: TokenizeStream) -> None:
        self._source, self._follower, self._text = source, follower, text
        self._began, self._waited = time.perf_counter(), 0.0
        self._line: Any = None
        if sys.stderr.isatty():
            require("rich")
            self._line = console(stderr=True).status("", refresh_per_second=4)

    def shown(self, pieces: Iterator[str]) -> Iterator[str]:
        """The same pieces. From the wait for one of them on the line is shown."""
        while True:
            self._show()
            began = time.perf_counter()
            piece = next(pieces, None)
            self._waited += time.perf_counter() - began
            if piece is None:
                return
            yield piece

    def hide(self) -> None:
        """Take the line away."""
        if self._line is not None:
            self._line.stop()

    def work(self) -> str:
        """What was done, and how fast, without the time of waiting for text."""
        loss, said = self._follower.loss, self._follower.num_said
        read = self._follower.num_read + len(self._text.open_ids())
        speed = (read + said) / (time.perf_counter() - self._began - self._waited)
        text = f"{read:,} tokens read, {said:,} said, {speed:,.1f} tokens/s"
        return text if math.isnan(loss) else f"{text}, loss {loss:.3f}"

    def _show(self) -> None:
        if self._line is None:
            return
        layout, behind = self._follower.cache.layout, self._source.behind
        fill = min(1.0, self._follower.num_read / (layout.num_sinks + layout.window))
        lag = "" if behind is None else f", {size_text(behind)} behind"
        self._line.update(f"{self.work()}, cache {fill:.0%} full{lag}")
        self._line.start()
