"""The backend of compiled decode steps: which linear layers run in the kernel for few tokens, and which in one call."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional

from sinkattn import ops
from sinkattn.hf.model_patch import PatchedForward
from sinkattn.hf.swap.step_backend import keep_guards, merge_linears, replace_linears

COLUMNS = 24

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Not here: Dynamo cannot trace it."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


class Products(nn.Module):
    """A module of three linear layers, whose forward is given."""

    def __init__(self, forward, bias: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(COLUMNS, rows, bias=bias) for rows in (5, 16, 40))
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


def rows_in_calls(module: nn.Module, x: torch.Tensor) -> list[list[int]]:
    """Rows of the weights in each call of the kernel, after the graph was compared with the module."""
    graphs = []

    def backend(graph_module, inputs):
        replace_linears(graph_module.graph)
        merge_linears(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        graphs.append(graph_module.graph)
        return graph_module

    with torch.no_grad():
        got = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(x.clone())
        torch.testing.assert_close(got, module(x.clone()), rtol=1e-4, atol=1e-4)
    [graph] = graphs
    calls = graph.find_nodes(op="call_function", target=ops.linear_operator)
    return [[weight.meta["example_value"].shape[0] for weight in call.args[1]] for call in calls]


def all_of(module, x):
    return torch.cat((module.one(x), module.two(x), module.three(x)), dim=-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 3), ()], ids=str)
def test_products_of_one_input_are_one_call(shape, bias):
    assert rows_in_calls(Products(all_of, bias), torch.randn(*shape, COLUMNS)) == [[5, 16, 40]]


def test_products_of_other_inputs_are_calls_of_their_own():
    def forward(module, x):
        return torch.cat((module.one(x), module.two(x + 1), module.three(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[5, 40], [16]]


def test_others_between_do_not_matter():
    def forward(module, x):
        gate = functional.silu(module.one(x)).sum(-1, keepdim=True)
        return gate * module.two(x)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[5, 16]]


def add_(x):
    x.add_(1)


def iadd(x):
    operator.iadd(x, 1)


def set_item(x):
    x[..., 0] = 7


def relu_in_place(x):
    functional.relu(x, True)


def out_of_add(x):
    torch.add(x, 1, out=x)


def view_of_it(x):
    x.view(-1).mul_(2)


@pytest.mark.parametrize("write", [add_, iadd, set_item, relu_in_place, out_of_add, view_of_it])
def test_a_write_between_keeps_the_order(write):
    def forward(module, x):
        first = module.one(x)
        write(x)
        return torch.cat((first, module.two(x), module.three(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[5], [16, 40]]


def test_a_weight_made_between_is_not_moved():
    def forward(module, x):
        first = module.one(x)
        return torch.cat((first, functional.linear(x, module.two.weight * first.sum()), module.three(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[5, 40], [16]]


def test_layers_with_and_without_bias_are_two_calls():
    module = Products(all_of, bias=True)
    module.two.bias = None
    assert rows_in_calls(module, torch.randn(1, COLUMNS)) == [[5, 40], [16]]


def strided(module):
    module.one.weight = nn.Parameter(torch.randn(COLUMNS, 5).T)


def of_another_type(module):
    module.double()


@pytest.mark.parametrize(
    ("change", "dtype", "shape", "taken"),
    [
        (strided, torch.float32, (1,), [[16, 40]]),
        (of_another_type, torch.float64, (1,), []),
        (lambda module: None, torch.float32, (5,), []),
    ],
)
def test_what_the_kernel_does_not_take_stays(change, dtype, shape, taken):
    module = Products(all_of)
    change(module)
    assert rows_in_calls(module, torch.randn(*shape, COLUMNS, dtype=dtype)) == taken


def test_only_guards_within_a_patched_forward_are_dropped():
    """Those of the forward itself stay, and of what only has a similar name."""

    class Guard:
        def __init__(self, name, value=None):
            self.name, self.value = name, value

    patched = PatchedForward(print)
    guards = {
        Guard("L['step'].layers[0].forward", patched): True,
        Guard("L['step'].layers[0].forward.args"): False,
        Guard("L['step'].layers[0].forward.args[2].keywords['weight']"): False,
        Guard("L['step'].layers[0].forward_hooks"): True,
        Guard("L['step'].layers[1].forward", print): True,
        Guard("L['step'].layers[1].forward.args"): True,
        Guard("L['step'].layers[1].base.forward", patched): True,
        Guard("L['step'].layers[1].base.forward.func.forward.args"): False,
        Guard("L['step'].layers[1].base.weight"): True,
    }
    assert keep_guards(list(guards)) == list(guards.values())
