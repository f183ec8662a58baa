"""``sinkattn info``: what is installed, what was built, which backend runs on which device, how a model streams."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sinkattn
from sinkattn.cli.arguments import (
    add_cache_dtype,
    add_command,
    add_layout,
    add_model,
    describe_model,
    load_model,
    model_lines,
    window_of,
)
from sinkattn.cli.formatting import size_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sinkattn.cli.arguments import Commands
    from sinkattn.ring_cache import CacheDtype


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "info", run, "what was built, and which backend will run where")
    add_model(parser, default="none; 'demo' is the small one that ships with sinkattn")
    add_layout(parser, None, "1020, or what the model was trained for")
    add_cache_dtype(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    facts = collect()
    if args.model is not None:
        name = args.model
        args.model = None if name == "demo" else name
        model, _ = load_model(args)
        facts["loaded"] = describe_model(model, args)
        layout = args.num_sinks, window_of(model, args)
        facts["model"] = {"name": name, **model_facts(model, *layout, cache_dtype=args.cache_dtype)}
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines(facts)))
    return 0


def collect() -> dict[str, Any]:
    """Versions, build, machine and, for each device, the backend that runs and why each backend can or cannot."""
    import torch

    from sinkattn.evaluate.environment import machine, versions

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "versions": versions(),
        "build": sinkattn.build_info(),
        "machine": machine(),
        "cpu_capability": sinkattn.ops.cpu_capability(),
        "SINKATTN_BACKEND": os.environ.get("SINKATTN_BACKEND"),
        "devices": [_device(device) for device in devices],
    }


def model_facts(
    model: PreTrainedModel, num_sinks: int, window: int, *, cache_dtype: CacheDtype | None = None
) -> dict[str, Any]:
    """Whether `sinkattn.enable` accepts a model and, if so, how it streams. The model is not changed."""
    import torch

    from sinkattn.hf import SinkCache, decode_steps, disable, enable
    from sinkattn.hf.dry_run import evaluation_mode, preserve_state
    from sinkattn.hf.model_patch import get_patch
    from sinkattn.hf.reencode.lanes import extra_tokens
    from sinkattn.hf.reencode.patch import ReencodePatch
    from sinkattn.hf.swap.ring_patch import RingPatch
    from sinkattn.hf.swap.step_graphs import NUM_COMPARED, STEPS_BEFORE
    from sinkattn.hf.versions import forward_cache

    facts: dict[str, Any] = {"class": type(model).__name__, "num_sinks": num_sinks, "window": window}
    facts["cache_dtype"] = cache_dtype
    try:
        enable(model, num_sinks, window, cache_dtype=cache_dtype)
    except (ValueError, RuntimeError) as error:
        return {**facts, "accepted": False, "reason": str(error)}
    try:
        cache = SinkCache(model)
        with evaluation_mode(model), preserve_state(model):
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            model(input_ids=token, **{forward_cache(model): cache})
            facts |= {"accepted": True, "cache_bytes_per_stream": cache.nbytes}
            for _ in range(STEPS_BEFORE + NUM_COMPARED):  # until they are replayed, if they can be
                model(input_ids=token, **{forward_cache(model): cache})
            facts["decode_steps"] = decode_steps(model, cache)
        patch = get_patch(model)
        if isinstance(patch, ReencodePatch):
            return {**facts, "reencoded_tokens_per_token": extra_tokens(patch.layout)}
        assert isinstance(patch, RingPatch)
        layers = patch.probe_result.layers.values()
        rotary = [_rotary(layer, cache.layers[layer.index].keys.shape[-1]) for layer in layers]
        kept = [_kept(patch.groups[module].layout) for module in patch.probe_result.layers]
        others = len(cache.layers) - len(rotary)
        return {**facts, "rotary_by_layer": rotary, "kept_by_layer": kept, "layers_with_other_states": others}
    finally:
        disable(model)


def lines(info: dict[str, Any]) -> Iterator[str]:
    """The facts as lines of text."""
    yield "  ".join(f"{name} {version}" for name, version in info["versions"].items())
    yield "built: " + ", ".join(f"{name} {value}" for name, value in info["build"].items())
    yield f"machine: {info['machine']['processor']}, {info['machine']['threads']} threads"
    yield f"CPU kernel: {info['cpu_capability']}"
    yield f"SINKATTN_BACKEND: {info['SINKATTN_BACKEND'] or 'not set'}"
    for device in info["devices"]:
        runs = device["runs"] or "nothing"
        yield f"{device['device']}: {runs} runs ({device['why']})"
        for name, reason in device["backends"].items():
            yield f"    {name}: {reason or 'can run'}"
    if loaded := info.get("loaded"):
        yield model_lines(loaded)
    if model := info.get("model"):
        layout = f"{model['num_sinks']} sinks + window of {model['window']}"
        if not model["accepted"]:
            yield f"model: refused with {layout}: {model['reason']}"
            return
        yield f"model: {model['class']} is accepted with {layout}"
        if (extra := model.get("reencoded_tokens_per_token")) is not None:
            yield f"    absolute positions: streams by re-encoding, {extra:.2f} extra tokens for each token on average"
        for name, key in (("positions", "rotary_by_layer"), ("kept", "kept_by_layer")):
            layers = model.get(key, [])
            for text in dict.fromkeys(layers):
                yield f"    {name}: {text} in {layers.count(text)} of {len(layers)} attention layers"
        if others := model.get("layers_with_other_states"):
            yield f"    other layers: {others}, with a state of their own or none"
        yield f"    decode steps: {model['decode_steps']}"
        dtype = f", tokens that are not sinks in {model['cache_dtype']}" if model["cache_dtype"] else ""
        yield f"    cache: {size_text(model['cache_bytes_per_stream'])} per stream{dtype}"


def _device(device: torch.device) -> dict[str, Any]:
    """The backend that runs on a device, and for each backend None or the reason why it cannot."""
    override = os.environ.get("SINKATTN_BACKEND")
    runs: str | None
    try:
        runs = sinkattn.ops.select_backend(device)
        why = f"SINKATTN_BACKEND={override}" if override else "chosen by auto"
    except (RuntimeError, ValueError) as error:
        runs, why = None, str(error)
    with _no_override():
        reasons = {name: _why_not(device, name) for name in sinkattn.ops.BACKENDS if name != "auto"}
    return {"device": str(device), "runs": runs, "why": why, "backends": reasons}


def _why_not(device: torch.device, backend: sinkattn.ops.Backend) -> str | None:
    try:
        sinkattn.ops.select_backend(device, backend)
    except RuntimeError as error:
        return str(error)
    return None


def _kept(layout: sinkattn.RingLayout) -> str:
    """The tokens that a layer keeps."""
    sinks = f"{layout.num_sinks} sinks + " if layout.num_sinks else ""
    return f"{sinks}window of {layout.window}"


def _rotary(layer: Any, head_dim: int) -> str:
    """The positions of an attention layer, as the probe found them."""
    if layer.rotation is None:
        return "none" if layer.alibi_slopes is None else "ALiBi"
    rope, offset = layer.rotation
    return f"{rope.style}, {'last ' if offset else ''}{rope.rotary_dim} of {head_dim} elements"


@contextmanager
def _no_override() -> Iterator[None]:
    """Run with SINKATTN_BACKEND unset."""
    override = os.environ.pop("SINKATTN_BACKEND", None)
    try:
        yield
    finally:
        if override is not None:
            os.environ["SINKATTN_BACKEND"] = override
