"""Rows of a batch that ended before others: `generate` feeds them padding until the others have ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.generation.options import call_setting, eos_ids


class RecordedCriterion(StoppingCriteria):
    """A criterion of the user's, and what it last said: asking it twice might not do."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self.criterion = criterion
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """What the criterion says."""
        self.done = self.criterion(input_ids, scores, **kwargs)
        return self.done

    def __getattr__(self, name: str) -> Any:
        """Of the criterion: transformers goes by whether it has an ``eos_token_id``."""
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)


class EndedRows(StoppingCriteria):
    """Watches which rows of a batch have ended, for `generate` feeds those padding until the others have, too."""

    def __init__(self, cache: SinkCache, asked: StoppingCriteriaList, watched: list[RecordedCriterion]) -> None:
        self.cache = cache
        self.asked = asked
        self.watched = watched
        self.done: Tensor | None = None
        self.padding: Tensor | None = None
        """Rows whose last id is padding."""

    @classmethod
    def watch(cls, model: PreTrainedModel, cache: SinkCache, kwargs: dict[str, Any]) -> EndedRows | None:
        """Put one in the arguments of `generate`; None if rows are never padded there."""
        eos = eos_ids(model, kwargs, model.device)
        given = list(kwargs.get("stopping_criteria") or ())
        if eos is None and not any(hasattr(criterion, "eos_token_id") for criterion in given):
            return None  # rows that have ended go on
        # Those of transformers take the place of its defaults by their class; these go by the ids alone.
        asked = StoppingCriteriaList(x for x in given if type(x) in (EosTokenCriteria, StopStringCriteria))
        if eos is not None and not any(type(x) is EosTokenCriteria for x in asked):
            asked.append(EosTokenCriteria(eos))
        stop_strings = call_setting(model, kwargs, "stop_strings")
        if stop_strings and not any(type(x) is StopStringCriteria for x in asked) and kwargs.get("tokenizer"):
            asked.append(StopStringCriteria(kwargs["tokenizer"], stop_strings))
        # Others of transformers end all rows at once.
        criteria = [x if type(x).__module__.startswith("transformers.") else RecordedCriterion(x) for x in given]
        ended = cls(cache, asked, [x for x in criteria if isinstance(x, RecordedCriterion)])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, ended])
        return ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        """End nothing."""
        done = self.asked(input_ids, scores, **kwargs)
        for criterion in self.watched:
            done = done | torch.as_tensor(criterion.done, device=done.device)
        before = torch.zeros_like(done) if self.done is None else self.done
        self.padding, self.done = before, before | done
        # What was chosen last is fed next.
        if not self.cache.has_states and not (before.is_cpu and not before.any()):
            self.cache.state.ended_rows = before
        return torch.zeros_like(done)

    def settle(self, sequences: Tensor) -> None:
        """Leave word in the cache, once `generate` is done, of which rows ended before others."""
        if self.padding is None or not self.padding.any():
            return
        state = self.cache.state
        if self.cache.has_states:
            state.can_replay = False
            state.unusable_reason = (
                f"row {int(self.padding.nonzero()[0])} ended before others, and the padding that it was given since is "
                "in its state; call reset(), and run rows that may end at different times one by one"
            )
        else:
            self.cache.state.note_ended(self.padding, sequences[:, -1])
