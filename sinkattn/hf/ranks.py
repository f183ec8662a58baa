"""Models that are spread over processes, their ranks: what is supported, and refusals that reach all ranks.

A layer whose weights are spread over ranks waits for the others in every forward. So `enable`, which each rank calls,
runs the same forwards everywhere, and a rank that refuses the model lets the others know before the next one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkattn.hf.unsupported import UnsupportedModelError

# Sizes in transformers' DistributedConfig of what spreads layers or streams, rather than heads and experts.
OTHER_SIZES = ("pp_size", "fsdp_size", "dp_replicate_size")


class OtherRankError(UnsupportedModelError):
    """Another rank has refused the model, and raises the error that says why."""


def num_ranks(model: nn.Module) -> int:
    """Processes that the weights of a model are spread over; 1 of a model in one process."""
    mesh = _mesh(model)
    return 1 if mesh is None else mesh.size()


def group_of_ranks(model: nn.Module) -> Any:
    """The process group of these processes; None for a model in one process."""
    mesh = _mesh(model)
    return None if mesh is None else mesh.get_group()


def check_distribution(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if a model is spread over processes in another way than by heads and experts."""
    name, mesh = type(model).__name__, _mesh(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        settings = getattr(model.config, "distributed_config", None)
        for size in OTHER_SIZES:
            if (value := getattr(settings, size, None) or 1) > 1:
                raise UnsupportedModelError(
                    f"{name}: expected one process, or tensor or expert parallelism, got {size}={value}"
                )
    if mesh is not None and mesh.ndim > 1:
        raise UnsupportedModelError(f"{name}: expected weights spread over a mesh of one dimension, got {mesh}")


def wait_for_ranks(model: nn.Module, *, refused: bool = False) -> None:
    """Tell the other ranks of a model whether this one refuses it, once before each forward and at the end.

    Raises:
        OtherRankError: if another one does.
    """
    mesh = _mesh(model)
    if mesh is None:
        return
    any_refused = torch.tensor(int(refused), device=mesh.device_type)
    torch.distributed.all_reduce(any_refused, torch.distributed.ReduceOp.MAX, mesh.get_group())
    if any_refused and not refused:
        raise OtherRankError("model: another rank has refused it, with an error that says why")


def uneven_heads(model: PreTrainedModel) -> str:
    """A hint for a model that cannot run, if its key heads cannot be spread evenly over its ranks; else empty."""
    config, ranks = model.config.get_text_config(decoder=True), num_ranks(model)
    heads = getattr(config, "num_key_value_heads", 0) or getattr(config, "num_attention_heads", 0)
    if not isinstance(heads, int) or heads % ranks == 0:  # custom code may have a list
        return ""
    return (
        f"; its {heads} key heads cannot be spread evenly over {ranks} ranks: use fewer, or a tp_plan that keeps "
        "attention whole, with 'colwise_gather_output' for q_proj, k_proj and v_proj and 'rowwise_split_input' for "
        "o_proj"
    )


def _mesh(model: nn.Module) -> Any:
    """The mesh of ranks that have the shards of a model's weights; None if it is in one process."""
    # Only DTensors have one; their class takes long to import.
    return next((x.device_mesh for x in model.parameters() if hasattr(x, "device_mesh")), None)
