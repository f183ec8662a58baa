"""Does a model have attention sinks, which token is one, and how many are worth keeping?

Much attention on the first token proves little: it can be put there and cost nothing to lose. So the question is
answered by losses, with 0, 1, 2, 4 and 8 sinks in caches of the same total size, and with other tokens in the place of
the first ones; the attention is shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.evaluate.methods import CacheSize, Streamed, twin
from sinkattn.evaluate.perplexity import chunks
from sinkattn.evaluate.statistics import Blocks, Mean
from sinkattn.text import TokenStream

SINK_COUNTS = (0, 1, 2, 4, 8)
# As the paper's experiment with line breaks in the place of the first tokens.
LINE_BREAKS = 4
# Nats per token, one percent of perplexity: less is not worth a sink.
WORTH = 0.01
FIRST_TOKENS = 4
# Attention weights of all layers are held at once, and grow with the square of the tokens.
MOST_MASS_TOKENS = 512


@dataclass(frozen=True)
class Beginning:
    """How a stream begins, and what the number of sinks makes of its loss."""

    name: str
    losses: dict[int, Mean]
    """By number of sinks."""
    gains: dict[int, Mean]
    """Loss with so many sinks minus loss with none, over the same tokens."""


@dataclass
class Result:
    """What was found."""

    total: int
    """Sinks and window together."""
    beginnings: list[Beginning] = field(default_factory=list)
    laps: int = 0
    """How often the text was started over."""
    mass: list[Tensor] | None = None
    """Mean attention on each of the first four tokens by each attention layer, ``[4, heads]``; None if not told."""
    mass_tokens: int = 0
    """Tokens of the stretches that this is of."""

    @property
    def recommended(self) -> int:
        """Fewest sinks whose loss is within one percent of perplexity of the best."""
        losses = {count: mean.loss for count, mean in self.beginnings[0].losses.items()}
        best = min(losses.values())
        return min(count for count, loss in losses.items() if loss <= best + WORTH)

    @property
    def verdict(self) -> str:
        """What the losses say, in a sentence or two."""
        first, *others = self.beginnings
        count = self.recommended
        if not count:
            return "No attention sinks: without any the loss is as good, to one percent of perplexity."
        gain = first.gains[count]
        kept = "1 token" if count == 1 else f"{count} tokens"
        text = f"keeping the first {kept} lowers the loss by {-gain.loss:.3f} nats per token"
        if gain.margin is None or gain.loss + gain.margin > -WORTH:
            margin = "" if gain.margin is None else f", give or take {gain.margin:.3f}"
            return f"Not sure: {text}{margin}; more tokens would tell."
        text = f"Attention sinks: {text}."
        if not others:
            return text
        share = max(other.gains[count].loss / gain.loss for other in others)
        if share > 0.8:
            return f"{text} Other first tokens do as well: the place makes the sink, not the token."
        if share > 0.2:
            return f"{text} Other first tokens bring {share:.0%} of that at most: both place and token matter."
        return f"{text} Other first tokens do not: the sink is the token that this stream begins with."

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "cache": self.total,
            "beginnings": {
                beginning.name: {
                    "losses": {count: mean.as_dict() for count, mean in beginning.losses.items()},
                    "gains": {count: asdict(mean) for count, mean in beginning.gains.items()},
                }
                for beginning in self.beginnings
            },
            "recommended_num_sinks": self.recommended,
            "verdict": self.verdict,
            "attention_on_first_tokens": None if self.mass is None else [layer.tolist() for layer in self.mass],
            "attention_tokens": self.mass_tokens,
        }


Watch = Callable[[str, int], None]
"""Called after every chunk: name of the beginning, tokens done."""


def run(model: PreTrainedModel, stream: TokenStream, total: int, tokens: int, watch: Watch) -> Result:
    """Look for sinks; the model is not changed.

    Args:
        model: a transformers causal language model in evaluation mode.
        stream: the tokens, as they come.
        total: sinks and window together, in tokens.
        tokens: of each stream; those count that come when the window is full.
        watch: is told of progress.

    Raises:
        ValueError: sizes that leave nothing to compare, an empty text, a model that is refused.
    """
    if total <= max(SINK_COUNTS):
        raise ValueError(f"cache: expected more than {max(SINK_COUNTS)} tokens, got {total}")
    if tokens <= total:
        raise ValueError(f"tokens: expected more than those of the cache ({total}), got {tokens}")
    methods = [Streamed(model, CacheSize(count, total - count)) for count in SINK_COUNTS]
    result = Result(total)
    bare = TokenStream(stream.text, stream.tokenizer, with_start=False)
    for name, ids in _beginnings(stream, bare).items():
        blocks = [Blocks(total, tokens) for _ in methods]
        for method in methods:
            method.reset()
        for first, fed, targets in chunks(ids, tokens):
            for method, each in zip(methods, blocks, strict=True):
                each.add(first, method.feed(fed, targets, torch.ones(len(fed), dtype=torch.bool)).losses.numpy())
            watch(name, first + len(fed))
        losses = {count: each.mean() for count, each in zip(SINK_COUNTS, blocks, strict=True)}
        gains = {count: each.difference(blocks[0]) for count, each in zip(SINK_COUNTS, blocks, strict=True)}
        result.beginnings.append(Beginning(name, losses, gains))
    result.laps = max(stream.laps, bare.laps)
    result.mass_tokens = min(total, MOST_MASS_TOKENS)
    result.mass = attention_on_first_tokens(model, iter(stream), result.mass_tokens)
    return result


def _beginnings(stream: TokenStream, bare: TokenStream) -> dict[str, Iterator[int]]:
    if stream.start_token is None:
        beginnings = {"as it comes": iter(stream)}
    else:
        beginnings = {"start token": iter(stream), "no start token": iter(bare)}
    # Some tokenizers know no line breaks.
    if line_break := stream.tokenizer("\n", add_special_tokens=False).input_ids[-1:]:
        beginnings[f"{LINE_BREAKS} line breaks"] = chain(line_break * LINE_BREAKS, iter(bare))
    return beginnings


@torch.inference_mode()
def attention_on_first_tokens(
    model: PreTrainedModel, ids: Iterator[int], length: int, stretches: int = 8
) -> list[Tensor] | None:
    """Mean attention on each of the first four tokens, fp32 ``[4, heads]`` for each attention layer.

    Dense attention over stretches of ``length`` tokens that begin as the stream does; the mean is over all stretches
    and over the queries of the second half of each. None for a model that does not tell its attention.
    """
    eager = twin(model)
    first = next(ids)
    sums: list[Tensor] = []
    for _ in range(stretches):
        fed = torch.tensor([[first, *islice(ids, length - 1)]], device=model.device)
        try:
            eager.set_attn_implementation("eager")
            attentions = eager(input_ids=fed, use_cache=False, output_attentions=True).attentions
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
        layers = [each for each in attentions or () if each is not None and each.shape[-2:] == (length, length)]
        mass = [each[0, :, length // 2 :, :FIRST_TOKENS].float().mean(1).T.cpu() for each in layers]
        sums = [total + each for total, each in zip(sums, mass, strict=True)] if sums else mass
    return [total / stretches for total in sums] or None
