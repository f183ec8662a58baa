"""Compile the decode step of an enabled model, and compare it with the one that is not compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.dry_run import sample_ids
from sinkattn.hf.ranks import OtherRankError, wait_for_ranks
from sinkattn.hf.swap.ring_patch import RingPatch
from sinkattn.hf.trial.agreement import MAX_FP32_ERROR, check_agreement, relative_error
from sinkattn.hf.unsupported import UnsupportedModelError

PROMPT_TOKENS = 4
# Two, so that nothing of the first one may be part of the graph.
NUM_STEPS = 2
# Relative error allowed with rings of 8 bits, where rounding before may let an element become its neighbour.
MAX_EIGHT_BIT_ERROR = 2**-4


@torch.no_grad()
def compile_step(patch: RingPatch) -> None:
    """Compile the decode step of an installed patch for a single stream; takes seconds to a minute.

    Raises:
        UnsupportedModelError: if it cannot be compiled as one graph, or gives other outputs than before.
    """
    model, name = patch.model, type(patch.model).__name__
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        ids = sample_ids(model, PROMPT_TOKENS + NUM_STEPS)[:1]
        prompt, *steps = ids.split([PROMPT_TOKENS] + [1] * NUM_STEPS, dim=1)
        cache = SinkCache(model)
        _outputs(patch, prompt, cache)
        fork = copy.deepcopy(cache)
        want = [_outputs(patch, step, fork) for step in steps]
        patch.replace_linear_forwards(compiled=True)
        patch.compile_step()
        try:
            got = [_outputs(patch, step, cache) for step in steps]
        except OtherRankError:
            raise
        except Exception as error:  # Dynamo, its backend and the C++ compiler raise many types
            # The first line names the part of the compiler that failed, the second one why.
            reason = " ".join(str(error).strip().splitlines()[:2])
            raise UnsupportedModelError(
                f"{name}: its decode step could not be compiled: {type(error).__name__}: {reason}"
            ) from error
    finally:
        for module in training:
            module.training = True
    allowed = max(
        MAX_FP32_ERROR if patch.cache_dtype is None else MAX_EIGHT_BIT_ERROR, 8 * torch.finfo(model.dtype).eps
    )
    check_agreement(name, "its compiled decode step", relative_error(torch.cat(got), torch.cat(want)), allowed)


def _outputs(patch: RingPatch, ids: Tensor, cache: SinkCache) -> Tensor:
    # Through the whole model, which may pass arguments of its own: others would need another graph.
    options: dict[str, Any] = {patch.model_cache_argument: cache, "use_cache": True, "return_dict": True}
    wait_for_ranks(patch.model)
    return patch.model(input_ids=ids, **options)[0]
