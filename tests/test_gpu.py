"""What only a GPU can show: the CUDA ring ops against the CPU's, graphs, races, synchronisation. Skipped without one.

The kernels' results are checked in tests/kernels/test_attention.py, on a GPU as in the interpreter.
"""

import copy
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
from budget import assert_within_budget, oracle_of
from factories import make_qkv, make_rope, max_error, strided
from families import build
from hf_models import random_ids
from test_ops import op_calls

import sinkattn
from sinkattn import RingKVCache, ops, reference, sink_attention
from sinkattn.hf import decode_steps
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.pool.engine import Engine
from sinkattn.rope import table_dtype

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
has_fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not has_fp8, reason="needs compute capability 8.9")


def on_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


def assert_equal_on_gpu(function, tensors, **options):
    """The op does the same, bit for bit, to tensors on the GPU; the strides of inputs are kept."""
    there = {name: x.cuda() if x.is_contiguous() else strided(x.cuda()) for name, x in tensors.items()}
    given = {name: on_gpu(x) for name, x in options.items()}
    expected, got = getattr(ops, function)(**tensors, **options), getattr(ops, function)(**there, **given)
    for x, y in zip(expected or (), got or (), strict=True):
        assert torch.equal(x, y.cpu())
    for name, x in tensors.items():
        assert torch.equal(x, there[name].cpu()), name


def make_cache(batch, slots, head_dim, dtype):
    return {name: torch.randn(batch, 2, slots, head_dim).to(dtype) for name in ("keys", "values")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 80, 128])
@pytest.mark.parametrize(("style", "rotary_dim"), [("half", 1.0), ("interleaved", 1.0), ("half", 0.5), (None, 0)])
def test_append_equals_the_cpu(style, rotary_dim, head_dim, dtype):
    pairs = int(head_dim * rotary_dim) // 2
    for contiguous, of_rows in ((False, False), (True, False), (True, True)):
        for tokens in (1, 5, 40):
            seen = torch.tensor([0, 3, 10**9])
            _, key, value = make_qkv(tokens, batch=3, head_dim=head_dim, dtype=dtype)
            if contiguous:
                key, value = key.contiguous(), value.contiguous()
            options = {"num_sinks": 4, "lengths": torch.tensor([tokens, 0, tokens - 1])}
            if pairs:
                rope = make_rope(2 * pairs, style)
                cos, sin = rope.tables(seen[:, None] + torch.arange(tokens), table_dtype(dtype))
                options |= {"cos": cos, "sin": sin, "interleaved": rope.interleaved}
            if of_rows:
                options |= {"rows": torch.tensor([4, 0, 2]), "row_sinks": torch.tensor([3, 4, 0])}
            cache = make_cache(5 if of_rows else 3, 25, head_dim, dtype)
            assert_equal_on_gpu("append_", {**cache, "key": key, "value": value, "seen": seen}, **options)


@pytest.mark.parametrize("cache_dtype", ["int8", pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 80, 128])
def test_rounding_equals_the_cpu(head_dim, dtype, cache_dtype):
    """Appended by the operator, and by the Triton kernels of one token, of a few and of many."""
    rope = make_rope(head_dim // 2 * 2) if head_dim > 1 else None
    calls, new = (5, 1, 40, 1, 3), make_qkv(50, head_dim=head_dim, dtype=dtype)
    on_cpu, appended, attended = (
        RingKVCache(2, 2, head_dim, 4, 21, 3, dtype=dtype, cache_dtype=cache_dtype, device=device)
        for device in ("cpu", "cuda", "cuda")
    )
    for parts in zip(*(x.split(calls, dim=2) for x in new), strict=True):
        there = [x.cuda() for x in parts]
        on_cpu.append(*parts[1:], rope=rope)
        appended.append(*there[1:], rope=rope)
        sink_attention(*there, attended, rope=rope)
        for ring in (appended, attended):
            for name, x in on_cpu.tensors.items():
                assert torch.equal(x.float(), ring.tensors[name].cpu().float()), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 80, 128])
def test_moves_equal_the_cpu(head_dim, dtype):
    for source in ([0, 1, 2, 3], [1, 2, 3, 0], [1, 0, 3, 2], [2, 2, 2, 2], [3, 0, 0, 1]):
        assert_equal_on_gpu("reorder_", make_cache(4, 9, head_dim, dtype), source=torch.tensor(source))
    for rows in ([], [2], [0, 3], [1, 1]):
        assert_equal_on_gpu("reset_", make_cache(4, 9, head_dim, dtype), rows=torch.tensor(rows, dtype=torch.int64))
    cache = make_cache(4, 9, head_dim, dtype) | {"seen": torch.tensor([0, 1, 9, 10**9 + 2])}
    assert_equal_on_gpu("linearise", cache, num_sinks=2, window=4)


