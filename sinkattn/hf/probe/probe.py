"""Finding out what a model does, by running it: which modules attend, to what, and how they rotate queries and keys.

Nothing is assumed from a model's name. Three short forwards run with an attention function that records what it gets
and returns something independent of queries and keys, so that all see the same hidden states: one with the model's
rotary embedding, one with the identity in its place, and one more at shifted positions. What comes out must be
explained by one known convention. The masks that the model asks for are made by a function that finds out which tokens
they show.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkattn.hf.dry_run import evaluation_mode
from sinkattn.hf.model_config import find_decoder
from sinkattn.hf.probe.masks import MaskPattern
from sinkattn.hf.probe.recording import Call, record_forward
from sinkattn.hf.probe.result import LayerInfo, ProbeResult, Temperature
from sinkattn.hf.probe.rotations import (
    distinct_frequencies,
    explain_rotation,
    inv_freq_buffers,
    ropes_by_layer,
    without_rotation,
)
from sinkattn.hf.unsupported import UnsupportedModelError

PROBE_TOKENS = 8


# Arguments of an attention function that the swap honours, and those that say nothing about the result.
HONOURED = {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}


HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}


HARMLESS |= {"return_dict", "cache_position"}


def probe(model: PreTrainedModel) -> ProbeResult:
    """Find the decoder, its rotary modules and what each attention module does; leaves the model as it was.

    Raises:
        UnsupportedModelError: saying what could not be explained.
    """
    name = type(model).__name__
    decoder = find_decoder(model)
    probe_result = ProbeResult(decoder, [module for module in decoder.modules() if inv_freq_buffers(module)])
    device = model.get_input_embeddings().weight.device
    positions = torch.arange(PROBE_TOKENS, device=device)
    with evaluation_mode(model):
        embeddings = model.get_input_embeddings().weight
        # Fixed rows of the table, so that a probe is the same every time.
        ids = (positions * 7919 + 13) % embeddings.shape[0]
        rotated = record_forward(decoder, ids)
        with without_rotation(probe_result.rotaries):
            plain = record_forward(decoder, ids)
            moved = record_forward(decoder, ids, position_ids=positions.unsqueeze(0) + 1)

    indices = [getattr(call.module, "layer_idx", None) for call in rotated.calls]
    if not indices:
        raise UnsupportedModelError(f"{name}: none of its modules calls transformers' attention function")
    if len(set(indices)) != len(indices) or None in indices:
        raise UnsupportedModelError(
            f"{name}: expected at most one call of the attention function in each layer, got layers {indices}"
        )
    for call in rotated.calls:
        if not call.value.isfinite().all():
            raise UnsupportedModelError(
                f"{name}: in {model.dtype} its own values in layer {call.module.layer_idx} are not finite; load it in "
                "bfloat16 or float32"
            )
    if any(not torch.equal(here.value, there.value) for here, there in zip(plain.calls, moved.calls, strict=True)):
        raise UnsupportedModelError(
            f"{name}: positions come in by another way than a rotary embedding; such keys cannot be moved"
        )
    if not probe_result.rotaries and (tables := _position_tables(decoder)):
        raise UnsupportedModelError(f"{name}: expected a rotary embedding, found none, but tables {tables}")
    # Read only now: a short forward puts length-dependent frequencies back to those of short inputs.
    frequencies = distinct_frequencies(probe_result.rotaries)
    users = ropes_by_layer(model, frequencies, ids, rotated)
    for with_rotation, without in zip(rotated.calls, plain.calls, strict=True):
        index = with_rotation.module.layer_idx
        _check_options(name, with_rotation)
        visible = rotated.visible(with_rotation)
        if visible is None:
            raise UnsupportedModelError(f"{name}: layer {index} gets an attention mask that the model makes itself")
        window = with_rotation.options.get("sliding_window")
        if window is not None and visible.kind == "all":
            visible = MaskPattern("window", window)
        if window is not None and visible != ("window", window):
            raise UnsupportedModelError(
                f"{name}: layer {index} has a sliding window of {window} tokens, and a mask that shows another part: "
                f"{visible.kind} {visible.size}"
            )
        rotation = explain_rotation(with_rotation, without, users[index], positions)
        unmoved = torch.equal(with_rotation.key, without.key) and torch.equal(with_rotation.query, without.query)
        if rotation is None and not unmoved:
            raise UnsupportedModelError(
                f"{name}: layer {index} changes queries and keys by position in a way that is no known rotary embedding"
            )
        probe_result.layers[with_rotation.module] = LayerInfo(
            index, rotation, visible, _temperature(with_rotation.module)
        )
    # The attention function handed the values on, so what was rotated must have left no trace.
    if not torch.equal(rotated.output, plain.output):
        raise UnsupportedModelError(
            f"{name}: more goes by its rotary embedding than what is handed to transformers' attention function"
        )
    return probe_result


def _position_tables(decoder: PreTrainedModel) -> list[str]:
    # By name, for a model may look positions up by the length of its cache, whatever positions it is given.
    words = ("position", "pos_emb", "wpe")
    return [name for name, _ in decoder.named_parameters() if any(word in name for word in words)]


def _temperature(module: nn.Module) -> Temperature | None:
    # Llama 4 takes the position from the length of the cache, in layers without rotary embedding.
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        return Temperature(float(module.floor_scale), float(module.attn_scale))
    return None


def _check_options(name: str, call: Call) -> None:
    unknown = {
        option
        for option, value in call.options.items()
        if value is not None and option not in HONOURED | HARMLESS and not (option == "is_causal" and value)
    }
    if unknown or not getattr(call.module, "is_causal", True):
        what = f"passes {sorted(unknown)} to its attention function" if unknown else "is not causal"
        raise UnsupportedModelError(f"{name}: layer {call.module.layer_idx} {what}")
