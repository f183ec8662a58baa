"""Tracks the rows of a batch that end before others, because `generate` feeds them padding until all have ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.generation.options import call_setting, eos_ids


class RecordedCriterion(StoppingCriteria):
    """Wraps a criterion of the user and records its last result, so that it is called once per step."""

    def __init__(self, criterion: StoppingCriteria) -> None:
        self.criterion = criterion
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Call the criterion and record its result."""
        self.done = self.criterion(input_ids, scores, **kwargs)
        return self.done

    def __getattr__(self, name: str) -> Any:
        """Attributes of the criterion: transformers checks for ``eos_token_id``."""
        if name == "criterion":
            raise AttributeError(name)
        return getattr(self.criterion, name)


class EndedRows(StoppingCriteria):
    """Stopping criterion that stops nothing, but tells the cache which rows have ended.

    Args:
        cache: cache of the `generate` call.
        own_criteria: criteria that this one calls itself.
        user_criteria: criteria that ran before it in the same step; their recorded results are read.
    """

    def __init__(
        self, cache: SinkCache, own_criteria: StoppingCriteriaList, user_criteria: list[RecordedCriterion]
    ) -> None:
        self.cache = cache
        self.own_criteria = own_criteria
        self.user_criteria = user_criteria
        self.done: Tensor | None = None
        """Rows that have ended: bool ``[batch]``."""
        self.padded_rows: Tensor | None = None
        """Rows whose last id is padding, as they had ended before it: bool ``[batch]``."""

    @classmethod
    def watch(cls, model: PreTrainedModel, cache: SinkCache, kwargs: dict[str, Any]) -> EndedRows | None:
        """Add one to the criteria in the arguments of `generate`; None if it never pads rows that have ended."""
        eos = eos_ids(model, kwargs, model.device)
        given = list(kwargs.get("stopping_criteria") or ())
        if eos is None and not any(hasattr(criterion, "eos_token_id") for criterion in given):
            return None  # transformers does not pad rows without an end-of-sequence id
        # A criterion of these classes replaces the default of transformers. They depend only on the ids, so they can be
        # called twice per step.
        own_criteria = StoppingCriteriaList(x for x in given if type(x) in (EosTokenCriteria, StopStringCriteria))
        if eos is not None and not any(type(x) is EosTokenCriteria for x in own_criteria):
            own_criteria.append(EosTokenCriteria(eos))
        stop_strings = call_setting(model, kwargs, "stop_strings")
        if stop_strings and not any(type(x) is StopStringCriteria for x in own_criteria) and kwargs.get("tokenizer"):
            own_criteria.append(StopStringCriteria(kwargs["tokenizer"], stop_strings))
        # The other criteria of transformers end all rows at once.
        criteria = [x if type(x).__module__.startswith("transformers.") else RecordedCriterion(x) for x in given]
        ended = cls(cache, own_criteria, [x for x in criteria if isinstance(x, RecordedCriterion)])
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, ended])
        return ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Update which rows have ended; all False, so that it ends none."""
        done = self.own_criteria(input_ids, scores, **kwargs)
        for criterion in self.user_criteria:
            done = done | torch.as_tensor(criterion.done, device=done.device)
        before = torch.zeros_like(done) if self.done is None else self.done
        self.padded_rows, self.done = before, before | done
        # The next forward feeds the last ids, which are padding in these rows.
        if not self.cache.has_states and not (before.is_cpu and not before.any()):
            self.cache.state.ended_rows = before
        return torch.zeros_like(done)

    def record_in_cache(self, sequences: Tensor) -> None:
        """Record in the cache, once `generate` has returned ``sequences``, which rows ended before others."""
        if self.padded_rows is None or not self.padded_rows.any():
            return
        state = self.cache.state
        if self.cache.has_states:
            state.can_prefill_again = False
            state.unusable_reason = (
                f"row {int(self.padded_rows.nonzero()[0])} ended before others, and the padding that generate fed it "
                "has changed its states; call reset(), and run rows that may end at different times one by one"
            )
        else:
            state.note_ended_rows(self.padded_rows, sequences[:, -1])
