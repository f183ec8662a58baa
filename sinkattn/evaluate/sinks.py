"""Whether a model has attention sinks, whether they depend on the first token, and how many are worth keeping.

High attention on the first token is not evidence: evicting that token may cost nothing. So the decision is by losses,
with 0, 1, 2, 4 and 8 sinks in caches of the same total size, and with other tokens at the beginning of the stream. The
attention is only reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CacheSize, Streamed, copy_sharing_weights
from sinkattn.evaluate.perplexity import chunks
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks, Mean
from sinkattn.evaluate.text import TokenStream

SINK_COUNTS = (0, 1, 2, 4, 8)
# As in the paper's experiment with line breaks instead of the first tokens (arXiv 2309.17453, table 1).
LINE_BREAKS = 4
# Smaller gains, in nats per token, do not count: about one percent of perplexity.
MIN_GAIN = 0.01
# Of the gain of sinks, which more of them may seem to add by chance.
SMALL_PART = 0.05
FIRST_TOKENS = 4
# The attention weights of all layers are in memory at once, and grow with the square of the tokens.
MAX_ATTENTION_TOKENS = 512
ATTENTION_SEQUENCES = 8


@dataclass(frozen=True)
class Beginning:
    """One way to begin the stream, and its loss by number of sinks."""

    name: str
    losses: dict[int, Mean]
    """Mean loss by number of sinks."""
    gains: dict[int, Mean]
    """By number of sinks: loss with them minus loss without sinks, over the same tokens."""
    behind: dict[int, Mean]
    """By number of sinks: loss with them minus that with the best number, over the same tokens."""


@dataclass
class Result:
    """Losses for each beginning, the attention on the first tokens, and what follows from them."""

    total: int
    """Sinks and window together."""
    beginnings: list[Beginning] = field(default_factory=list)
    restarts: int = 0
    """How many times the text was started over."""
    attention: list[Tensor] | None = None
    """As `attention_on_first_tokens` returns it."""
    attention_tokens: int = 0
    """Length of the sequences that the attention was measured on; 0 if the run was interrupted before."""

    @property
    def recommended(self) -> int:
        """Smallest number of sinks with the loss of the best one: within `MIN_GAIN`, or not shown to be above it.

        The latter only if it has all but a small part of the gain over no sinks, as few tokens show little.
        """
        first = self.beginnings[0]
        return min(count for count, gain in first.gains.items() if _is_enough(gain, first.behind[count]))

    @property
    def verdict(self) -> str:
        """The conclusion from the losses, in a sentence or two."""
        first, *others = self.beginnings
        count = self.recommended
        if not count:
            return "No attention sinks: without any the loss is as good, to one percent of perplexity."
        gain = first.gains[count]
        kept = "1 token" if count == 1 else f"{count} tokens"
        text = f"keeping the first {kept} lowers the loss by {-gain.loss:.3f} nats per token"
        if gain.margin is None or gain.loss + gain.margin > -MIN_GAIN:
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
        """As a dictionary of plain types."""
        attention = None if self.attention is None else [layer.tolist() for layer in self.attention]
        return {
            "cache": self.total,
            "beginnings": {
                beginning.name: {
                    "losses": {count: mean.as_dict() for count, mean in beginning.losses.items()},
                    "gains": {count: asdict(mean) for count, mean in beginning.gains.items()},
                    "behind_best": {count: asdict(mean) for count, mean in beginning.behind.items()},
                }
                for beginning in self.beginnings
            },
            "recommended_num_sinks": self.recommended,
            "verdict": self.verdict,
            "attention_on_first_tokens": attention,
            "attention_tokens": self.attention_tokens,
        }


OnProgress = Callable[[str, int], None]
"""Called after every chunk: name of the beginning, tokens done."""


def seconds(speed: Speed, total: int, tokens: int) -> float:
    """About how long `run` takes, with the three beginnings of a tokenizer with a start token."""
    attention = ATTENTION_SEQUENCES * speed.forward(min(total, MAX_ATTENTION_TOKENS))
    return 3 * len(SINK_COUNTS) * tokens * speed.token + attention


def run(model: PreTrainedModel, stream: TokenStream, total: int, tokens: int, on_progress: OnProgress) -> Result:
    """Measure what sinks are worth; the model is not changed.

    Args:
        model: a transformers causal language model in evaluation mode.
        stream: the tokens; they are also streamed with other beginnings.
        total: sinks and window together, in tokens.
        tokens: length of each stream; losses count once the cache is full.
        on_progress: called after every chunk.

    Raises:
        ValueError: sizes that leave nothing to compare, an empty text, a model that is refused.
        Interrupted: if it is raised in a forward before any loss counts. Later it only leaves out the rest.
    """
    if total <= max(SINK_COUNTS):
        raise ValueError(f"cache: expected more than {max(SINK_COUNTS)} tokens, got {total}")
    if tokens <= total:
        raise ValueError(f"tokens: expected more than the size of the cache ({total}), got {tokens}")
    methods = [Streamed(model, CacheSize(count, total - count)) for count in SINK_COUNTS]
    result = Result(total)
    bare = TokenStream(stream.text, stream.tokenizer, with_start=False)
    try:
        for name, ids in _beginnings(stream, bare).items():
            blocks = [Blocks(total, tokens) for _ in methods]
            done = 0
            try:
                for method in methods:
                    method.reset()
                for first, fed, targets in chunks(ids, tokens):
                    wanted = torch.ones(len(fed), dtype=torch.bool)
                    # Only after all forwards: an interrupted chunk counts for no method.
                    for each, scores in zip(
                        blocks, [method.feed(fed, targets, wanted) for method in methods], strict=True
                    ):
                        each.add(first, scores.losses.numpy())
                    done = first + len(fed)
                    on_progress(name, done)
            finally:
                if done > total:
                    result.beginnings.append(_beginning(name, blocks))
        length = min(total, MAX_ATTENTION_TOKENS)
        result.attention = attention_on_first_tokens(model, iter(stream), length)
        result.attention_tokens = length
    except Interrupted:
        if not result.beginnings:
            raise
    result.restarts = max(stream.restarts, bare.restarts)
    return result


def _is_enough(gain: Mean, behind: Mean) -> bool:
    is_shown_to_be_above = behind.margin is not None and behind.loss > behind.margin
    return behind.loss <= MIN_GAIN or (behind.loss <= -SMALL_PART * gain.loss and not is_shown_to_be_above)


def _beginning(name: str, blocks: list[Blocks]) -> Beginning:
    losses = _present({count: each.mean() for count, each in zip(SINK_COUNTS, blocks, strict=True)})
    gains = _present({count: each.difference(blocks[0]) for count, each in zip(SINK_COUNTS, blocks, strict=True)})
    best = blocks[SINK_COUNTS.index(min(losses, key=lambda count: losses[count].loss))]
    behind = {count: each.difference(best) for count, each in zip(SINK_COUNTS, blocks, strict=True)}
    return Beginning(name, losses, gains, _present(behind))


def _present(means: dict[int, Mean | None]) -> dict[int, Mean]:
    """The same means: as the stream was longer than the cache, there are losses for each number of sinks."""
    return {count: mean for count, mean in means.items() if mean is not None}


def _beginnings(stream: TokenStream, bare: TokenStream) -> dict[str, Iterator[int]]:
    beginnings: dict[str, Iterator[int]]
    if stream.start_token is None:
        beginnings = {"as it comes": iter(stream)}
    else:
        beginnings = {"start token": iter(stream), "no start token": iter(bare)}
    # Some tokenizers have no token for a line break.
    if line_break := stream.tokenizer("\n", add_special_tokens=False).input_ids[-1:]:
        beginnings[f"{LINE_BREAKS} line breaks"] = chain(line_break * LINE_BREAKS, iter(bare))
    return beginnings


@torch.inference_mode()
def attention_on_first_tokens(
    model: PreTrainedModel, ids: Iterator[int], length: int, sequences: int = ATTENTION_SEQUENCES
) -> list[Tensor] | None:
    """Mean attention on each of the first four tokens, fp32 ``[4, heads]`` for each attention layer.

    Dense attention over sequences of ``length`` tokens, which all begin with the first token of the stream. The mean is
    over all sequences and over the queries in the second half of each. None if the model does not return attentions.
    """
    eager = copy_sharing_weights(model)
    first = next(ids)
    sums: list[Tensor] = []
    for _ in range(sequences):
        fed = torch.tensor([[first, *islice(ids, length - 1)]], device=model.device)
        try:
            eager.set_attn_implementation("eager")
            attentions = eager(input_ids=fed, use_cache=False, output_attentions=True).attentions
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return None
        layers = [each for each in attentions or () if each is not None and each.shape[-2:] == (length, length)]
        means = [each[0, :, length // 2 :, :FIRST_TOKENS].float().mean(1).T.cpu() for each in layers]
        sums = [total + each for total, each in zip(sums, means, strict=True)] if sums else means
    return [total / sequences for total in sums] or None