def test_reorder_of_many_rows_equals_the_cpu():
    for batch in (64, 1500):
        source = torch.randint(batch, (batch,))
        assert_equal_on_gpu("reorder_", make_cache(batch, 3, 16, torch.float16), source=source)


def test_rollback_equals_the_cpu():
    counters = {"seen": torch.tensor([10, 20]), "peak": torch.tensor([0, 21])}
    assert_equal_on_gpu("rollback_", counters, counts=torch.tensor([2, 0]), headroom=3)
    there = {name: x.cuda() for name, x in counters.items()}
    for counts in ([0, 3], [11, 0], [-1, 0]):
        messages = []
        for tensors in (counters, there):
            with pytest.raises(RuntimeError) as refusal:
                ops.rollback_(**tensors, counts=torch.tensor(counts, device=tensors["seen"].device), headroom=3)
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]
    assert all(torch.equal(counters[name], x.cpu()) for name, x in there.items())


@pytest.mark.parametrize("call", op_calls())
def test_opcheck(call):
    name, arguments = op_calls()[call]
    torch.library.opcheck(getattr(torch.ops.sinkattn, name).default, tuple(map(on_gpu, arguments)))


def test_auto_is_triton():
    assert ops.select_backend(torch.device("cuda")) == "triton"
    assert ops.select_backend(torch.device("cuda"), dtype=torch.float64) == "reference"


