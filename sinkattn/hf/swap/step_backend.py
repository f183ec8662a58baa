"""How ``torch.compile`` compiles a decode step: with inductor, after linear layers were replaced by `ops.linear`."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch._inductor.compile_fx
import torch._inductor.config
from torch import Tensor, fx
from torch._inductor import cpu_vec_isa
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sinkattn import ops
from sinkattn.hf.model_patch import PatchedForward
from sinkattn.hf.swap.linear_layers import LinearForward

# Plain loops are as fast as vectors for values of fewer elements; states of recurrent layers are larger.
MAX_SMALL_ELEMENTS = 1 << 16


def compile_graph(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile the graph of a decode step, as Dynamo traced it."""
    options: dict[str, Any] = {
        # They check every input and every operator's output in each step: a twentieth of the time of a small model.
        "size_asserts": False,
        "alignment_asserts": False,
        "post_grad_custom_pre_pass": _MergeLinears(),
    }
    if _has_small_values(graph_module.graph):
        # The first compilation would take 10 s longer, to test which vector instructions there are.
        options |= {"cpp.simdlen": 1, "cpp.vec_isa_ok": True}
    replace_linears(graph_module.graph)
    graph_module.recompile()
    was_tested = cpu_vec_isa.valid_vec_isa_list.cache_info().currsize > 0
    try:
        with torch._inductor.config.patch(options):
            return torch._inductor.compile_fx.compile_fx(graph_module, inputs)
    finally:
        if not was_tested:  # other code in this process is not to get an untested list
            cpu_vec_isa.valid_vec_isa_list.cache_clear()


def _has_small_values(graph: fx.Graph) -> bool:
    """Whether all values but the inputs are on a CPU and small."""
    values = (node.meta.get("example_value") for node in graph.nodes if node.op != "placeholder")
    return all(_is_small(value) for value in values if isinstance(value, Tensor))


def _is_small(value: Tensor) -> bool:
    return value.is_cpu and _is_static(value) and value.numel() <= MAX_SMALL_ELEMENTS


def _is_static(value: Tensor) -> bool:
    """Whether the shape is known before the graph runs."""
    return all(isinstance(size, int) for size in value.shape)


def keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to check in every step: all but those of what is in a forward that `enable` has set.

    These never fail: a forward that is replaced by another one fails its own guard.
    """
    patched = {guard.name for guard in guards if isinstance(guard.value, (PatchedForward, LinearForward))}

    def is_within(name: str) -> bool:
        return any(name[: match.end()] in patched for match in re.finditer(r"\.forward(?=\.)", name))

    return [not is_within(guard.name) for guard in guards]


def replace_linears(graph: fx.Graph) -> None:
    """Let `ops.linear` compute the linear layers whose inputs and weights it takes, in a graph of Dynamo."""
    for node in graph.find_nodes(op="call_function", target=functional.linear):
        if node.kwargs:
            continue
        input, weight, bias = (*node.args, None)[:3]
        operands = [_traced_value(operand) for operand in (input, weight, bias) if operand is not None]
        # Under autocast the output has another dtype.
        if _takes(*operands) and _traced_value(node).dtype == operands[0].dtype:
            node.target = ops.linear_operator
            node.args = (input, [weight], [], [] if bias is None else [bias])


def _traced_value(operand: Any) -> Any:
    """The fake tensor that Dynamo knows for an operand."""
    return operand.meta.get("example_value") if isinstance(operand, fx.Node) else None


def _takes(input: Any, *parameters: Any) -> bool:
    """Whether `ops.linear` takes this input, and these weights and maybe biases."""
    for operand in (input, *parameters):
        if not isinstance(operand, Tensor) or is_traceable_wrapper_subclass(operand) or not _is_static(operand):
            return False
        if not operand.is_cpu or operand.dtype != input.dtype:
            return False
    weight, *biases = parameters
    return (
        input.dtype in ops.LINEAR_DTYPES
        and weight.dim() == 2
        and all(parameter.is_contiguous() for parameter in parameters)
        and all(bias.shape == weight.shape[:1] for bias in biases)
        and 0 < input.numel() <= ops.MAX_LINEAR_TOKENS * weight.shape[1]
    )


class _MergeLinears(CustomGraphPass):
    """Applies `merge_linears` to a graph of inductor."""

    def __call__(self, graph: fx.Graph) -> None:
        merge_linears(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def merge_linears(graph: fx.Graph) -> None:
    """Merge linear layers that multiply the same input, such as those of queries, keys and values, to one call.

    For a functional graph: nothing in it writes to a tensor, so a call may be moved to where its operands are known.
    """
    groups: defaultdict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.linear_operator):
        weights, scales, biases = operands = _parameters(node)
        if all(operand.op == "placeholder" for each in operands for operand in each):
            groups[node.args[0], weights[0].meta["val"].dtype, bool(scales), bool(biases)].append(node)
    for group in groups.values():
        if len(group) > 1:
            _merge(graph, group)


def _parameters(node: fx.Node) -> list[list[fx.Node]]:
    """Weights, scales and biases of a linear node."""
    return cast("list[list[fx.Node]]", list(node.args[1:]))


def _merge(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    weights, scales, biases = (
        [x for part in parts for x in part] for parts in zip(*map(_parameters, group), strict=True)
    )
    rows = [weight.meta["val"].shape[0] for weight in weights]
    with graph.inserting_before(first):
        merged = graph.call_function(ops.linear_operator, (first.args[0], weights, scales, biases))
        parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (merged, rows, -1))
        for index, node in enumerate(group):
            part = graph.call_function(operator.getitem, (parts, index))
            if node.meta["val"].numel() > rows[index]:
                # More than one token: what follows was traced for a contiguous product.
                part = graph.call_function(
                    torch.ops.aten.clone.default, (part,), {"memory_format": torch.contiguous_format}
                )
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
