"""Finding out what a model does, by running it: which modules attend, to what, and how they rotate queries and keys.

Nothing is assumed from a model's name. Three short forwards run with an attention function that records what it gets
and returns something independent of queries and keys, so that all see the same hidden states: one with the model's
rotary embedding, one with the identity in its place, and one more at shifted positions. What comes out must be
explained by one known convention. The masks that the model asks for are made by a function that finds out which tokens
they show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from sinkattn.hf.unchanged import evaluation_mode
from sinkattn.hf.versions import untested
from sinkattn.rope import STYLES, Rope, rotate

PROBE_NAME = "sinkattn_probe"
PROBE_TOKENS = 8

# Arguments of an attention function that the swap honours, and those that say nothing about the result.
HONOURED = {"scaling", "dropout", "sliding_window", "softcap", "s_aux"}
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}
HARMLESS |= {"return_dict", "cache_position"}

# A sliding window as long as this is none.
LONGEST_WINDOW = 1 << 18


class UnsupportedModelError(ValueError):
    """The model does something that sinkattn cannot prove it computes exactly; the message says what."""

    def __str__(self) -> str:
        """The message, and what was tested if a newer transformers is installed."""
        return super().__str__() + untested()


class Visible(NamedTuple):
    """Which tokens a mask shows to a query: all before it, the last ``size``, or those of its own chunk of ``size``."""

    kind: Literal["all", "window", "chunk"]
    size: int = 0


@dataclass
class Call:
    """One call of the attention function during a probe."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]


@dataclass(eq=False)
class Recording:
    """What one forward of a probe leaves."""

    calls: list[Call] = field(default_factory=list)
    masks: list[Visible | None] = field(default_factory=list)
    """What each mask shows that the model asked for; None if that is nothing known."""
    output: Tensor | None = None
    """Hidden states that the decoder makes of it."""

    def visible(self, call: Call) -> Visible | None:
        """What a call's query sees; None if nobody knows."""
        if call.mask is None:
            return Visible("all")
        if not isinstance(call.mask, Tensor) or call.mask.dtype != torch.int32:
            return None
        return self.masks[int(call.mask.flatten()[0])]


class Temperature(NamedTuple):
    """Scaling of queries by their position p: ``1 + scale * log(1 + floor((p + 1) / step))`` (Llama 4)."""

    step: float
    scale: float


class Rotation(NamedTuple):
    """A rotary embedding and where in the head the elements begin that it turns."""

    rope: Rope
    begin: int


@dataclass
class Layer:
    """What a probe found out about one attention module."""

    index: int
    rotation: Rotation | None
    """None where nothing is rotated."""
    visible: Visible
    temperature: Temperature | None
    """None where the model scales no queries, or does so by the positions that it is given."""
    alibi_slopes: Tensor | None = None
    """One for each head, of the bias on scaled scores; None without ALiBi."""


@dataclass
class Findings:
    """What a probe found out about a model."""

    decoder: PreTrainedModel
    rotaries: list[nn.Module]
    """Modules that make cosines and sines; none in models whose attention knows no positions (NoPE)."""
    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    """By attention module, in the order in which they ran."""
    forwards: dict[nn.Module, Callable] = field(default_factory=dict)
    """What replaces the forward of attention modules that call no attention function."""


_recording: ContextVar[Recording] = ContextVar("sinkattn_recording")


