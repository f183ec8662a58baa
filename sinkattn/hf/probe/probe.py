"""Find out by running a model which modules attend, with which masks, and how they rotate queries and keys.

Nothing is inferred from the model's name. Three short forwards run with an attention function that records its
arguments: with the model's rotary embedding, with the identity in its place, and with the identity at shifted
positions. The function returns a result that does not depend on queries and keys, so the hidden states of all three are
the same. The recorded queries and keys must match one known rotary convention. Masks are classified by evaluating the
mask functions that the model passes to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.dry_run import evaluation_mode
from sinkattn.hf.model_config import find_decoder
from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.hf.probe.recording import AttentionCall, Recording, record_forward
from sinkattn.hf.probe.result import LayerInfo, ProbeResult, Temperature
from sinkattn.hf.probe.rotations import (
    candidate_ropes,
    distinct_frequencies,
    find_rotation,
    inv_freq_buffers,
    without_rotation,
)
from sinkattn.hf.probe.unrotated import unrotated_forward
from sinkattn.hf.ranks import OtherRankError
from sinkattn.hf.unsupported import UnsupportedModelError

PROBE_TOKENS = 8

# Arguments of the attention function that the patched model handles.
APPLIED_OPTIONS = {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}
# Arguments that do not change the result of attention.
IGNORED_OPTIONS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


def probe(model: PreTrainedModel) -> ProbeResult:
    """Find the decoder, its rotary modules and how each attention module masks and rotates; leaves the model unchanged.

    Raises:
        UnsupportedModelError: naming the first thing that is not supported.
    """
    name = type(model).__name__
    decoder = find_decoder(model)
    result = ProbeResult(decoder, [module for module in decoder.modules() if inv_freq_buffers(module)])
    embeddings: Any = model.get_input_embeddings()
    positions = torch.arange(PROBE_TOKENS, device=embeddings.weight.device)
    ids = (positions * 7919 + 13) % embeddings.weight.shape[0]  # fixed, so that every probe gives the same result
    with evaluation_mode(model):
        rotated = record_forward(decoder, ids)
        with without_rotation(result.rotary_modules):
            unrotated = record_forward(decoder, ids)
            shifted = record_forward(decoder, ids, position_ids=positions.unsqueeze(0) + 1)

    _check_calls(model, rotated)
    if any(not torch.equal(x.value, y.value) for x, y in zip(unrotated.calls, shifted.calls, strict=True)):
        raise UnsupportedModelError(
            f"{name}: position_ids change attention values even without its rotary embedding; sinkattn cannot move "
            "such keys"
        )
    if not result.rotary_modules and (tables := _position_tables(decoder)):
        raise UnsupportedModelError(f"{name}: expected a rotary embedding, found none, but tables {tables}")
    # Only now: the short forward has reset length-dependent frequencies to those of short inputs.
    candidates = candidate_ropes(model, distinct_frequencies(result.rotary_modules), ids, rotated)
    for with_rotation, without in zip(rotated.calls, unrotated.calls, strict=True):
        module, index = with_rotation.module, with_rotation.module.layer_idx
        _check_options(name, with_rotation)
        mask = _mask_pattern(name, rotated, with_rotation)
        rotation = find_rotation(with_rotation, without, candidates[index], positions)
        unchanged = torch.equal(with_rotation.key, without.key) and torch.equal(with_rotation.query, without.query)
        if rotation is None and not unchanged:
            raise UnsupportedModelError(
                f"{name}: layer {index} changes queries and keys by position in a way that is not a known rotary "
                "embedding"
            )
        result.layers[module] = LayerInfo(index, rotation, mask, _temperature(module))
    # The attention function returned the values, so rotation must not have changed the output.
    if not torch.equal(rotated.output, unrotated.output):
        raise UnsupportedModelError(
            f"{name}: its rotary embedding changes more than the queries and keys passed to transformers' attention "
            "function"
        )
    with evaluation_mode(model):
        result.unrotated_forwards = _unrotated_forwards(result, ids, unrotated)
    return result


def _unrotated_forwards(result: ProbeResult, ids: Tensor, unrotated: Recording) -> dict[nn.Module, Callable]:
    """Forwards of the layers that rotate; empty unless all give what the hook on the rotary modules gives."""
    forwards = {module: unrotated_forward(module) for module, layer in result.layers.items() if layer.rotation}
    found: dict[nn.Module, Callable] = {module: x for module, x in forwards.items() if x is not None}
    if len(found) < len(forwards):
        return {}
    with without_rotation(result.rotary_modules), ExitStack() as restored:
        for module, forward in found.items():
            module.__dict__["forward"] = forward
            restored.callback(module.__dict__.pop, "forward")
        try:
            recorded = record_forward(result.decoder, ids)
        except OtherRankError:
            raise
        except Exception:  # the model's code, run in another way than it was written for
            return {}
    is_same = len(recorded.calls) == len(unrotated.calls) and all(
        x.module is y.module and torch.equal(x.query, y.query) and torch.equal(x.key, y.key)
        for x, y in zip(recorded.calls, unrotated.calls, strict=True)
    )
    return found if is_same and torch.equal(recorded.output, unrotated.output) else {}


def _check_calls(model: PreTrainedModel, recording: Recording) -> None:
    """Refuse a model unless each layer calls the attention function at most once, with finite values."""
    name = type(model).__name__
    indices = [getattr(call.module, "layer_idx", None) for call in recording.calls]
    if not indices:
        raise UnsupportedModelError(f"{name}: none of its modules calls transformers' attention function")
    if len(set(indices)) != len(indices) or None in indices:
        raise UnsupportedModelError(
            f"{name}: expected at most one call of the attention function in each layer, got layers {indices}"
        )
    for call in recording.calls:
        if not call.value.isfinite().all():
            raise UnsupportedModelError(
                f"{name}: in {model.dtype} its own values in layer {call.module.layer_idx} are not finite; load it in "
                "bfloat16 or float32"
            )


def _check_options(name: str, call: AttentionCall) -> None:
    """Refuse a layer that is not causal or passes an unknown argument to its attention function."""
    unknown = {
        option
        for option, value in call.options.items()
        if value is not None
        and option not in APPLIED_OPTIONS | IGNORED_OPTIONS
        and not (option == "is_causal" and value)
    }
    if unknown or not getattr(call.module, "is_causal", True):
        problem = f"passes {sorted(unknown)} to its attention function" if unknown else "is not causal"
        raise UnsupportedModelError(f"{name}: layer {call.module.layer_idx} {problem}")


def _mask_pattern(name: str, recording: Recording, call: AttentionCall) -> MaskPattern:
    """Pattern of the mask of a call, or of its ``sliding_window`` argument if its mask is full causal."""
    layer = f"{name}: layer {call.module.layer_idx}"
    if recording.has_own_mask(call):
        raise UnsupportedModelError(f"{layer} gets an attention mask that the model makes itself")
    mask = recording.mask_pattern(call)
    if mask is None:
        raise UnsupportedModelError(
            f"{layer} has an unsupported attention mask, expected full causal, a sliding window or chunks"
        )
    window = call.options.get("sliding_window")
    if window is not None and mask.kind == "full":
        return MaskPattern("window", window)
    if window is not None and mask != ("window", window):
        raise UnsupportedModelError(
            f"{layer} passes sliding_window={window} to its attention function, but its mask shows a {mask.kind} of "
            f"{mask.size} tokens"
        )
    return mask


def _position_tables(decoder: PreTrainedModel) -> list[str]:
    # By name: a model may index its table by the length of its cache and ignore position_ids.
    words = ("position", "pos_emb", "wpe")
    return [name for name, _ in decoder.named_parameters() if any(word in name for word in words)]


def _temperature(module: Any) -> Temperature | None:
    # In layers without rotary embedding Llama 4 takes the position from the length of the cache.
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        return Temperature(float(module.floor_scale), float(module.attn_scale))
    return None
