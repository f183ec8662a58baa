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
    mass: Tensor | None = None
    """Mean attention on each of the first four tokens, ``[4, layers, heads]``; None if the model does not tell it."""

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
        if not self.recommended or not _helps(gain := first.gains[self.recommended]):
            return "No attention sinks: without any the loss is as good, to one percent of perplexity."
        kept = "1 token" if self.recommended == 1 else f"{self.recommended} tokens"
        text = f"Attention sinks: keeping the first {kept} lowers the loss by {-gain.loss:.3f} nats per token."
        most = max(SINK_COUNTS)
        share = max(other.gains[most].loss / first.gains[most].loss for other in others)
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
            "attention_on_first_tokens": None if self.mass is None else self.mass.tolist(),
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
    for name, ids in _beginnings(stream).items():
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
    result.mass = attention_on_first_tokens(model, iter(stream), total)
    return result


def _beginnings(stream: TokenStream) -> dict[str, Iterator[int]]:
    line_break = stream.tokenizer("\n", add_special_tokens=False).input_ids[-1:]
    bare = TokenStream(stream.text, stream.tokenizer, with_start=False)
    if stream.start_token is None:
        beginnings = {"as it comes": iter(stream)}
    else:
        beginnings = {"start token": iter(stream), "no start token": iter(bare)}
    return {**beginnings, f"{LINE_BREAKS} line breaks": chain(line_break * LINE_BREAKS, iter(bare))}


@torch.inference_mode()
def attention_on_first_tokens(
    model: PreTrainedModel, ids: Iterator[int], length: int, stretches: int = 8
) -> Tensor | None:
    """Mean attention on each of the first four tokens, fp32 ``[4, layers, heads]``; None if a model does not tell it.

    Dense attention over stretches of ``length`` tokens that begin as the stream does; the mean is over all stretches
    and over the queries of the second half of each.
    """
    eager = twin(model)
    eager.set_attn_implementation("eager")
    first = next(ids)
    sums = None
    for _ in range(stretches):
        fed = torch.tensor([[first, *islice(ids, length - 1)]], device=model.device)
        try:
            attentions = eager(input_ids=fed, use_cache=False, output_attentions=True).attentions
        except (NotImplementedError, ValueError):
            return None
        layers = [each for each in attentions or () if each is not None and each.shape[-2:] == (length, length)]
        if not layers:
            return None
        mass = torch.stack([each[0, :, length // 2 :, :FIRST_TOKENS].float().mean(1).T for each in layers], dim=1)
        sums = mass if sums is None else sums + mass
    return (sums / stretches).cpu()


def _helps(gain: Mean) -> bool:
    return gain.loss + (gain.margin or 0.0) < -WORTH
