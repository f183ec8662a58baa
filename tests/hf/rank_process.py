"""What each rank of a model runs in the tests of tensor parallelism, in a process of its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
import transformers
from families import random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sinkattn
from sinkattn.hf import stream_tokens
from sinkattn.hf.versions import GENERATE_CACHE

S, W = 2, 12
PROMPT, STREAM = 20, 40  # tokens: both longer than the window
NEW = 20
# What keeps attention whole on each rank, as transformers does for Phi-3.
WHOLE_ATTENTION = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}
# transformers leaves the attention of gpt-oss whole. This spreads it, with the sink logits of its softmax.
SPLIT_ATTENTION = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.self_attn.sinks": "colwise",
    "model.layers.*.self_attn": "local_params",
}


@torch.no_grad()
def stream_logits(model: PreTrainedModel, cache: sinkattn.SinkCache) -> Tensor:
    """Logits of a stream: a prompt, decode steps, and a chunk of the rest."""
    ids = random_ids(1, STREAM)
    calls = (ids[:, :PROMPT], *ids[:, PROMPT : PROMPT + 8].split(1, dim=1), ids[:, PROMPT + 8 :])
    return torch.cat([model(input_ids=x, **{GENERATE_CACHE: cache}).logits for x in calls], dim=1)


def stream_results(model: PreTrainedModel) -> dict[str, Any]:
    """Logits of a stream, and what is in the rings after it."""
    cache = sinkattn.SinkCache(model)
    logits = stream_logits(model, cache)
    rings = [layer.ring for layer in cache.layers]
    return {"logits": logits, "keys": [ring.keys for ring in rings], "values": [ring.values for ring in rings]}


def generated(model: PreTrainedModel) -> dict[str, Any]:
    """What a model says in each way of generating."""
    prompt = random_ids(1, PROMPT)
    return {
        "generate": model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0].tolist(),
        "beams": model.generate(prompt, max_new_tokens=NEW, do_sample=False, num_beams=3)[0].tolist(),
        "sampled": list(stream_tokens(model, prompt, max_new_tokens=NEW, temperature=1.0, seed=7)),
        **{
            f"stream {seed}": list(stream_tokens(model, random_ids(1, PROMPT, seed), max_new_tokens=NEW))
            for seed in range(3)
        },
    }


def pool_tokens(model: PreTrainedModel) -> dict[str, Any]:
    """What the streams of a pool say, token by token in turn."""
    with sinkattn.StreamPool(model, 3) as pool:
        streams = [pool.open() for _ in range(3)]
        for seed, stream in enumerate(streams):
            stream.feed(random_ids(1, PROMPT, seed))
        steps = zip(*[stream.generate(NEW) for stream in streams], strict=True)
        return {f"stream {seed}": [*tokens] for seed, tokens in enumerate(zip(*steps, strict=True))}


def led_pool_tokens(model: PreTrainedModel, rank: int) -> dict[str, Any]:
    """What the streams of a pool say that rank 0 leads, each in a thread, and two of them parked at a time."""
    if rank:
        sinkattn.hf.join_pool(model)
        return {"error": error_of(sinkattn.StreamPool, model, leads=True)}
    found: dict[str, Any] = {}

    def say(seed: int) -> None:
        stream = pool.open()
        stream.feed(random_ids(1, PROMPT, seed))
        found[f"stream {seed}"] = [*stream.generate(NEW)]

    with sinkattn.StreamPool(model, 2, max_parked=2, leads=True) as pool:
        threads = [threading.Thread(target=say, args=[seed]) for seed in range(3)]
        for thread in threads:
            thread.start()
        found["error"] = error_of(pool.open().feed, [-1])
        for thread in threads:
            thread.join()
    return found


def pool_without_a_rank(path: Path, rank: int, gone: int) -> str:
    """What a rank finds when another one, of this number, has gone in the midst of a pool that rank 0 leads."""
    model = sinkattn.enable(load(path), S, W)
    if rank:
        if rank == gone:
            model.model.layers[1].register_forward_pre_hook(lambda *args: os._exit(0))
        return error_of(sinkattn.hf.join_pool, model)
    with sinkattn.StreamPool(model, 2, leads=True) as pool:
        stream = pool.open()
        if rank == gone:
            stream.feed([1])
            os._exit(0)
        errors = [error_of(stream.feed, [1]) for _ in range(2)]
        assert errors[0]
        assert pool.has_failed
        return errors[1]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the loss of a stream, those of shards put together."""
    ids = random_ids(1, STREAM)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


