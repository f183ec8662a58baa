"""How ``torch.compile`` compiles a decode step: with inductor, after linear layers were replaced by `ops.linear`."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

import torch
import torch._inductor.compile_fx
import torch._inductor.config
from torch import Tensor, fx
from torch._inductor import cpu_vec_isa
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sinkattn import ops
from sinkattn.hf.model_patch import PatchedForward

_INDUCTOR_OPTIONS = {
    # They check every input and every operator's output in each step: a twentieth of the time of a small model.
    "size_asserts": False,
    "alignment_asserts": False,
    # What is left for inductor are a few thousand elements, for which plain loops are as fast. The first compilation
    # would take 10 s longer, to test which vector instructions there are.
    "cpp.simdlen": 1,
    "cpp.vec_isa_ok": True,
}


def compile_graph(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile the graph of a decode step, as Dynamo traced it."""
    if not torch.is_autocast_enabled("cpu"):
        replace_linears(graph_module.graph)
        merge_linears(graph_module.graph)
        graph_module.recompile()
    try:
        with torch._inductor.config.patch(_INDUCTOR_OPTIONS):
            return torch._inductor.compile_fx.compile_fx(graph_module, inputs)
    finally:
        # What torch found without a test, which other code in this process is not to get.
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards to check in every step: all but those of what is in a `PatchedForward`.

    There are 60 of them for each, which never fail: a forward that is replaced by another one fails its own guard.
    """
    patched = {guard.name for guard in guards if isinstance(guard.value, PatchedForward)}

    def is_within(name: str) -> bool:
        return any(name[: match.end()] in patched for match in re.finditer(r"\.forward(?=\.)", name))

    return [not is_within(guard.name) for guard in guards]


def replace_linears(graph: fx.Graph) -> None:
    """Let `ops.linear` compute the linear layers whose inputs and weights it takes."""
    for node in graph.find_nodes(op="call_function", target=functional.linear):
        input, weight, bias = (*node.args, None)[:3]
        operands = [_value(operand) for operand in (input, weight, bias) if operand is not None]
        if not node.kwargs and _takes(*operands):
            node.target = ops.linear_operator
            node.args = (input, [weight], [], [] if bias is None else [bias])


def _value(operand: Any) -> Any:
    """The fake tensor that Dynamo knows for an operand."""
    return operand.meta.get("example_value") if isinstance(operand, fx.Node) else None


def _takes(input: Any, *parameters: Any) -> bool:
    """Whether `ops.linear` takes this input, and these weights and maybe biases."""
    for operand in (input, *parameters):
        if not isinstance(operand, Tensor) or is_traceable_wrapper_subclass(operand):
            return False
        if not operand.is_cpu or operand.dtype != input.dtype:
            return False
    weight = parameters[0]
    return (
        input.dtype in ops.LINEAR_DTYPES
        and weight.dim() == 2
        and all(parameter.is_contiguous() for parameter in parameters)
        and 0 < input.numel() <= ops.MAX_LINEAR_TOKENS * weight.shape[1]
    )


def merge_linears(graph: fx.Graph) -> None:
    """Merge linear layers that multiply the same input, such as those of queries, keys and values, to one call."""
    merged: set[fx.Node] = set()
    for first in graph.find_nodes(op="call_function", target=ops.linear_operator):
        if first not in merged and len(group := list(_same_input(first))) > 1:
            _merge(graph, group)
            merged.update(group)


def _same_input(first: fx.Node) -> Iterator[fx.Node]:
    """A linear node, and those after it that can be computed in its place."""
    yield first
    node = first.next
    while node.op != "root" and not _may_write(node):
        if (
            node.target is ops.linear_operator
            and _kind(node) == _kind(first)
            and all(map(_is_input, chain(*_parameters(node))))
        ):
            yield node
        node = node.next


def _parameters(node: fx.Node) -> list[list[fx.Node]]:
    """Weights, scales and biases of a linear node."""
    return cast("list[list[fx.Node]]", list(node.args[1:]))


def _is_input(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What nodes have in common that can be one call."""
    weights, scales, biases = _parameters(node)
    return node.args[0], _value(weights[0]).dtype, bool(scales), bool(biases)


def _may_write(node: fx.Node) -> bool:
    """Whether a node may change a tensor that exists already; True if unknown."""
    if node.op != "call_function" and node.op != "call_method":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.OperatorBase) or node.target in _WRITERS:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    # Some functions take `inplace` by position.
    return name.endswith("_") or any(arg is True for arg in node.args) or bool({"inplace", "out"} & set(node.kwargs))


# Statements such as `x += y` and `x[i] = y`, as Dynamo records them.
_WRITERS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.imatmul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
}


def _merge(graph: fx.Graph, group: list[fx.Node]) -> None:
    weights, scales, biases = (
        [x for part in parts for x in part] for parts in zip(*map(_parameters, group), strict=True)
    )
    rows = [_value(weight).shape[0] for weight in weights]
    with graph.inserting_before(group[0]):
        merged = graph.call_function(ops.linear_operator, (group[0].args[0], weights, scales, biases))
        parts = graph.call_function(torch.split, (merged, rows), {"dim": -1})
        for index, node in enumerate(group):
            part = graph.call_function(operator.getitem, (parts, index))
            part.meta = node.meta
            node.replace_all_uses_with(part)
    for node in group:
        graph.erase_node(node)
