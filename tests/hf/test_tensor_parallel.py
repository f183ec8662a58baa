"""Models whose heads transformers spreads over processes: 2 and 4 ranks with gloo, compared with one process."""

import functools
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import rank_process
import torch
from families import build
from rank_process import PROMPT, S, W
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

import sinkattn

FAMILIES = ["llama", "qwen3", "gpt_oss", "mixtral"]
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "vocab_size": 100}
TOLERANCE = 1e-5

# Older versions of transformers have neither this style, for parameters such as sink logits, nor expert parallelism.
HAS_SPLIT_SINKS = "local_params" in ALL_PARALLEL_STYLES
# The ranks are forked from a process that has imported what they need.
PRELOADED = ["sinkattn.hf", "transformers.distributed", "torch.distributed.tensor", "torch._dynamo"]


def model_of(name: str):
    return build("llama", **{**SIZES, "num_key_value_heads": 2}) if name == "few heads" else build(name, **SIZES)


@functools.cache
def alone(name: str) -> dict[str, Any]:
    """The same in one process."""
    return rank_process.stream_results(sinkattn.enable(model_of(name), S, W))


def run_ranks(ranks: int, folder: Path, families: list[str], parts: list[str]) -> list[dict[str, Any]]:
    """What each rank finds; raises the error of the first that fails."""
    for name in {*families, *({"few heads"} & {*parts})}:
        model_of(name).save_pretrained(folder / name)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        rank_process.run, (ranks, folder, families, parts), ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def assert_same_stream(name: str, found: list[dict[str, Any]], *, is_split: bool) -> None:
    """The logits are those of one process, and each rank's rings hold its own heads of each layer, and no others."""
    want = alone(name)
    for rank, got in enumerate(found):
        torch.testing.assert_close(got["logits"], want["logits"], rtol=0, atol=TOLERANCE)
        for kind in ("keys", "values"):
            for ring, whole in zip(got[kind], want[kind], strict=True):
                heads = whole.shape[1] // len(found) if is_split else whole.shape[1]
                first = rank * heads if is_split else 0
                assert ring.shape[1] == heads
                torch.testing.assert_close(ring, whole[:, first : first + heads], rtol=0, atol=TOLERANCE)
    if is_split:
        assert not torch.allclose(found[0]["keys"][0], found[1]["keys"][0], atol=0.1)


def assert_same_words(found: list[dict[str, Any]]) -> None:
    """All ways of generating give the same on all ranks, `StreamPool` included."""
    want = rank_process.generated(sinkattn.enable(model_of("llama"), S, W))
    for got in found:
        assert got["generated"] == want
        assert got["pool"].items() <= want.items()
    led, *joined = [got["led pool"] for got in found]
    assert led.pop("error").startswith("ValueError: tokens: expected ids from 0")
    assert led == {name: tokens for name, tokens in want.items() if name.startswith("stream")}
    for each in joined:
        assert each["error"].startswith("ValueError: model: expected rank 0 to lead the pool")


def assert_same_gradients(found: list[dict[str, Any]]) -> None:
    """Those of shards, put together, are those of one process."""
    want = rank_process.gradients(sinkattn.enable(model_of("llama"), S, W))
    for got in found:
        assert got["gradients"].keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(got["gradients"][name], x, rtol=0, atol=1e-5 * float(x.abs().max()))


def assert_own_files(found: list[dict[str, Any]]) -> None:
    """Each rank goes on from the heads that it has saved, and from no others."""
    for got in found:
        want = alone("llama")["logits"][:, PROMPT:]
        torch.testing.assert_close(got["saved"]["logits"], want, rtol=0, atol=TOLERANCE)
        assert got["saved"]["file of another rank"].startswith("ValueError: path: weights: expected")


def assert_same_rounding(found: list[dict[str, Any]]) -> None:
    """Rings of 8 bits hold the rank's own heads, rounded as in one process."""
    want, whole = rank_process.eight_bit(model_of("llama")), alone("llama")["logits"]
    assert (want["logits"] - whole).norm() > 1e-3 * whole.norm()
    for got in found:
        # Another order of sums may let a few elements become their neighbours.
        assert (got["eight bit"]["logits"] - want["logits"]).norm() < (want["logits"] - whole).norm() / 2
        assert got["eight bit"]["nbytes"] == want["nbytes"] / len(found)


def assert_refused(found: list[dict[str, Any]]) -> None:
    """All ranks refuse what is not supported, also what only the last one can see."""
    for rank, errors in enumerate(found):
        assert (
            errors["graphs"] == "ValueError: graphs: expected False or 'auto' for a model spread over 2 ranks, got True"
        )
        assert errors["learner"].startswith("ValueError: model: expected one in one process to learn")
        assert "tensor or expert parallelism, got fsdp_size=2" in errors["data parallel"]
        is_last = rank == len(found) - 1
        reason = "in a way that is not a known rotary embedding" if is_last else "another rank has refused it"
        assert reason in errors["one rank"]
        assert errors["left alone"]


# One test for all that the same processes do, or else workers of pytest-xdist would each start their own.
@pytest.mark.slow
def test_two_ranks_do_what_one_process_does(tmp_path):
    found = run_ranks(2, tmp_path, FAMILIES, ["llama", "split sinks"][: 1 + HAS_SPLIT_SINKS])
    for family in FAMILIES:
        # By transformers' plan the attention of gpt-oss is whole on each rank.
        assert_same_stream(family, [each[family] for each in found], is_split=family != "gpt_oss")
    if HAS_SPLIT_SINKS:
        assert_same_stream("gpt_oss", [each["split sinks"] for each in found], is_split=True)
    what_it_does = [each["what it does"] for each in found]
    assert_same_words(what_it_does)
    assert_same_gradients(what_it_does)
    assert_own_files(what_it_does)
    assert_same_rounding(what_it_does)
    assert_refused([each["errors"] for each in found])


@pytest.mark.slow
def test_four_ranks_do_what_one_process_does(tmp_path):
    found = run_ranks(4, tmp_path, FAMILIES, ["few heads"])
    for family in FAMILIES:
        assert_same_stream(family, [each[family] for each in found], is_split=family != "gpt_oss")
    # transformers cannot run a model with fewer key heads than ranks by its own plan.
    few_heads = [each["few heads"] for each in found]
    assert_same_stream("few heads", few_heads, is_split=False)
    assert all("its 2 key heads cannot be spread evenly over 4 ranks" in each["refused"] for each in few_heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gone", "error"), [(0, "rank 0, which leads its pool, has ended"), (1, "cannot go on with the ranks")]
)
def test_a_rank_that_ends_lets_no_other_one_wait(tmp_path, gone, error):
    found = run_ranks(2, tmp_path, ["llama"], [f"without {gone}"])
    assert error in found[1 - gone]["error"]
    assert "error" not in found[gone]


@pytest.mark.slow
def test_the_decode_step_compiles(tmp_path):
    found = run_ranks(2, tmp_path, ["llama"], ["compiled"])
    assert_same_stream("llama", [each["compiled"] for each in found], is_split=True)


def test_the_tolerance_sees_heads_of_the_wrong_rank():
    model = model_of("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.o_proj.weight
            weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
    wrong = rank_process.stream_results(sinkattn.enable(model, S, W))
    assert (wrong["logits"] - alone("llama")["logits"]).abs().max() > 1e4 * TOLERANCE
