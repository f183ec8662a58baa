"""Arguments that ``sinkattn learn`` and ``sinkattn eval learn`` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sinkattn.cli.arguments import as_argument, count, positive
from sinkattn.cli.errors import UserError, as_user_error, require
from sinkattn.evaluate.variant import Variant, parse_rate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from sinkattn.cli.eval.session import Session
    from sinkattn.hf import OnlineLearner

# Tokens of a text that is held out.
HELD_OUT = 2_000
VARIANT = (
    "lora (adapters) or all (weights), then, if wanted, +decay (1 %% of the way back to the first weights after every "
    "update), +reencode (encode the tokens in sight again after every update), @RATE"
)
variant = as_argument(Variant.parse)


def add_learning(parser: argparse.ArgumentParser, default_held_out: str) -> None:
    """Add how the stream is learned from; ``default_held_out`` says which text is held out by default."""
    parser.add_argument("--cache", metavar="S+W", help="sinks + window (default: 4 sinks, window by the model)")
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="tokens of an update (default: %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=as_argument(parse_rate),
        metavar="R",
        help="learning rate where @RATE is not given (default: 1e-3 for adapters, 1e-5 for all weights)",
    )
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        help=f"another text, whose first {HELD_OUT:,} tokens show what is forgotten (default: {default_held_out})",
    )
    parser.add_argument("--seed", type=count, default=0, help="of the adapters' initial weights (default: %(default)s)")


def with_rate(variants: Sequence[Variant], rate: float | None) -> tuple[Variant, ...]:
    """Give variants without a rate this one. Raises UserError for adapters without peft."""
    if any(each.learn == "lora" for each in variants):
        require("peft", "'sinkattn[learn]'")
    return tuple(replace(each, rate=rate) if each.rate is None else each for each in variants)


def held_out(session: Session) -> dict[str, torch.Tensor]:
    """The ids of the text that is given to be held out, by name; none if none is given."""
    import torch

    from sinkattn.evaluate.text import TextError, TextFile, TokenStream

    if session.args.held_out is None:
        return {}
    try:
        text = TextFile(Path(session.args.held_out))
        ids = list(islice(TokenStream(text, session.tokenizer).once(), HELD_OUT))
    except TextError as error:
        raise UserError(str(error).replace("text", "held-out", 1)) from error
    if len(ids) < 2:
        raise UserError(f"held-out: expected two tokens or more in {text.description}, got {len(ids)}")
    return {text.description: torch.tensor(ids)}


def save_learned(learner: OnlineLearner, variant: Variant, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Save what was learned, if anything was: adapters, or a model with its tokenizer. Returns a line that says so."""
    from safetensors import SafetensorError

    if not learner.num_updates:
        return f"Learned: nothing, 0 updates (each takes {learner.chunk:,} tokens)"
    for config in getattr(learner.model, "peft_config", {}).values():
        config.base_model_name_or_path = learner.model.name_or_path
    with as_user_error(OSError, SafetensorError):
        learner.save(folder)
        if variant.learn == "all":
            tokenizer.save_pretrained(folder)
    return f"Learned: {folder} ({learner.num_updates:,} updates)"
