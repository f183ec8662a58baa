"""Assisted decoding: refused before anything runs if the headroom is too small for its rollbacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from sinkattn.hf.generation.options import call_setting
from sinkattn.hf.model_patch import get_patch

# Tokens that an assistant proposes at once if its configuration does not say: transformers' own default.
ASSISTANT_TOKENS = 20


def num_lookup_tokens(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    """Tokens that prompt lookup proposes at once; 0 without it."""
    return call_setting(model, kwargs, "prompt_lookup_num_tokens") or 0


def check_assistant(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuse ways of assisted decoding that cannot work, and a headroom too small for their rollbacks."""
    option = partial(call_setting, model, kwargs)
    if option("assistant_early_exit"):
        raise ValueError("assistant_early_exit: an enabled model runs all of its layers; use an assistant_model")
    candidates = num_lookup_tokens(model, kwargs)
    if (assistant := kwargs.get("assistant_model")) is not None:
        if "heuristic" in (assistant.generation_config.num_assistant_tokens_schedule or ""):
            raise ValueError(
                "assistant_model: expected a num_assistant_tokens_schedule of 'constant', for the headroom is, got "
                f"{assistant.generation_config.num_assistant_tokens_schedule!r}"
            )
        if kwargs.get("assistant_tokenizer") is not None and not option("do_sample"):
            raise ValueError(
                "assistant_tokenizer: without sampling, an assistant proposes text, which may be any number of this "
                "model's tokens, and no headroom is enough for certain; expected do_sample=True, or an assistant with "
                "the same tokenizer"
            )
        proposed = assistant.generation_config.num_assistant_tokens or ASSISTANT_TOKENS
        candidates = max(candidates, proposed)
        if get_patch(assistant) is not None:
            _check_headroom(assistant, proposed, "assistant_model")
    if option("use_mtp"):
        candidates = max(candidates, getattr(model.config.get_text_config(), "num_mtp_layers", None) or 0)
    _check_headroom(model, candidates, "model")


def _check_headroom(model: PreTrainedModel, candidates: int, name: str) -> None:
    headroom = get_patch(model).layout.headroom
    if candidates > headroom:
        raise ValueError(
            f"headroom: expected {candidates} or more, as assisted decoding takes back so many tokens, got {headroom}; "
            f"call sinkattn.enable({name}, ..., headroom={candidates})"
        )