def _record(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    _recording.get().calls.append(Call(module, query, key, value, attention_mask, options))
    # Neither queries nor keys: rotating them must not change what later layers see.
    heads = query.shape[1] // value.shape[1]
    return value.repeat_interleave(heads, dim=1).transpose(1, 2).contiguous(), None


def _record_mask(batch_size, q_length, kv_length, *args, mask_function=None, device=None, **kwargs) -> Tensor:
    masks = _recording.get().masks
    masks.append(Visible("all") if mask_function is None else _what_is_visible(mask_function, device))
    # Instead of a mask its number, of the shape of a mask: models may slice it.
    return torch.full((batch_size, 1, q_length, kv_length), len(masks) - 1, dtype=torch.int32, device=device)


def _what_is_visible(mask_function: Callable, device: torch.device | None) -> Visible | None:
    def shown(query: Tensor | int, key: Tensor | int) -> Tensor:
        query, key = (torch.as_tensor(x, device=device) for x in (query, key))
        return mask_function(query.new_zeros(()), query.new_zeros(()), query, key).expand_as(query + key)

    distance = torch.arange(LONGEST_WINDOW, device=device)
    queries = (4 * LONGEST_WINDOW, 4 * LONGEST_WINDOW + 54321)  # far enough for any window or chunk to have begun
    try:
        if any(shown(query, query + 1 + distance).any() for query in queries):
            return None
        sees_first = shown(distance, 0)
        size = int(sees_first.sum())
        for kind in ("all",) if size == LONGEST_WINDOW else ("window", "chunk"):
            reach = [LONGEST_WINDOW if kind == "all" else size if kind == "window" else q % size + 1 for q in queries]
            if all(torch.equal(shown(q, q - distance), distance < r) for q, r in zip(queries, reach, strict=True)):
                return Visible(kind, 0 if kind == "all" else size)
    except (IndexError, RuntimeError, TypeError, ZeroDivisionError):
        pass  # it depends on more than how far apart two tokens are
    return None


def no_mask(*args, **kwargs) -> None:
    """Mask function of an attention function that masks by itself."""
    return None


AttentionInterface.register(PROBE_NAME, _record)
AttentionMaskInterface.register(PROBE_NAME, _record_mask)


def no_rotation(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of a rotary module: the angle is zero, so queries and keys keep their values."""
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(x, Tensor) for x in output):
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    raise UnsupportedModelError(f"{type(module).__name__}: expected cosines and sines from the rotary module")


@contextmanager
def attention_implementation(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a decoder with another attention function."""
    before, own = decoder.config, with_attention(decoder.config, name)
    modules = modules_with(decoder, before)
    try:
        for module in modules:
            module.config = own
        yield
    finally:
        for module in modules:
            module.config = before


def with_attention(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A copy of a configuration with another attention function: other models may share the original."""
    config = copy.copy(config)
    config._attn_implementation_internal = name  # as the setter does, but for nested configurations
    return config


def modules_with(decoder: PreTrainedModel, config: PreTrainedConfig) -> list[nn.Module]:
    """Modules of a decoder that read this configuration."""
    return [module for module in decoder.modules() if module.__dict__.get("config") is config]


def trained_length(model: PreTrainedModel) -> int | None:
    """Positions that a model was trained for, in tokens; None if its configuration does not say, or with ALiBi."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):
        return None
    length = getattr(config, "max_position_embeddings", None)
    # Frequencies of these kinds change beyond the original length.
    for rope in rope_parameters(model):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or length
            length = original if length is None else min(length, original or length)
    return length if length and length > 0 else None


def rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Rotary parameters in a model's configuration, one set or several by type of layer."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_type = [each for each in parameters.values() if isinstance(each, dict)]
    return by_type or [parameters]


def probe(model: PreTrainedModel) -> Findings:
    """Find the decoder, its rotary modules and what each attention module does; leaves the model as it was.

    Raises:
        UnsupportedModelError: saying what could not be explained.
    """
    name = type(model).__name__
    decoder = find_decoder(model)
    findings = Findings(decoder, [module for module in decoder.modules() if _frequencies(module)])
    device = model.get_input_embeddings().weight.device
    positions = torch.arange(PROBE_TOKENS, device=device)
    with evaluation_mode(model):
        embeddings = model.get_input_embeddings().weight
        # Fixed rows of the table, so that a probe is the same every time.
        ids = (positions * 7919 + 13) % embeddings.shape[0]
        rotated = _run(decoder, ids)
        with without_rotation(findings.rotaries):
            plain = _run(decoder, ids)
            moved = _run(decoder, ids, position_ids=positions.unsqueeze(0) + 1)

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
    if not findings.rotaries and (tables := _position_tables(decoder)):
        raise UnsupportedModelError(f"{name}: expected a rotary embedding, found none, but tables {tables}")
    # Read only now: a short forward puts length-dependent frequencies back to those of short inputs.
    frequencies = _distinct_frequencies(findings.rotaries)
    users = _users(model, frequencies, ids, rotated)
    for with_rotation, without in zip(rotated.calls, plain.calls, strict=True):
        index = with_rotation.module.layer_idx
        _check_options(name, with_rotation)
        visible = rotated.visible(with_rotation)
        if visible is None:
            raise UnsupportedModelError(f"{name}: layer {index} gets an attention mask that the model makes itself")
        window = with_rotation.options.get("sliding_window")
        if window is not None and visible.kind == "all":
            visible = Visible("window", window)
        if window is not None and visible != ("window", window):
            raise UnsupportedModelError(
                f"{name}: layer {index} has a sliding window of {window} tokens, and a mask that shows another part: "
                f"{visible.kind} {visible.size}"
            )
        rotation = _explain(with_rotation, without, users[index], positions)
        unmoved = torch.equal(with_rotation.key, without.key) and torch.equal(with_rotation.query, without.query)
        if rotation is None and not unmoved:
            raise UnsupportedModelError(
                f"{name}: layer {index} changes queries and keys by position in a way that is no known rotary embedding"
            )
        findings.layers[with_rotation.module] = Layer(index, rotation, visible, _temperature(with_rotation.module))
    # The attention function handed the values on, so what was rotated must have left no trace.
    if not torch.equal(rotated.output, plain.output):
        raise UnsupportedModelError(
            f"{name}: more goes by its rotary embedding than what is handed to transformers' attention function"
        )
    return findings


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Find the part of a model that takes token ids and has all attention layers."""
    for decoder in (model.get_decoder(), model.base_model):
        if isinstance(decoder, PreTrainedModel):
            return decoder
    raise UnsupportedModelError(f"{type(model).__name__}: expected a decoder that is a transformers model")


@contextmanager
def without_rotation(rotaries: list[nn.Module]) -> Iterator[None]:
    """Run a model with the identity in place of its rotary embeddings."""
    with ExitStack() as hooks:
        for rotary in rotaries:
            hooks.callback(rotary.register_forward_hook(no_rotation).remove)
        yield


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    # inv_freq, or one for each type of layer (full_attention_inv_freq); those before length-dependent changes left out
    named = {name: x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
    return {name: x for name, x in named.items() if "original" not in name}


def _position_tables(decoder: PreTrainedModel) -> list[str]:
    # By name, for a model may look positions up by the length of its cache, whatever positions it is given.
    words = ("position", "pos_emb", "wpe")
    return [name for name, _ in decoder.named_parameters() if any(word in name for word in words)]


def _temperature(module: nn.Module) -> Temperature | None:
    # Llama 4 takes the position from the length of the cache, in layers without rotary embedding.
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        return Temperature(float(module.floor_scale), float(module.attn_scale))
    return None


@dataclass
class Frequencies:
    """One set of frequencies of a model, and the buffers that hold it."""

    inv_freq: Tensor
    scaling: float
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)

    def ropes(self) -> Iterator[Rope]:
        """Every rotary embedding that these may be meant for: most turn one way, NanoChat's the other."""
        for sign in (1, -1):
            yield from (Rope(sign * self.inv_freq, self.scaling, style) for style in STYLES)


def _distinct_frequencies(rotaries: list[nn.Module]) -> list[Frequencies]:
    distinct: list[Frequencies] = []
    for rotary in rotaries:
        for name, inv_freq in _frequencies(rotary).items():
            scaling = float(getattr(rotary, name.replace("inv_freq", "attention_scaling"), 1.0))
            same = (x for x in distinct if x.scaling == scaling and torch.equal(x.inv_freq, inv_freq))
            if (known := next(same, None)) is None:
                distinct.append(known := Frequencies(inv_freq.clone(), scaling))
            known.buffers.append((rotary, name))
    return distinct


def _users(
    model: PreTrainedModel, distinct: list[Frequencies], ids: Tensor, rotated: Recording
) -> dict[int, list[Rope]]:
    # Which layers use which frequencies: those that change when these become zero. Two sets may be too close to tell
    # from each other by what they do to a few tokens in half precision.
    users: dict[int, list[Rope]] = {call.module.layer_idx: [] for call in rotated.calls}
    if len(distinct) == 1:
        return {index: list(distinct[0].ropes()) for index in users}
    for frequencies in distinct:
        ropes = list(frequencies.ropes())
        for module, name in frequencies.buffers:
            getattr(module, name).zero_()
        try:
            with evaluation_mode(model):
                changed = _run(find_decoder(model), ids)
        finally:
            for module, name in frequencies.buffers:
                getattr(module, name).copy_(frequencies.inv_freq)
        for before, after in zip(rotated.calls, changed.calls, strict=True):
            if not (torch.equal(before.query, after.query) and torch.equal(before.key, after.key)):
                users[before.module.layer_idx] += ropes
    return users


def _run(decoder: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Recording:
    recording = Recording()
    token = _recording.set(recording)
    try:
        with attention_implementation(decoder, PROBE_NAME):
            recording.output = decoder(input_ids=ids.unsqueeze(0), use_cache=False, **inputs)[0]
    finally:
        _recording.reset(token)
    return recording


def _check_options(name: str, call: Call) -> None:
    unknown = {
        option
        for option, value in call.options.items()
        if value is not None and option not in HONOURED | HARMLESS and not (option == "is_causal" and value)
    }
    if unknown or not getattr(call.module, "is_causal", True):
        what = f"passes {sorted(unknown)} to its attention function" if unknown else "is not causal"
        raise UnsupportedModelError(f"{name}: layer {call.module.layer_idx} {what}")


def _explain(rotated: Call, plain: Call, ropes: list[Rope], positions: Tensor) -> Rotation | None:
    head_dim = plain.key.shape[-1]
    pairs = ((rotated.query, plain.query), (rotated.key, plain.key))
    for rope in ropes:
        if rope.rotary_dim > head_dim:
            continue
        cos, sin = rope.tables(positions)
        # Multi-head latent attention rotates the end of the head.
        for begin in dict.fromkeys((0, head_dim - rope.rotary_dim)):
            if all(
                _close(want, torch.cat((x[..., :begin], _rotate(x[..., begin:], cos, sin, rope)), dim=-1), rope, begin)
                for want, x in pairs
            ):
                return Rotation(rope, begin)
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: Rope) -> Tensor:
    return rotate(x.float(), cos, sin, interleaved=rope.interleaved)


def _close(want: Tensor, got: Tensor, rope: Rope, begin: int) -> bool:
    # Twice the rounding of the model's own dtype, pair by pair: a few channels may be a thousand times the others.
    # Norm weights that come after a rotation move far more than that.
    budget = max(1e-6, 2 * torch.finfo(want.dtype).eps)
    want = want.float()
    error, size = (_pair_norms(x, rope, begin) for x in (want - got, want))
    return bool((error <= budget * size).all())


def _pair_norms(x: Tensor, rope: Rope, begin: int) -> Tensor:
    """Over everything but the pairs that are rotated together; an element that is not rotated stands alone."""
    norms = x.double().square().sum(dim=(0, 1, 2))
    rotary = norms[begin : begin + rope.rotary_dim]
    pairs = rotary.view(-1, 2).sum(dim=1) if rope.interleaved else rotary.view(2, -1).sum(dim=0)
    return torch.cat((norms[:begin], pairs, norms[begin + rope.rotary_dim :])).sqrt()