def saved_and_loaded(model: PreTrainedModel, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Logits of a stream that goes on from a file, and what another rank's file gives."""
    ids = random_ids(1, STREAM)
    with torch.no_grad():
        cache = sinkattn.SinkCache(model)
        model(input_ids=ids[:, :PROMPT], **{GENERATE_CACHE: cache})
        cache.save(folder / f"{rank}.stream")
        cache = sinkattn.load_stream(model, folder / f"{rank}.stream")
        logits = model(input_ids=ids[:, PROMPT:], **{GENERATE_CACHE: cache}).logits
    torch.distributed.barrier()
    other = error_of(sinkattn.load_stream, model, folder / f"{(rank + 1) % ranks}.stream")
    return {"logits": logits, "file of another rank": other}


def eight_bit(model: PreTrainedModel) -> dict[str, Any]:
    """Logits of a stream over rings of 8 bits, and the bytes of these."""
    cache = sinkattn.SinkCache(sinkattn.enable(model, S, W, cache_dtype="int8"))
    return {"logits": stream_logits(model, cache), "nbytes": cache.nbytes}


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """Name and message of the error that a call raises; empty without one."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load(path: Path, **options: Any) -> PreTrainedModel:
    """A saved model, spread over the ranks of this process group."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**{"tp_size": torch.distributed.get_world_size(), **options})
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config).eval()


def what_llama_does(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What an enabled Llama does on this rank besides `stream_results`."""
    model = sinkattn.enable(load(path), S, W)
    found = {
        "generated": generated(model),
        "pool": pool_tokens(model),
        "led pool": led_pool_tokens(model, rank),
        "gradients": gradients(model),
        "saved": saved_and_loaded(model, path.parent, rank, ranks),
    }
    return {**found, "eight bit": eight_bit(sinkattn.disable(model))}


def what_is_refused(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Errors, and whether they have left the model alone."""
    model = load(path)
    errors = {
        "graphs": error_of(sinkattn.enable, model, S, W, graphs=True),
        "data parallel": error_of(lambda: sinkattn.enable(load(path, tp_size=1, fsdp_size=ranks), S, W)),
    }
    errors["learner"] = error_of(sinkattn.OnlineLearner, sinkattn.enable(model, S, W), learn="all")
    sinkattn.disable(model)
    if rank == ranks - 1:
        # The keys of this rank turn in no known way; the others see nothing of them.
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.to_local().fill_(torch.inf)
    errors["one rank"] = error_of(sinkattn.enable, model, S, W)
    return {**errors, "left alone": not any("_sinkattn" in module.__dict__ for module in model.modules())}


def few_heads(path: Path) -> dict[str, Any]:
    """A Llama with fewer key heads than ranks, by its own plan and with attention whole on each rank."""
    whole = stream_results(sinkattn.enable(load(path, tp_plan=WHOLE_ATTENTION), S, W))
    return {**whole, "refused": error_of(sinkattn.enable, load(path), S, W)}


def split_sinks(path: Path, ranks: int) -> dict[str, Any]:
    """A gpt-oss with all of its heads and experts spread."""
    return stream_results(sinkattn.enable(load(path, tp_plan=SPLIT_ATTENTION, ep_size=ranks), S, W))


def compiled(path: Path) -> dict[str, Any]:
    """`stream_results` with a compiled decode step."""
    return stream_results(sinkattn.enable(load(path), S, W, compile=True))


def run(rank: int, ranks: int, folder: Path, families: list[str], parts: list[str]) -> None:
    """Write what a rank finds to a file: of models of families, saved in a folder, and in the parts named."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting_place = f"file://{folder / 'ranks'}"
    torch.distributed.init_process_group("gloo", meeting_place, rank=rank, world_size=ranks)
    found = {family: stream_results(sinkattn.enable(load(folder / family), S, W)) for family in families}
    if "llama" in parts:
        found["what it does"] = what_llama_does(folder / "llama", rank, ranks)
        found["errors"] = what_is_refused(folder / "llama", rank, ranks)
    if "split sinks" in parts:
        found["split sinks"] = split_sinks(folder / "gpt_oss", ranks)
    if "few heads" in parts:
        found["few heads"] = few_heads(folder / "few heads")
    for gone in range(ranks):
        if f"without {gone}" in parts:
            torch.save(found, folder / f"{rank}.pt")
            found["error"] = pool_without_a_rank(folder / "llama", rank, gone)
    if "compiled" in parts:
        found["compiled"] = compiled(folder / "llama")
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
