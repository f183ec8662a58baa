"""The backward kernels in Triton: on a GPU where there is one, in Triton's interpreter elsewhere.

Against the matrix products of PyTorch in fp64, which tests/test_gradients.py compares with autograd.
"""

import pytest
import torch
from factories import make_qkv, make_rope

pytest.importorskip("triton")

from sinkattn import RingKVCache, sink_attention
from sinkattn.ops import attention, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16}
OPTIONS = {
    "plain": {},
    "soft cap": {"softcap": 2.0},
    "sink logits": {"sink_logits": torch.linspace(-2, 2, 4)},
    "ALiBi": {"alibi_slopes": 2.0 ** -torch.arange(1.0, 5)},
}


def gradients_of(streams, past, layout, dtype, *, kernel, rope=None, lengths=None, sink_logits=None, **options):
    """Gradients of the tokens after ``past``, of a call on a stream of those before."""
    batch, kv_heads, _, head_dim = streams[1].shape
    sizes = (batch, kv_heads, head_dim, *layout)
    ring = RingKVCache(*sizes, value_dim=streams[2].shape[3], dtype=dtype, device=DEVICE)
    streams = [x.to(DEVICE, dtype) for x in streams]
    options = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in options.items()}
    options |= {"rope": rope, "backend": "triton" if kernel else "auto"}
    leaves = [x[:, :, past:].detach().clone().requires_grad_() for x in streams]
    if sink_logits is not None:
        leaves.append(sink_logits.detach().clone().to(DEVICE, torch.promote_types(dtype, torch.float32)))
        leaves[-1].requires_grad_()
        options["sink_logits"] = leaves[-1]
    with torch.no_grad():
        sink_attention(*(x[:, :, :past] for x in streams), ring, **options)
    out = sink_attention(*leaves[:3], ring, lengths=None if lengths is None else lengths.to(DEVICE), **options)
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=torch.float64).to(DEVICE, dtype)
    (out * weights).sum().backward()
    return [x.grad.double() for x in leaves]


def gradients_with(kernel, *args, **options):
    """By the kernels, or by matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinkattn.ops.attention._backward_kernel", lambda backend: "triton" if kernel else None)
        return gradients_of(*args, kernel=kernel, **options)


def check(layout, past, tokens, dtype, heads=HEADS, **options):
    """Errors at most twice those of matrix products in the same dtype, plus one rounding of sums."""
    torch.manual_seed(0)
    streams = [x.to(dtype) for x in make_qkv(past + tokens, **heads)]
    want = gradients_with(False, streams, past, layout, torch.float64, **options)
    plain = gradients_with(False, streams, past, layout, dtype, **options)
    got = gradients_with(True, streams, past, layout, dtype, **options)
    # Weights and their derivatives are rounded to the dtype before products, as in the forward.
    rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for x, y, z in zip(got, plain, want, strict=True):
        assert (x - z).norm() <= 2 * (y - z).norm() + rounding * z.norm()
    return got, want


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("past", "tokens"), [(2, 40), (90, 40)])
def test_options(past, tokens, options):
    check((3, 25, 0), past, tokens, torch.float32, rope=make_rope(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 32}
    check((4, 70, 0), 100, 90, dtype, heads=heads, rope=make_rope(32))


@pytest.mark.parametrize(
    ("layout", "past", "tokens", "heads"),
    [
        ((20, 30, 0), 10, 60, {"heads": 2, "kv_heads": 1}),  # sinks of several blocks, old and new
        ((0, 150, 8), 170, 40, {"heads": 3, "kv_heads": 1, "head_dim": 24, "value_dim": 40}),
        ((4, 12, 0), 50, 1, {"heads": 9, "kv_heads": 3, "head_dim": 80}),
        ((2, 200, 0), 0, 150, {"heads": 1, "kv_heads": 1, "head_dim": 7, "value_dim": 3}),
    ],
    ids=str,
)
def test_sizes(layout, past, tokens, heads):
    check(layout, past, tokens, torch.float32, heads=heads)


def test_rows_of_different_lengths():
    """Padding, even NaN, has no effect and no gradient."""
    lengths = torch.tensor([23, 0])
    got, want = check((3, 25, 0), 30, 40, torch.float32, rope=make_rope(), lengths=lengths)
    for x, y in zip(got, want, strict=True):
        assert not x[0, :, 23:].any()
        assert not x[1].any()
        assert y[0, :, :23].any()


def test_interleaved_rotation_of_a_part_of_the_head():
    check((3, 25, 0), 40, 20, torch.float32, rope=make_rope(8, style="interleaved"))


def test_the_comparison_notices_a_wrong_rotation_of_sinks(monkeypatch):
    torch.manual_seed(0)
    rope, streams = make_rope(), make_qkv(110, **HEADS)
    want = gradients_with(False, streams, 70, (3, 25, 0), torch.float64, rope=rope)
    turned = gradients._Rotated._turned
    monkeypatch.setattr(gradients._Rotated, "_turned", lambda self, x, index, sign=1: turned(self, x, 0, sign))
    got = gradients_with(True, streams, 70, (3, 25, 0), torch.float32, rope=rope)
    assert (got[0] - want[0]).norm() > 1e-2 * want[0].norm()


def test_it_is_off_until_a_gpu_has_run_it(monkeypatch):
    assert attention._backward_kernel("triton") is None
    monkeypatch.setattr(gradients, "TRITON_BACKWARD", True)
    assert attention._backward_kernel("triton") == "triton"
    assert attention._backward_kernel("reference") is None
    assert attention._backward_kernel("cpu") == "cpu"