def paired_rings(layout, batch=2, dtype=torch.float32, heads=None, cache_dtype=None):
    """A ring on the CPU, whose kernel is checked elsewhere, and the same on the GPU."""
    heads = heads or {"heads": 4, "kv_heads": 2, "head_dim": 64}
    shape, dtypes = (batch, heads["kv_heads"], heads["head_dim"], *layout), {"dtype": dtype, "cache_dtype": cache_dtype}
    rings = [RingKVCache(*shape, **dtypes, device=device) for device in ("cpu", "cuda")]
    return rings, heads


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_one_captured_graph_stays_right(tokens, cache_dtype):
    """Over several wraps, then from a million tokens on, with nothing allocated in between."""
    layout, rope = (4, 150, 3), make_rope(64)
    (cpu, gpu), heads = paired_rings(layout, cache_dtype=cache_dtype)
    inputs = [x.cuda() for x in make_qkv(tokens, **heads)]

    def step():
        return sink_attention(*inputs, gpu, rope=rope)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    gpu.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    gpu.reset()

    def check(steps):
        for _ in range(steps):
            new = make_qkv(tokens, **heads)
            for x, y in zip(inputs, new, strict=True):
                x.copy_(y)
            graph.replay()
            expected = sink_attention(*new, cpu, rope=rope)
            assert max_error(out.cpu(), expected.double()) < 1e-4
        assert torch.equal(gpu.seen.cpu(), cpu.seen)
        assert not gpu.arrivals.any()

    check(5)
    before = torch.cuda.memory_allocated()
    check(600 // tokens)
    assert torch.cuda.memory_allocated() == before
    for ring in (cpu, gpu):
        ring.seen.fill_(10**6)
    check(2 + 160 // tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 128), (71, 1, 64), (32, 1, 256), (8, 2, 80)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 300])
def test_matrix_units_within_budget(tokens, heads, kv_heads, head_dim, dtype):
    """Every shape of tile, over several blocks, in the dtypes that matrix units take."""
    layout, rings = (4, 1500, 3), []
    for kind in (dtype, torch.float64):
        torch.manual_seed(0)
        ring = RingKVCache(2, kv_heads, head_dim, *layout, dtype=kind, device="cuda")
        for x in (ring.keys, ring.values):
            x.copy_(torch.randn(x.shape).to(dtype))
        ring.seen.copy_(torch.tensor([900, 10**6 + 7]))
        rings.append(ring)
    new = [x.cuda() for x in make_qkv(tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)]
    out = sink_attention(*new, rings[0])
    oracle = oracle_of(dtype, reference.sink_attention, *(x.double() for x in new), rings[1])
    assert_within_budget(out, oracle)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.bfloat16, "int8"), pytest.param(torch.float16, "fp8", marks=needs_fp8), (torch.float32, "int8")],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 128), (71, 1, 64), (32, 1, 256), (8, 2, 80)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_eight_bits_within_budget(tokens, heads, kv_heads, head_dim, dtype, cache_dtype):
    """Every shape of tile, over several blocks; the sums of 8 bits are those of ``dtype``."""
    sizes = (2, kv_heads, head_dim, 4, 1500, 3)
    ring = RingKVCache(*sizes, dtype=dtype, cache_dtype=cache_dtype, device="cuda")
    for x, name in ((ring.keys, "key_scales"), (ring.values, "value_scales")):
        vectors = torch.randn(x.shape).to(dtype)
        q, scales = reference.quantise(reference.hadamard(vectors) if x is ring.keys else vectors, x.dtype)
        x.copy_(q)
        ring.eight_bit[name].copy_(scales)
    for name in ("sink_keys", "sink_values"):
        ring.eight_bit[name].normal_()
    ring.seen.copy_(torch.tensor([900, 10**6 + 7]))
    exact = copy.deepcopy(ring)
    query, key, value = (
        x.cuda() for x in make_qkv(tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    )
    out = sink_attention(query, key, value, ring)
    assert_within_budget(out, oracle_of(dtype, reference.sink_attention, query.double(), key, value, exact))
    for name, x in exact.tensors.items():
        assert torch.equal(x.float(), ring.tensors[name].float()), name


def test_lengths_out_of_range_are_clamped():
    ring = RingKVCache(2, 2, 64, 4, 20, device="cuda")
    sink_attention(*(x.cuda() for x in make_qkv(3, head_dim=64)), ring, lengths=torch.tensor([5, -1], device="cuda"))
    assert ring.seen.tolist() == [3, 0]


def test_calls_never_wait_for_the_device():
    rope = make_rope(64)
    of_rows = {"rows": torch.tensor([1, 0]), "row_sinks": torch.tensor([4, 0]), "begins": torch.tensor([0, 0])}
    rings = [RingKVCache(2, 2, 64, 4, 150, cache_dtype=cache_dtype, device="cuda") for cache_dtype in (None, "int8")]
    for options, ring in product(({}, {name: x.cuda() for name, x in of_rows.items()}), rings):
        for tokens in (1, 3, 40):
            new = [x.cuda() for x in make_qkv(tokens, head_dim=64)]
            sink_attention(*new, ring, rope=rope, **options)  # compiles, and copies what stays
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                sink_attention(*new, ring, rope=rope, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_token_is_one_launch(cache_dtype, monkeypatch):
    monkeypatch.undo()  # or memory that is filled with NaN first would be launches as well
    ring = RingKVCache(2, 2, 64, 4, 4096, dtype=torch.bfloat16, cache_dtype=cache_dtype, device="cuda")
    q, k, v = (x.cuda() for x in make_qkv(1, head_dim=64, dtype=torch.bfloat16))
    tables = [x.cuda() for x in make_rope(64).stream_tables(ring.seen.cpu(), 1, num_sinks=4, window=4096)]
    options = {"num_sinks": 4, "window": 4096, "scale": 0.125, "arrivals": ring.arrivals, **ring.eight_bit}
    call = [ring.keys, ring.values, q.contiguous(), k.contiguous(), v.contiguous(), ring.seen, *tables]
    ops.sink_attention_(*call, **options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            ops.sink_attention_(*call, **options)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 5, kernels
    assert all("decode_kernel" in name for name in kernels)


@pytest.mark.parametrize(("batch", "cache_dtype"), [(1, None), (5, None), (64, None), (1, "int8"), (64, "int8")])
def test_results_do_not_depend_on_the_order_of_programs(batch, cache_dtype):
    """The same call over and over, while other work shifts who runs when: the same bits every time."""
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    ring = RingKVCache(batch, 8, 128, 4, 4096, dtype=torch.bfloat16, cache_dtype=cache_dtype, device="cuda")
    for x in ring.tensors.values():
        x.copy_(torch.randn(x.shape, device="cuda") * (1 if x.is_floating_point() else 40))
    ring.seen.copy_(torch.arange(batch) * 997 + 4100)
    new = [x.cuda() for x in make_qkv(1, batch=batch, dtype=torch.bfloat16, **heads)]
    before, seen = [x.clone() for x in ring.tensors.values()], ring.seen.clone()
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    first = None
    for repeat in range(300 if batch < 64 else 50):
        with torch.cuda.stream(side):
            for _ in range(repeat % 4):
                noise = noise.roll(1, 0)
        out = sink_attention(*new, ring, rope=make_rope(128))
        state = [out.clone(), *(x.clone() for x in ring.tensors.values())]
        first = first or state
        assert all(torch.equal(x, y) for x, y in zip(state, first, strict=True)), repeat
        assert not ring.arrivals.any()
        for x, old in zip(ring.tensors.values(), before, strict=True):
            x.copy_(old)
        ring.seen.copy_(seen)


def test_compile_fullgraph():
    rope = make_rope(64)
    (cpu, gpu), heads = paired_rings((4, 150, 0))

    @torch.compile(fullgraph=True)
    def step(query, key, value):
        return sink_attention(query * 2, key, value, gpu, rope=rope) + 1

    for _ in range(170):
        query, key, value = make_qkv(1, **heads)
        expected = sink_attention(query * 2, key, value, cpu, rope=rope) + 1
        assert max_error(step(query.cuda(), key.cuda(), value.cuda()).cpu(), expected.double()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "bloom"])
def test_generate_replays_its_steps(family):
    """Greedy and sampled tokens of a batch with padding are those of plain steps, in every turn."""
    ids, mask = random_ids(2, 9).cuda(), torch.ones(2, 9, dtype=torch.int64, device="cuda")
    mask[0, :3] = 0
    results = []
    for graphs in (False, "auto"):
        model = sinkattn.enable(build(family, torch.bfloat16).cuda(), 2, 30, graphs=graphs)
        cache, turns = sinkattn.SinkCache(model), []
        for sampled in (False, True, False):
            torch.manual_seed(0)
            given = ids if not turns else torch.cat((turns[-1], ids[:, :2]), dim=1)
            past = torch.cat((mask, mask.new_ones(2, given.shape[1] - 9)), dim=1)
            turns.append(model.generate(given, attention_mask=past, cache=cache, max_new_tokens=40, do_sample=sampled))
        results.append(turns)
    assert decode_steps(model, cache) == "replayed from a graph"
    for plain, replayed in zip(*results, strict=True):
        assert torch.equal(plain, replayed)


def test_a_replayed_step_sees_other_weights():
    ids = random_ids(1, 40).cuda()
    results = []
    for graphs in (False, "auto"):
        model = sinkattn.enable(build("llama").cuda(), 2, 30, graphs=graphs)
        cache = sinkattn.SinkCache(model)
        parts = []
        with torch.no_grad():
            for index, token in enumerate(ids.split(1, dim=1)):
                if index == 20:
                    layer = model.model.layers[0].mlp.up_proj
                    layer.weight = torch.nn.Parameter(layer.weight * 1.5)
                    torch.cuda.empty_cache()
                parts.append(model(token, cache=cache).logits)
        results.append(torch.cat(parts, dim=1))
    assert decode_steps(model, cache) == "replayed from a graph"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


SANITIZED = """
import torch
from sinkattn import RingKVCache, sink_attention
for dtype, cache_dtype in ((torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, "int8")):
    ring = RingKVCache(2, 2, 80, 3, 150, 5, dtype=dtype, cache_dtype=cache_dtype, device="cuda")
    for tokens in (1, 200, 1, 4, 1):
        q, k, v = (torch.randn(2, h, tokens, 80, dtype=dtype, device="cuda") for h in (4, 2, 2))
        sink_attention(q, k, v, ring, lengths=torch.tensor([tokens, tokens - 1], device="cuda"))
    ring.rollback(2)
    ring.reorder(torch.tensor([1, 0], device="cuda"))
    ring.linearise()
    ring.reset(torch.tensor([1], device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # Without torch's own allocator, in whose blocks an access out of bounds goes unnoticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def test_a_pool_gives_the_tokens_of_the_cpu():
    lengths, tokens = (3, 30, 55), {}
    for device in ("cpu", "cuda"):
        model = sinkattn.enable(build("llama", torch.float64).to(device), 2, 20, 4)
        pool = sinkattn.StreamPool(model, 2, max_parked=1, max_prefix=7)
        streams = [pool.open(random_ids(1, 7)[0], evict="message" if length == 30 else "token") for length in lengths]
        for stream, length in zip(streams, lengths, strict=True):
            for part in random_ids(1, length, seed=length)[0].split(9):
                stream.feed(part)
        running = [stream.generate() for stream in streams]
        tokens[device] = [[next(each) for each in running] for _ in range(40)]
    assert tokens["cuda"] == tokens["cpu"]


def test_a_pool_replays_its_steps(monkeypatch):
    """Of streams of different ages, sinks and windows, of which more and more generate; and such a step never waits."""
    run, watched = Engine.run, False

    def watch(engine, segments):
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            run(engine, segments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Engine, "run", watch)
    results = []
    for graphs in (False, "auto"):
        model, tokens = sinkattn.enable(build("llama").cuda(), 2, 20, 4, graphs=graphs), []
        pool = sinkattn.StreamPool(model, 6, max_prefix=7)
        streams = [
            pool.open(random_ids(1, 2 + index)[0], evict="message" if index % 2 else "token") for index in range(5)
        ]
        for index, stream in enumerate(streams):
            for seed in range(index):
                stream.feed(random_ids(1, 9, seed=seed)[0])
        running = [stream.generate() for stream in streams]
        for count in (1, 2, 3, 4, 5, 3):
            for round_ in range(12):
                watched = graphs == "auto" and round_ > 8  # a new graph is compared with the step
                tokens.append([next(each) for each in running[:count]])
            watched = False
        results.append(tokens)
    assert results[1] == results[0]
    [steps] = get_patch(model)._step_graphs._steps.values()
    assert sorted(steps) == [1, 2, 4, 6]
    assert all(each.is_replayed for each in steps.values())
    assert len({each.captured.graph._graph.pool() for each in steps.values()}) == 1
