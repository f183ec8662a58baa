"""Gradients of enabled models: of weights, adapters and embeddings, call by call, with the past as a constant."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from families import build
from hf_models import random_ids
from torch import Tensor
from torch.nn.functional import cross_entropy

import sinkattn
from sinkattn import reference
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.swap import ring_patch

S, W = 2, 14
# RoPE of transformers is in fp32, ours in fp64.
ROPE_ROUNDING = 1e-6


def gradients(model) -> dict[str, Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name] - x).norm() <= tolerance * max(x.norm(), 1e-3), name


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Specification:
    """Takes the place of the operator: attention by `reference.streaming_attention`, in plain autograd."""

    def __init__(self, model) -> None:
        layers = get_patch(model).probe_result.layers.values()
        rotations = [layer.rotation for layer in layers]
        assert len(set(rotations)) == 1
        self.rope = None if rotations[0] is None else rotations[0].rope
        self.past: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, keys, values, query, key, value, seen, cos, sin, *, interleaved, lengths, arrivals, backend, **options
    ):
        assert lengths is None
        new = query, key, value
        past = self.past.get(keys.data_ptr())
        streams = new if past is None else [torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)]
        self.past[keys.data_ptr()] = tuple(x.detach() for x in streams)
        return reference.streaming_attention(*streams, rope=self.rope, **options)[:, :, -query.shape[2] :]


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        "gemma2",
        "gpt_neox",
        "falcon-alibi",
        "bloom",
        "gptj",
        "gemma3_text",
        "lfm2",
        "falcon_h1",
        "bamba",
    ],
)
def test_gradients_are_those_of_the_unpatched_model_while_nothing_is_evicted(family):
    """In training mode, without dropout in attention."""
    plain, model = build(family, torch.float64).train(), sinkattn.enable(build(family, torch.float64).train(), S, W)
    ids = random_ids(2, 10)  # within the sliding windows of the families
    for each in (plain, model):
        loss_of(each(ids, use_cache=False).logits, ids).backward()
    assert_same(gradients(model), gradients(plain), ROPE_ROUNDING)


@pytest.mark.parametrize("calls", [[40], [20, 3, 17]], ids=["whole", "in chunks"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "falcon-alibi", "bloom"])
def test_gradients_on_streams_are_those_of_the_specification(family, calls, monkeypatch):
    """Beyond the window, and chunk by chunk on a cache."""
    ids, results = random_ids(2, sum(calls)), []
    for is_specification in (False, True):
        model = sinkattn.enable(build(family, torch.float64), S, W)
        cache = sinkattn.SinkCache(model)
        with monkeypatch.context() as patch:
            if is_specification:
                patch.setattr(sinkattn.ops, "sink_attention_", Specification(model))
            for part in ids.split(calls, dim=1):
                loss_of(model(part, cache=cache).logits, part).backward()
        results.append(gradients(model))
    assert_same(*results, 1e-10)


def test_the_comparison_notices_a_past_that_is_not_constant(monkeypatch):
    ids, results = random_ids(1, 40), []
    for is_constant in (True, False):
        model = sinkattn.enable(build("llama", torch.float64), S, W)
        specification = Specification(model)
        if not is_constant:
            monkeypatch.setattr(Tensor, "detach", lambda self: self)
        cache, loss = sinkattn.SinkCache(model), 0
        with monkeypatch.context() as patch:
            patch.setattr(sinkattn.ops, "sink_attention_", specification)
            for part in ids.split(20, dim=1):
                loss = loss + loss_of(model(part, cache=cache).logits, part)
        loss.backward()
        results.append(gradients(model))
    with pytest.raises(AssertionError):
        assert_same(*results, 1e-3)


def test_padded_batches():
    """Each row has the gradients that it has alone."""
    model = sinkattn.enable(build("llama", torch.float64), S, W)
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :11] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    (loss_of(logits[:1, 11:], ids[:1, 11:]) + loss_of(logits[1:], ids[1:])).backward()
    together = gradients(model)
    model.zero_grad()
    for row in (ids[:1, 11:], ids[1:]):
        loss_of(model(row, use_cache=False).logits, row).backward()
    assert_same(together, gradients(model), 1e-10)


def test_adapters_alone_learn():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    plain, model = (peft.get_peft_model(build("llama", torch.float64), config) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    sinkattn.enable(model, S, W)
    ids = random_ids(2, S + W)
    for each in (plain, model):
        each.train()
        loss_of(each(input_ids=ids, use_cache=False).logits, ids).backward()
    assert all("lora" in name for name in gradients(model))
    assert_same(gradients(model), gradients(plain), ROPE_ROUNDING)


def test_embeddings_and_sink_logits_have_gradients():
    model = sinkattn.enable(build("gpt_oss"), S, W)
    embeddings = model.get_input_embeddings()(random_ids(1, 30)).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    assert embeddings.grad.norm() > 0
    assert all(x.grad.norm() > 0 for name, x in model.named_parameters() if name.endswith(".sinks"))


def test_training_mode_and_an_optimizer():
    """Some steps, in which the loss falls as in the unpatched model; then it generates."""
    losses = []
    ids = random_ids(4, S + W)
    for streaming in (False, True):
        model = build("llama").train()
        if streaming:
            sinkattn.enable(model, S, W)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)
    assert losses[1][-1] < losses[1][0] - 0.1
    assert model.eval().generate(ids[:1], max_new_tokens=40, do_sample=False).shape == (1, S + W + 40)


def test_single_tokens_and_compiled_models_have_gradients():
    results = []
    for compiled in (False, True):
        model = sinkattn.enable(build("llama"), S, W, compile=compiled)
        cache, ids = sinkattn.SinkCache(model), random_ids(1, 6)
        for token in ids.split(1, dim=1):
            model(token, cache=cache).logits.square().mean().backward()
        results.append(gradients(model))
    assert_same(*results, 1e-5)


def test_what_has_no_gradients_is_refused():
    ids = random_ids(1, 5)
    dropout = sinkattn.enable(build("llama", attention_dropout=0.1), S, W).train()
    with pytest.raises(RuntimeError, match=r"dropout: expected 0 in attention, got 0\.1"):
        dropout(ids)
    hybrid = sinkattn.enable(build("falcon_h1"), S, W)
    for options in ({}, {"cache": sinkattn.SinkCache(hybrid), "use_cache": False}):
        with pytest.raises(RuntimeError, match="convolutional or recurrent state has gradients only for whole texts"):
            hybrid(ids, **options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon-alibi", "bloom"])
def test_gradient_checkpointing(family, reentrant):
    """The same gradients, chunk by chunk with padding, when backwards come after later calls, and twice."""
    ids, results = random_ids(2, 45), []
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[1, 15:18] = False
    for is_checkpointed in (False, True):
        model = sinkattn.enable(build(family, torch.float64), S, 10).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        cache, losses = sinkattn.SinkCache(model), []
        for part, part_mask in zip(ids.split(15, dim=1), mask.split(15, dim=1), strict=True):
            losses.append(loss_of(model(part, attention_mask=part_mask, cache=cache).logits, part))
        losses.append(loss_of(model(ids, use_cache=False).logits, ids))
        for loss in losses:
            loss.backward(retain_graph=not reentrant)
        if not reentrant:
            losses[1].backward()
        results.append(gradients(model))
        with torch.no_grad():  # the cache is one of three chunks, whatever ran again
            assert cache.get_seq_length() == 45
            results[-1]["next"] = model(ids[:, :3], cache=cache).logits
    if reentrant:
        results[0].pop("next"), results[1].pop("next")
    assert_same(*results, 1e-10)


def checkpointed(family: str = "llama", **options):
    model = sinkattn.enable(build(family, torch.float64), S, 10).train()
    model.gradient_checkpointing_enable(options or None)
    return model


def test_checkpointing_in_several_threads():
    """Each with a cache of its own; then disable() leaves nothing behind."""
    model, ids = checkpointed(), random_ids(2, 40)
    function = model.model.layers[0]._gradient_checkpointing_func

    def losses(seed: int) -> list[float]:
        part, out = ids.roll(seed, dims=1), []
        for length in (20 + seed, 7):
            cache = sinkattn.SinkCache(model)
            for piece in part[:, : 2 * length].split(length, dim=1):
                loss = loss_of(model(piece, cache=cache).logits, piece)
                torch.autograd.grad(loss, [model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight])
                out.append(loss.item())
        return out

    want = [losses(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(losses, range(6))) == want
    sinkattn.disable(model)
    assert model.model.layers[0]._gradient_checkpointing_func is function


@pytest.mark.parametrize("part", ["lm_head", "prompt", "last layer"])
def test_checkpointing_where_little_learns(part):
    """The decoder is frozen, or most of it in evaluation mode."""
    results, ids = [], random_ids(2, 12)
    for streaming in (False, True):
        model = build("llama", torch.float64).train()
        model.gradient_checkpointing_enable()
        if part == "last layer":
            model.model.eval()
            model.model.layers[-1].train()
        else:
            model.model.requires_grad_(False)
        prompt = torch.ones(model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        model.prompt = torch.nn.Parameter(prompt) if part == "prompt" else None
        if part == "prompt":
            model.model.embed_tokens.register_forward_hook(lambda module, args, out, model=model: out + model.prompt)
        elif part == "lm_head":
            model.enable_input_require_grads()
        if streaming:
            sinkattn.enable(model, S, W)
        loss_of(model(ids, use_cache=False).logits, ids).backward()
        results.append(gradients(model))
    assert_same(*results, ROPE_ROUNDING)


def test_checkpointed_steps_of_a_prompt_by_hook_have_gradients():
    """Also where steps of one token are compiled, and nothing else of the decoder learns."""
    results = []
    for compile in (False, True):
        model = sinkattn.enable(build("llama"), S, W, compile=compile)
        model.model.requires_grad_(False)
        model.prompt = torch.nn.Parameter(torch.ones(model.config.hidden_size))
        model.model.embed_tokens.register_forward_hook(lambda module, args, out, model=model: out + model.prompt)
        cache = sinkattn.SinkCache(model)
        for token in random_ids(1, 6).split(1, dim=1):
            model(token, cache=cache).logits.square().mean().backward()
        results.append(gradients(model))
    assert_same(*results, 1e-5)


@pytest.mark.parametrize("change", ["select", "repeat", "reset"])
def test_checkpointed_backward_after_the_cache_has_changed(change):
    ids, results = random_ids(2, 30), []
    for changes in (False, True):
        model = checkpointed()
        cache = sinkattn.SinkCache(model)
        loss = loss_of(model(ids, cache=cache).logits, ids)
        if changes:
            with torch.no_grad():
                if change == "select":
                    cache.batch_select_indices(torch.tensor([1]))
                elif change == "repeat":
                    cache.batch_repeat_interleave(2)
                else:
                    cache.reset()
                    model(ids[:1, :5], cache=cache)
        before = cache.layers[0].ring.keys.clone()
        loss.backward()
        assert torch.equal(cache.layers[0].ring.keys, before)
        results.append(gradients(model))
    assert_same(*results, 1e-12)


def test_rings_are_copied_for_layers_that_run_again_unless_they_are_empty(monkeypatch):
    """Bytes that a forward holds until its backward: none of the rings of a new stream, else one copy of each."""
    model, ids, made, new_forward = checkpointed(), random_ids(1, 20), [], ring_patch.RunningForward
    monkeypatch.setattr(ring_patch, "RunningForward", lambda *args: made.append(new_forward(*args)) or made[-1])
    cache = sinkattn.SinkCache(model)
    for part in ids.split(10, dim=1):
        model(part, cache=cache)
    empty, held = (
        [x.untyped_storage().nbytes() for ring in each.rings_before.values() for x in ring[:2]] for each in made
    )
    rings = [x.nbytes for layer in cache.layers for x in (layer.ring.keys, layer.ring.values)]
    assert empty == [8] * len(rings)
    assert held == rings


def test_disable_before_a_checkpointed_backward_is_refused():
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model, ids = checkpointed(**options), random_ids(1, 20)
        model.enable_input_require_grads()
        loss = loss_of(model(ids, use_cache=False).logits, ids)
        sinkattn.disable(model)
        with pytest.raises(RuntimeError, match=r"expected the backward before sinkattn\.disable"):
            loss.backward()


def test_selective_checkpointing():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    ids, results = random_ids(2, 30), []

    def policy(context, operator, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE if operator is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE
        )

    for selective in (False, True):
        model = sinkattn.enable(build("llama", torch.float64), S, 10).train()
        if selective:
            make = partial(create_selective_checkpoint_contexts, policy)
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": make})
        cache = sinkattn.SinkCache(model)
        for part in ids.split(15, dim=1):
            loss_of(model(part, cache=cache).logits, part).backward()
        results.append(gradients(model))
    assert_same(*results, 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles():
    ids, results = random_ids(2, 30), []
    for compiled in (False, True):
        model = sinkattn.enable(build("llama"), S, 10).train()
        step = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            loss_of(step(ids, use_cache=False).logits, ids).backward()
        results.append(gradients(model))
    assert_same(*results, 1e-5)


def test_checkpointed_layers_keep_less():
    """What autograd keeps of the layers is their inputs alone."""
    sizes = []
    for is_checkpointed in (False, True):
        model = sinkattn.enable(build("llama"), S, W).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            model(random_ids(2, 60), use_cache=False)
        sizes.append(sum(kept))
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer(family):
    """transformers' Trainer on an enabled model gives the losses of the unpatched one, where nothing is evicted."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in random_ids(24, S + W)]
    losses = []
    for streaming in (False, True):
        model = build(family)
        if streaming:
            sinkattn.enable(model, S, W)
        arguments = TrainingArguments(
            output_dir="unused", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, seed=0, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)


def test_sft_trainer():
    """trl's SFTTrainer with its defaults, gradient checkpointing among them: the same losses."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, 100)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    row = random_ids(1, S + W).clamp(min=2)[0].tolist()
    data = Dataset.from_list([{"input_ids": row[: 9 + i % 8]} for i in range(24)])
    losses = []
    for streaming in (False, True):
        model = build("llama")
        if streaming:
            sinkattn.enable(model, S, W)
        arguments = trl.SFTConfig(
            output_dir="unused", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, bf16=False, seed=0, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        assert model.is_gradient_checkpointing
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
