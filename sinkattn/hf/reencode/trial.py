"""Detect models with absolute positions, and enable them after a trial against the original."""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.dry_run import evaluation_mode, sample_ids
from sinkattn.hf.model_config import find_decoder, trained_length
from sinkattn.hf.reencode.lanes import context_start, rebuild_period
from sinkattn.hf.reencode.patch import ReencodePatch
from sinkattn.hf.trial.agreement import check_agreement, relative_error
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.hf.versions import cache_name, forward_cache
from sinkattn.ops import RingLayout


def has_absolute_positions(model: PreTrainedModel) -> bool:
    """Whether a model adds positions to its embeddings; runs the model.

    The output for a single token changes with its position then. With a rotation of queries and keys, or a bias by
    distance, it does not: the token sees only itself.
    """
    decoder = find_decoder(model)
    parameters = inspect.signature(decoder.forward).parameters
    if not {"input_ids", "position_ids", "use_cache"} <= set(parameters) or cache_name(parameters) is None:
        return False
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return False
    ids = sample_ids(model, 4).view(-1, 1)
    with evaluation_mode(model):
        zero, one = (
            decoder(input_ids=ids, position_ids=torch.full_like(ids, position), use_cache=False)[0]
            for position in (0, 1)
        )
    return not torch.equal(zero, one)


def enable_by_reencoding(model: PreTrainedModel, layout: RingLayout) -> None:
    """Enable a model that adds positions to its embeddings, after a trial.

    Raises:
        UnsupportedModelError: if outputs differ from the original's; the model is left unchanged.
    """
    if trained_length(model) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its configuration has no number of positions (max_position_embeddings)"
        )
    # A small layout, whatever the one asked for, so that a short trial has two rebuilds.
    trial_layout = RingLayout(min(2, layout.num_sinks), min(4, layout.window), 0)
    full = trial_layout.num_sinks + trial_layout.window
    ids = sample_ids(model, full + rebuild_period(trial_layout) + 1)
    patch = ReencodePatch(model, find_decoder(model), trial_layout)
    with evaluation_mode(model):
        _check_causal(type(model).__name__, patch.decoder, ids)
        want, again = (_expected_hidden_states(patch.decoder, ids, trial_layout) for _ in range(2))
        try:
            patch.install()
            options = {patch.cache_argument: SinkCache(model)}
            # Calls that run the decoder on the same shapes as the expected outputs.
            calls = ids.tensor_split((trial_layout.num_sinks, full), dim=1)
            got = torch.cat([patch.decoder(input_ids=call, **options)[0] for call in calls if call.shape[1]], dim=1)
            # Rounding is the same too, unless kernels do not always sum in the same order.
            allowed = max(64 * torch.finfo(torch.float32).eps, 2 * relative_error(again, want))
            check_agreement(type(model).__name__, "its hidden states", relative_error(got, want), allowed)
        except BaseException:
            patch.remove()
            raise
    # The patch that was tried stays installed, now with the layout asked for.
    patch.layout = layout


def _check_causal(name: str, decoder: PreTrainedModel, ids: Tensor) -> None:
    """Refuse a decoder whose tokens see later ones. ids: ``[2, tokens]``."""

    def earlier_states(changed_row: int | None) -> Tensor:
        # Hidden states of the first row before its last token, with the last token of one row changed.
        changed = ids.clone()
        if changed_row is not None:
            changed[changed_row, -1] = ids[changed_row, 0]
        return decoder(input_ids=changed, use_cache=False)[0][0, :-1]

    want = earlier_states(None)
    # Shapes are the same, so rounding is too, unless activations are quantised with one scale for the whole batch: then
    # a change in the other row has an effect as well.
    error, noise = relative_error(earlier_states(0), want), relative_error(earlier_states(1), want)
    if error > max(1e-5, 2 * noise):
        raise UnsupportedModelError(f"{name}: is not causal: outputs change by {error:.1e} with the token after")


def _expected_hidden_states(decoder: PreTrainedModel, ids: Tensor, layout: RingLayout) -> Tensor:
    """Hidden states ``[batch, tokens, hidden]`` of the original decoder for each token at the end of its context.

    Each context is encoded from scratch, the sinks first.
    """
    device, parts = ids.device, []
    name = forward_cache(decoder)
    for start, group in groupby(range(ids.shape[1]), key=lambda token: context_start(token, layout)):
        tokens = list(group)
        options: dict[str, Any] = {name: DynamicCache(config=decoder.config), "use_cache": True}
        outputs, position = [], 0
        for call in (ids[:, : layout.num_sinks], ids[:, start : tokens[-1] + 1]):
            if call.shape[1]:
                positions = torch.arange(position, position + call.shape[1], device=device).unsqueeze(0)
                outputs.append(decoder(input_ids=call, position_ids=positions, **options)[0])
                position += call.shape[1]
        parts.append(torch.cat(outputs, dim=1)[:, -len(tokens) :])
    return torch.cat(parts, dim=1)
