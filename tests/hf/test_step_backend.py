"""The backend of compiled decode steps: which linear layers run in the kernel for few tokens, and which in one call."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from families import build
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

import sinkattn
from sinkattn import ops
from sinkattn.hf.model_patch import PatchedForward
from sinkattn.hf.quantize import quantize_weights
from sinkattn.hf.swap import step_backend
from sinkattn.hf.swap.linear_layers import LinearForward
from sinkattn.hf.swap.step_backend import keep_guards, merge_linears, replace_linears

COLUMNS = 24

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]


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

    def compiler(graph_module, inputs):
        merge_linears(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module.forward)

    def backend(graph_module, inputs):
        replace_linears(graph_module.graph)
        graph_module.recompile()
        return aot_autograd(fw_compiler=compiler)(graph_module, inputs)

    with torch.no_grad():
        got = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(x.clone())
        want = module(x.clone())
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    [graph] = graphs
    calls = graph.find_nodes(op="call_function", target=ops.linear_operator)
    return [[weight.meta["val"].shape[0] for weight in call.args[1]] for call in calls]


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


def set_item(x):
    x[..., 0] = 7


def view_of_it(x):
    x.view(-1).mul_(2)


@torch.library.custom_op("sinkattn_tests::update", mutates_args=("x",))
def update(x: torch.Tensor) -> None:
    x.mul_(3)


def packet(x):
    torch.ops.sinkattn_tests.update(x)


def in_embedding(x):
    functional.embedding(torch.tensor([0]), x, None, 0.1)  # max_norm


@pytest.mark.parametrize("write", [add_, set_item, view_of_it, packet, in_embedding])
def test_a_write_between_makes_another_input(write):
    def forward(module, x):
        first = module.one(x)
        write(x)
        return torch.cat((first, module.two(x), module.three(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[5], [16, 40]]


def test_a_weight_made_between_is_not_moved():
    def forward(module, x):
        first = module.one(x)
        return torch.cat((first, functional.linear(x, module.two.weight * first.sum()), module.three(x)), dim=-1)

    assert sorted(rows_in_calls(Products(forward), torch.randn(1, COLUMNS))) == [[5, 40], [16]]


@pytest.mark.parametrize("streams", [1, 2])
def test_what_follows_gets_contiguous_products(streams):
    def forward(module, x):
        one, two = module.one(x), module.two(x)
        return torch.cat((one.view(-1), two.as_strided((streams, 16), (16, 1)).reshape(-1)))

    assert rows_in_calls(Products(forward), torch.randn(streams, 1, COLUMNS)) == [[5, 16]]


def test_autocast_in_the_graph_decides():
    def forward(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            first = module.one(x)
        return torch.cat((first.float(), module.two(x), module.three(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[16, 40]]


def test_arguments_by_name_are_left_alone():
    def forward(module, x):
        return torch.cat((functional.linear(x, weight=module.one.weight), module.two(x)), dim=-1)

    assert rows_in_calls(Products(forward), torch.randn(1, COLUMNS)) == [[16]]


def test_layers_with_and_without_bias_are_two_calls():
    module = Products(all_of, bias=True)
    module.two.bias = None
    assert rows_in_calls(module, torch.randn(1, COLUMNS)) == [[5, 40], [16]]


def strided(module):
    module.one.weight = nn.Parameter(torch.randn(COLUMNS, 5).T)


def of_another_type(module):
    module.double()


def broadcast_bias(module):
    module.one.bias = nn.Parameter(torch.randn(1))


@pytest.mark.parametrize(
    ("change", "dtype", "shape", "taken"),
    [
        (strided, torch.float32, (1,), [[16, 40]]),
        (broadcast_bias, torch.float32, (1,), [[16, 40]]),
        (of_another_type, torch.float64, (1,), []),
        (lambda module: None, torch.float32, (5,), []),
    ],
)
def test_what_the_kernel_does_not_take_stays(change, dtype, shape, taken):
    module = Products(all_of)
    change(module)
    assert rows_in_calls(module, torch.randn(*shape, COLUMNS, dtype=dtype)) == taken


@torch._functorch.config.patch(enable_autograd_cache=False)
@torch._inductor.config.patch(fx_graph_cache=False)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_gets_four_calls_in_each_layer(quantize, monkeypatch):
    """For queries, keys and values; the output of attention; gate and up; down."""
    calls, filtered = [], []

    def spy_on_graph(graph):
        merge_linears(graph)
        nodes = graph.find_nodes(op="call_function", target=ops.linear_operator)
        calls.extend((len(node.args[1]), len(node.args[2])) for node in nodes)

    def spy_on_guards(guards):
        kept = keep_guards(guards)
        filtered.append((len(kept), sum(kept)))
        return kept

    monkeypatch.setattr(step_backend, "merge_linears", spy_on_graph)
    monkeypatch.setattr(step_backend, "keep_guards", spy_on_guards)
    model = build("llama", torch.bfloat16)
    if quantize is not None:
        pytest.importorskip("torchao")
        quantize_weights(model, quantize)
    sinkattn.enable(model, 2, 14, compile=True)
    scales = [count if quantize else 0 for count in (3, 1, 2, 1)]
    assert calls == list(zip((3, 1, 2, 1), scales, strict=True)) * model.config.num_hidden_layers
    [(every, kept)] = filtered
    # A fourth to a third of them are of forwards that quantized layers have been given.
    assert (every - kept > every / 6) == (quantize is not None)


@pytest.mark.parametrize("kind", [PatchedForward, LinearForward])
def test_only_guards_within_a_patched_forward_are_dropped(kind):
    """Those of the forward itself stay, and of what only has a similar name."""

    class Guard:
        def __init__(self, name, value=None):
            self.name, self.value = name, value

    patched = kind(print)
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
