"""`PromptLookup` and `DraftModel`: how a pool drafts tokens, of which one forward checks several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from transformers import PreTrainedModel

from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool.draft_model import ModelDrafter
from sinkattn.hf.pool.drafts import Drafter
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.memory import StreamMemory, memory_for
from sinkattn.hf.pool.model import PoolModel
from sinkattn.hf.pool.prompt_lookup import LookupDrafter
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class PromptLookup:
    """Drafts from a stream itself: what followed its last tokens when they were in sight before.

    Args:
        num_tokens: the most tokens that are drafted at once, up to the headroom of `sinkattn.enable`.
        max_ngram: the most last tokens that are looked for; fewer if so many are not found.

    Raises:
        ValueError: for a number below 1.
    """

    num_tokens: int = 8
    max_ngram: int = 3

    def __post_init__(self) -> None:
        _check_positive("num_tokens", self.num_tokens)
        _check_positive("max_ngram", self.max_ngram)


@dataclass(frozen=True)
class DraftModel:
    """Drafts with a smaller model of the same tokenizer: its most likely tokens.

    It has a stream for each of the pool's, with the same prefix. A stream that begins in the middle of another one, as
    after a fork or `StreamPool.load`, begins with what is in sight.

    Args:
        model: prepared by `sinkattn.enable`, with a headroom of ``num_tokens`` or more.
        num_tokens: the most tokens that are drafted at once, up to the headroom of the pool's model.

    Raises:
        ValueError: for a model that is not enabled, or a number below 1.
    """

    model: PreTrainedModel
    num_tokens: int = 4

    def __post_init__(self) -> None:
        require_patch(self.model)
        _check_positive("num_tokens", self.num_tokens)


Speculation: TypeAlias = PromptLookup | DraftModel


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}")


def drafter_for(
    speculation: Speculation, model: PoolModel, *, num_rows: int, num_sinks: int, tokens_per_step: int
) -> Drafter:
    """What drafts for the streams of a pool of this model; raises ValueError if it cannot.

    Args:
        speculation: how.
        model: of the pool; all of its layers must attend over rings.
        num_rows: rows of the pool.
        num_sinks: the most sinks of a stream.
        tokens_per_step: of the pool.
    """
    _check_headroom("model", model.patch.layout.headroom, speculation.num_tokens)
    if isinstance(speculation, PromptLookup):
        return LookupDrafter(speculation.num_tokens, speculation.max_ngram)
    drafting = PoolModel(speculation.model, None)
    sizes = (model.vocabulary, model.num_ids), (drafting.vocabulary, drafting.num_ids)
    if sizes[0] != sizes[1]:
        raise ValueError(f"speculation: expected a model with a vocabulary of {sizes[0][0]}, got {sizes[1][0]}")
    _check_headroom("draft model", drafting.patch.layout.headroom, speculation.num_tokens)
    memory = memory_for(speculation.model, num_rows, num_sinks)
    if not memory.is_batched:
        raise ValueError(
            "speculation: expected a model all of whose layers attend over rings, got "
            f"{type(speculation.model).__name__}"
        )

    def new_stream(num_sinks: int) -> StreamState:
        ids = StreamIds(drafting.patch.layout_with(num_sinks))
        return StreamState([], drafting.new_sampler(SamplingParams()), StreamMemory(num_sinks), ids, None)

    engine = Engine(memory, num_rows, 0, None, tokens_per_step, speculation.model.device)
    return ModelDrafter(engine, new_stream, speculation.num_tokens)


def _check_headroom(whose: str, headroom: int, num_tokens: int) -> None:
    if headroom < num_tokens:
        raise ValueError(
            f"speculation: expected num_tokens up to {headroom}, the headroom by sinkattn.enable of the {whose}, in "
            f"which wrong tokens are rolled back, got {num_tokens}"
        )
