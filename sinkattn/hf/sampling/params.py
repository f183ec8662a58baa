"""`SamplingParams`: how the tokens of a stream are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig, LogitsProcessor

from sinkattn.argument_checks import check_kind


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a stream are chosen; the default is greedy decoding.

    Scores are changed in the order of the fields' list below, which is that of transformers' `generate`. The tokens in
    sight are sinks and window, those of the prompt among them, so penalties take constant memory, and a word may come
    again once it is forgotten.

    Args:
        logit_bias: added to the logits of these ids; -inf for tokens that must not come.
        repetition_penalty: the scores of tokens in sight are divided by it if positive, else multiplied; 1 for none.
        frequency_penalty: subtracted from the score of a token for each time that it is in sight.
        presence_penalty: subtracted from the scores of tokens in sight. This and the one before are defined as by
            OpenAI and vLLM, but for the tokens that they count: those in sight, whoever wrote them. No penalty is
            applied to the tokens that end a text, so that a long chat does not lose its ends of turns.
        processors: logits processors of transformers, called for this stream alone with the known ids in sight, int64
            ``[1, tokens]``, and scores, float32 ``[1, vocabulary]``.
        grammar: a JSON schema (a dict, or its text) or a Lark grammar, in which ``start: /.../`` is a regular
            expression; needs ``pip install 'sinkattn[grammar]'``. The text ends when it is complete. JSON comes without
            spaces between its parts; ``x-guidance`` in the schema changes that (documented by llguidance).
        temperature: divides the scores before sampling; 0 for greedy decoding, without the fields below.
        top_k: sample only from the k most likely tokens, and others as likely as the last of them; 0 for all.
        top_p: sample only from the most likely tokens that together reach this probability.
        min_p: sample only from tokens with at least this fraction of the probability of the most likely one; 0 for all.
        seed: of the draws of the stream; None draws one from torch's global generator when the stream begins.
        logprobs: the number of most likely tokens whose log-probabilities are returned with each token, besides its
            own: 0 for its own alone, None for none. They are those of the model's distribution, before any change
            above, as in OpenAI's API and by default in vLLM.

    Raises:
        ValueError: for an invalid value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    processors: Sequence[LogitsProcessor] = ()
    grammar: Mapping[str, Any] | str | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (expected, is_valid) in _RULES.items():
            if not is_valid(value := getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens in sight are penalized."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_ids(self) -> bool:
        """Whether the choice depends on the ids in sight."""
        return self.has_penalties or bool(self.processors)

    @classmethod
    def from_generation_config(cls, config: GenerationConfig | None, **overrides: Any) -> SamplingParams:
        """The parameters by which transformers' `generate` would choose with ``config``, but for ``overrides``.

        Read are temperature, top_k, top_p, min_p and repetition_penalty. Without ``do_sample`` it is greedy decoding.

        Args:
            config: ``model.generation_config``; None is like an empty one.
            overrides: fields to set instead.

        Raises:
            ValueError: for an invalid value.
        """
        if config is not None:
            check_kind("config", config, GenerationConfig, "a GenerationConfig or None")
        defaults = {"temperature": 1.0, "top_k": 50} if config is not None and config.do_sample else {}
        return cls(**{**defaults, **set_values(config), **overrides})


def set_values(config: GenerationConfig | None) -> dict[str, Any]:
    """Fields of `SamplingParams` that a generation configuration sets; those of sampling only if it samples."""
    if config is None:
        return {}
    names = ["repetition_penalty", *(("temperature", "top_k", "top_p", "min_p") if config.do_sample else ())]
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and math.isfinite(value) and fits(float(value))


def _whole(low: int, end: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and low <= int(value) < end


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(token, Integral) and int(token) >= 0 and isinstance(bias, Real) and bias < math.inf  # no NaN
        for token, bias in value.items()
    )


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("0 or more", _number(lambda value: value >= 0)),
    "top_k": ("0 or more", _whole(0, 2**63)),
    "top_p": ("more than 0 and at most 1", _number(lambda value: 0 < value <= 1)),
    "min_p": ("0 to 1", _number(lambda value: 0 <= value <= 1)),
    "repetition_penalty": ("more than 0", _number(lambda value: value > 0)),
    "presence_penalty": ("a number", _number(lambda value: True)),
    "frequency_penalty": ("a number", _number(lambda value: True)),
    "logit_bias": ("a mapping of ids to numbers or -inf", _is_bias),
    "processors": (
        "a list of logits processors",
        lambda value: isinstance(value, Sequence) and all(map(callable, value)),
    ),
    "grammar": (
        "a JSON schema or a Lark grammar",
        lambda value: value is None or isinstance(value, (Mapping, str)),
    ),
    "seed": ("None, or -2**63 to 2**64 - 1", lambda value: value is None or _whole(-(2**63), 2**64)(value)),
    "logprobs": ("None, or 0 or more", lambda value: value is None or _whole(0, 2**63)(value)),
}
