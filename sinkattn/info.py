"""What is installed, what was built, and which backend will run where."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sinkattn import build_info, ops
from sinkattn.report import machine, size_text, versions


def collect() -> dict[str, Any]:
    """Versions, build and, for each device, the backend that runs, why, and what stands against the others."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {
        "versions": versions(),
        "build": build_info(),
        "machine": machine(),
        "cpu_capability": ops.cpu_capability(),
        "SINKATTN_BACKEND": os.environ.get("SINKATTN_BACKEND"),
        "devices": [_device(device) for device in devices],
    }


def model_facts(model: Any, num_sinks: int, window: int) -> dict[str, Any]:
    """Whether `sinkattn.enable` takes a model; if so how it streams and its cache. Changes nothing."""
    from sinkattn.hf import SinkCache, disable, enable
    from sinkattn.hf.dry_run import evaluation_mode, preserve_state
    from sinkattn.hf.model_patch import get_patch
    from sinkattn.hf.reencode.lanes import extra_tokens
    from sinkattn.hf.reencode.patch import ReencodePatch
    from sinkattn.hf.versions import forward_cache

    facts: dict[str, Any] = {"class": type(model).__name__, "num_sinks": num_sinks, "window": window}
    try:
        enable(model, num_sinks, window)
    except (ValueError, RuntimeError) as error:
        return {**facts, "accepted": False, "reason": str(error)}
    try:
        cache = SinkCache(model)
        with evaluation_mode(model), preserve_state(model):
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
            model(input_ids=token, **{forward_cache(model): cache})
        patch = get_patch(model)
        facts |= {"accepted": True, "cache_bytes_per_stream": cache.nbytes}
        if isinstance(patch, ReencodePatch):
            return {**facts, "reencoded_tokens_per_token": extra_tokens(patch.layout)}
        layers = patch.probe_result.layers.values()
        rotary = [_rotary(layer, cache.layers[layer.index].keys.shape[-1]) for layer in layers]
        kept = [_kept(patch.groups[module].layout) for module in patch.probe_result.layers]
        others = len(cache.layers) - len(rotary)
        return {**facts, "rotary_by_layer": rotary, "kept_by_layer": kept, "layers_with_other_states": others}
    finally:
        disable(model)


def lines(info: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield "  ".join(f"{name} {version}" for name, version in info["versions"].items())
    yield "built: " + ", ".join(f"{name} {value}" for name, value in info["build"].items())
    yield f"machine: {info['machine']['processor']}, {info['machine']['threads']} threads"
    yield f"CPU kernel: {info['cpu_capability']}"
    yield f"SINKATTN_BACKEND: {info['SINKATTN_BACKEND'] or 'not set'}"
    for device in info["devices"]:
        runs = device["runs"] or "nothing"
        yield f"{device['device']}: {runs} runs ({device['why']})"
        for name, obstacle in device["backends"].items():
            yield f"    {name}: {obstacle or 'can run'}"
    if model := info.get("model"):
        layout = f"{model['num_sinks']} sinks + window of {model['window']}"
        if not model["accepted"]:
            yield f"model: refused with {layout}: {model['reason']}"
            return
        kinds = model.get("rotary_by_layer", [])
        yield f"model: {model['class']} is accepted with {layout}"
        if (extra := model.get("reencoded_tokens_per_token")) is not None:
            yield f"    absolute positions: streams by re-encoding, {extra:.2f} extra tokens for each token on average"
        for name, each in (("positions", kinds), ("kept", model.get("kept_by_layer", []))):
            for kind in dict.fromkeys(each):
                yield f"    {name}: {kind} in {each.count(kind)} of {len(each)} attention layers"
        if others := model.get("layers_with_other_states"):
            yield f"    other layers: {others}, with a state of their own or none"
        yield f"    cache: {size_text(model['cache_bytes_per_stream'])} per stream"


def _device(device: torch.device) -> dict[str, Any]:
    override = os.environ.get("SINKATTN_BACKEND")
    try:
        runs, why = ops.select_backend(device), f"SINKATTN_BACKEND={override}" if override else "chosen by auto"
    except (RuntimeError, ValueError) as error:
        runs, why = None, str(error)
    with _no_override():
        obstacles = {name: _obstacle(device, name) for name in ops.BACKENDS if name != "auto"}
    return {"device": str(device), "runs": runs, "why": why, "backends": obstacles}


def _obstacle(device: torch.device, backend: ops.Backend) -> str | None:
    try:
        ops.select_backend(device, backend)
    except RuntimeError as error:
        return str(error)
    return None


def _kept(layout: Any) -> str:
    sinks = f"{layout.num_sinks} sinks + " if layout.num_sinks else ""
    return f"{sinks}window of {layout.window}"


def _rotary(layer: Any, head_dim: int) -> str:
    if layer.rotation is None:
        return "none" if layer.alibi_slopes is None else "ALiBi"
    rope, begin = layer.rotation
    return f"{rope.style}, {'last ' if begin else ''}{rope.rotary_dim} of {head_dim} elements"


@contextmanager
def _no_override() -> Iterator[None]:
    override = os.environ.pop("SINKATTN_BACKEND", None)
    try:
        yield
    finally:
        if override is not None:
            os.environ["SINKATTN_BACKEND"] = override
