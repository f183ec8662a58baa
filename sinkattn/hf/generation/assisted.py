"""Checks assisted decoding before it runs: the headroom must suffice for its rollbacks."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from sinkattn.hf.generation.options import call_setting
from sinkattn.hf.model_patch import get_patch, require_patch

# Candidates per step of an assistant whose generation config does not set them: the default of transformers.
DEFAULT_ASSISTANT_TOKENS = 20


def num_lookup_tokens(model: PreTrainedModel, kwargs: dict[str, Any]) -> int:
    """Candidates per step of prompt lookup; 0 without it."""
    return call_setting(model, kwargs, "prompt_lookup_num_tokens") or 0


def check_assistant(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for assisted decoding that an enabled model does not support, or that needs more headroom."""
    option = partial(call_setting, model, kwargs)
    if option("assistant_early_exit"):
        raise ValueError(
            "assistant_early_exit: an enabled model runs all of its layers; use an assistant_model instead"
        )
    num_candidates = num_lookup_tokens(model, kwargs)
    if (assistant := kwargs.get("assistant_model")) is not None:
        if "heuristic" in (assistant.generation_config.num_assistant_tokens_schedule or ""):
            raise ValueError(
                "assistant_model: expected a num_assistant_tokens_schedule of 'constant', as the headroom is fixed, "
                f"got {assistant.generation_config.num_assistant_tokens_schedule!r}"
            )
        if kwargs.get("assistant_tokenizer") is not None and not option("do_sample"):
            raise ValueError(
                "assistant_tokenizer: without sampling, an assistant proposes text of any number of this model's "
                "tokens, so no headroom is always enough; expected do_sample=True, or an assistant with the same "
                "tokenizer"
            )
        num_proposed = assistant.generation_config.num_assistant_tokens or DEFAULT_ASSISTANT_TOKENS
        num_candidates = max(num_candidates, num_proposed)
        if get_patch(assistant) is not None:
            _check_headroom(assistant, num_proposed, "assistant_model")
    if option("use_mtp"):
        num_candidates = max(num_candidates, getattr(model.config.get_text_config(), "num_mtp_layers", None) or 0)
    _check_headroom(model, num_candidates, "model")


def _check_headroom(model: PreTrainedModel, num_candidates: int, name: str) -> None:
    headroom = require_patch(model).layout.headroom
    if num_candidates > headroom:
        raise ValueError(
            f"headroom: expected {num_candidates} or more, as assisted decoding rolls back so many tokens, got "
            f"{headroom}; call sinkattn.enable({name}, ..., headroom={num_candidates})"
        )
