"""Every decoding mode of `generate`, for several wraps of the ring, against a plain loop over the model."""

import copy
import threading
from itertools import product
from string import ascii_lowercase

import families
import pytest
import torch
from hf_models import build, random_ids
from test_generate import S, W, greedy
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TextIteratorStreamer,
    pipeline,
)

import sinkattn
from sinkattn.hf.load import load

NEW = 100  # new tokens: the ring wraps around more than three times


@torch.no_grad()
def last_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of a new stream, fed in one call."""
    return model(ids).logits[:, -1]


def test_beam_search_equals_one_without_a_cache():
    model, prompt = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    got = model.generate(prompt, max_new_tokens=NEW, num_beams=3, do_sample=False)
    beams, scores = prompt, torch.zeros(1)
    for _ in range(NEW):
        log_probabilities = last_logits(model, beams).log_softmax(dim=-1) + scores[:, None]
        scores, best = log_probabilities.flatten().topk(3)
        row, token = best // log_probabilities.shape[1], best % log_probabilities.shape[1]
        beams = torch.cat((beams[row], token[:, None]), dim=1)
    assert torch.equal(got, beams[:1])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_prompt_lookup_equals_greedy(family):
    model, prompt = sinkattn.enable(build(family), S, W, headroom=6), random_ids(1, 10).repeat(1, 4)
    got = model.generate(prompt, max_new_tokens=NEW, prompt_lookup_num_tokens=6, do_sample=False)
    assert torch.equal(got, greedy(model, prompt, NEW))


@pytest.mark.parametrize("assistant_streams", [True, False])
def test_assisted_decoding_equals_greedy(assistant_streams):
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=5), random_ids(1, 40)
    assistant = build("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 5
    if assistant_streams:
        sinkattn.enable(assistant, S, W, headroom=8)
    got = model.generate(prompt, max_new_tokens=NEW, assistant_model=assistant, do_sample=False)
    assert torch.equal(got, greedy(model, prompt, NEW))


def test_assistance_in_a_second_turn():
    """Prompt lookup takes only new ids: transformers would feed all ids of the stream again, so they are refused."""
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=6), random_ids(1, 10).repeat(1, 4)
    cache, options = sinkattn.SinkCache(model), {"max_new_tokens": 40, "do_sample": False}
    text = model.generate(prompt, cache=cache, prompt_lookup_num_tokens=6, **options)
    whole = torch.cat((text, random_ids(1, 9, seed=3)), dim=1)
    with pytest.raises(ValueError, match="input_ids: expected only new ids, because"):
        model.generate(whole, cache=cache, prompt_lookup_num_tokens=6, **options)
    assistant = build("llama", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 5
    with pytest.raises(ValueError, match="assistant_model: expected an empty cache"):
        model.generate(whole, cache=cache, assistant_model=assistant, **options)
    new = whole[:, cache.get_seq_length() :]
    got = model.generate(new, cache=cache, prompt_lookup_num_tokens=6, **options)
    assert torch.equal(got[:, -40:], greedy(model, whole, 40)[:, -40:])


def test_inputs_that_cannot_be_meant_are_refused():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=5)
    cache = sinkattn.SinkCache(model)
    model.generate(ids, cache=cache, max_new_tokens=30, do_sample=False)
    again = torch.ones(2, cache.get_seq_length() + 20, dtype=torch.int64)
    for wrong in (again[:, 1:], again[:1], torch.ones(2, 20, 1)):
        with pytest.raises(ValueError, match=r"attention_mask: expected \[2, 20\], or \[2, 69\] with the past"):
            model.generate(ids, cache=cache, attention_mask=wrong, max_new_tokens=5)
    positions = torch.arange(49, 69).expand(2, 20)
    with pytest.raises(ValueError, match=r"position_ids: expected consecutive positions from \[49, 49\] on"):
        model.generate(ids, cache=cache, attention_mask=again, position_ids=positions + 1, max_new_tokens=5)
    model.generate(ids, cache=cache, attention_mask=again, position_ids=positions, max_new_tokens=5)


def test_generated_padding_ids_are_no_padding_in_the_next_turn():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    cache = sinkattn.SinkCache(model)
    text = model.generate(ids, cache=cache, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    text[0, 25] = 0
    whole = torch.cat((text, torch.zeros_like(ids[:, :1]), ids), dim=1)
    got = model.generate(whole, cache=cache, max_new_tokens=20, do_sample=False)
    assert cache.seen.tolist() == [len(whole[0]) + 19]
    assert got.shape == (1, whole.shape[1] + 20)


@pytest.mark.parametrize("family", ["gemma3n_text-shared", "gemma4_text-shared"])
def test_prompts_of_models_that_share_keys(family):
    """In the layers that share keys, these models compute only the last query of a prompt."""
    model, ids = sinkattn.enable(families.build(family), S, W), random_ids(2, 40)
    assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), greedy(model, ids, 40))


@torch.no_grad()
def test_threads_are_not_disturbed_by_one_that_compiles():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 60)
    want, stop = model(ids).logits, threading.Event()

    def compile_repeatedly():
        while not stop.is_set():
            torch.compiler.reset()
            torch.compile(lambda x: (x * 2).relu() + x.sum(), backend="eager")(torch.ones(3))

    worker = threading.Thread(target=compile_repeatedly)
    worker.start()
    try:
        for _ in range(60):
            assert torch.equal(model(ids).logits, want)
    finally:
        stop.set()
        worker.join()


def test_too_little_headroom_is_named_before_anything_runs():
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=3), random_ids(1, 40)
    with pytest.raises(ValueError, match=r"headroom: expected 4 or more, .* got 3; call .* headroom=4"):
        model.generate(prompt, max_new_tokens=5, prompt_lookup_num_tokens=4)
    assistant = build("llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="headroom: expected 20 or more"):
        model.generate(prompt, max_new_tokens=5, assistant_model=assistant)
    with pytest.raises(ValueError, match="headroom: expected 6 or more"):
        model.generate(prompt, GenerationConfig(max_new_tokens=5, prompt_lookup_num_tokens=6))
    with pytest.raises(ValueError, match="assistant_early_exit: an enabled model runs all of its layers"):
        model.generate(prompt, max_new_tokens=5, assistant_early_exit=1)
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
    with pytest.raises(ValueError, match="expected a num_assistant_tokens_schedule of 'constant'"):
        model.generate(prompt, max_new_tokens=5, assistant_model=assistant)


def test_a_configuration_that_leaves_it_open_is_completed_by_the_models_own():
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=3), random_ids(1, 10).repeat(1, 4)
    model.generation_config.prompt_lookup_num_tokens = 6
    with pytest.raises(ValueError, match="headroom: expected 6 or more"):
        model.generate(prompt, GenerationConfig(max_new_tokens=50))
    assert model.generate(prompt, max_new_tokens=50, prompt_lookup_num_tokens=None).shape == (1, 90)


def test_an_assistant_that_streams_needs_headroom_of_its_own():
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=5), random_ids(1, 40)
    assistant = sinkattn.enable(build("llama", num_hidden_layers=1), S, W, headroom=4)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    with pytest.raises(ValueError, match=r"headroom: expected 5 or more, .* got 4; call .*assistant_model, .*=5"):
        model.generate(prompt, max_new_tokens=NEW, assistant_model=assistant, do_sample=False)


@pytest.mark.parametrize("implementation", ["static", "dynamic", "quantized", "offloaded_static"])
def test_the_kind_of_cache_that_a_checkpoint_prefers_gives_way(implementation):
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    model.generation_config.cache_implementation = implementation
    want = greedy(model, ids, NEW)
    given = GenerationConfig(max_new_tokens=NEW)
    for got in (
        model.generate(ids, max_new_tokens=NEW, do_sample=False),
        model.generate(ids, given),
        model.generate(ids, copy.deepcopy(model.generation_config), max_new_tokens=NEW, do_sample=False),
        model.generate(ids, max_new_tokens=NEW, do_sample=False, cache=sinkattn.SinkCache(model)),
    ):
        assert torch.equal(got, want)
    assert model.generation_config.cache_implementation == implementation
    given.cache_implementation = "offloaded"
    for options in ({"generation_config": given}, {"cache_implementation": "offloaded"}):
        with pytest.raises(ValueError, match=r"cache_implementation: .* from its SinkCache, got 'offloaded'"):
            model.generate(ids, **options)


def letters(longest: int, size: int) -> PreTrainedTokenizerFast:
    """Tokenizer of letters, and of pairs of letters if ``longest`` is 2; the rest of the vocabulary is not used."""
    single = ascii_lowercase[:16]
    pairs = list(product(single, single)) if longest == 2 else []
    vocabulary = ["?", *single, *map("".join, pairs)]
    vocabulary += [chr(0x4E00 + i) for i in range(size - len(vocabulary))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_assistants_with_another_tokenizer():
    """With greedy decoding they propose text, of any number of tokens; with sampling they propose tokens."""
    model, prompt = sinkattn.enable(build("llama"), S, W, headroom=5), random_ids(1, 40) % 16 + 1
    assistant = build("llama", num_hidden_layers=1, vocab_size=300)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    options = {
        "max_new_tokens": NEW,
        "assistant_model": assistant,
        "tokenizer": letters(1, 97),
        "assistant_tokenizer": letters(2, 300),
    }
    with pytest.raises(ValueError, match=r"assistant_tokenizer: without sampling, .* expected do_sample=True"):
        model.generate(prompt, **options)
    assistant.generation_config.num_assistant_tokens = 6
    with pytest.raises(ValueError, match="headroom: expected 6 or more"):
        model.generate(prompt, do_sample=True, **options)
    assistant.generation_config.num_assistant_tokens = 5
    assert model.generate(prompt, do_sample=True, **options).shape == (1, 40 + NEW)


class AlternateParity(LogitsProcessor):
    """Stands for a grammar: allows odd tokens after even ones, and even tokens after odd ones."""

    def __call__(self, input_ids, scores):
        token = torch.arange(scores.shape[1])
        return scores.masked_fill((token + input_ids[:, -1:]) % 2 == 0, -torch.inf)


@pytest.mark.parametrize(
    "processor", [AlternateParity(), RepetitionPenaltyLogitsProcessor(1.3)], ids=["grammar", "penalty"]
)
def test_logits_processors_equal_the_plain_loop(processor):
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 30)
    got = model.generate(ids, max_new_tokens=NEW, do_sample=False, logits_processor=LogitsProcessorList([processor]))
    want = ids
    for _ in range(NEW):
        want = torch.cat((want, processor(want, last_logits(model, want)).argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(got, want)


def test_several_sequences_per_prompt_equal_the_plain_loop():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 30)
    torch.manual_seed(5)
    got = model.generate(ids, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, top_k=0)
    torch.manual_seed(5)
    want = ids.repeat_interleave(3, dim=0)
    for _ in range(NEW):
        want = torch.cat((want, torch.multinomial(last_logits(model, want).softmax(dim=-1), 1)), dim=1)
    assert torch.equal(got, want)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch of rows ``[1, n]``, with padding on the left, on the right or within."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = row.shape[1]
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "within": torch.randperm(width)[:length].sort().values,
        }[side]
        ids[i, places], mask[i, places] = row[0], 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "within"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
def test_padding_leaves_every_row_as_it_is_alone(family, side):
    model = sinkattn.enable(build(family), S, W)
    rows = [random_ids(1, length, seed=length) for length in (3, 20, 150, 33)]
    ids, mask = padded(rows, side)
    cache, out = sinkattn.SinkCache(model), []
    for part in (slice(0, 60), slice(60, 61), slice(61, 150)):
        seen_mask = mask[:, : part.stop]
        out.append(model(ids[:, part], attention_mask=seen_mask, cache=cache).logits)
    for row, alone in enumerate(rows):
        got = torch.cat(out, dim=1)[row, mask[row].bool()]
        torch.testing.assert_close(got, model(alone).logits[0])
    assert cache.seen.tolist() == [3, 20, 150, 33]
    assert cache.get_seq_length() == 150


def test_generate_on_left_padded_rows_equals_each_alone():
    model = sinkattn.enable(build("llama"), S, W)
    rows = [random_ids(1, length, seed=length) for length in (3, 20, 50, 33)]
    ids, mask = padded(rows, "left")
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for row, alone in enumerate(rows):
        assert torch.equal(got[row, 50:], greedy(model, alone, NEW)[0, alone.shape[1] :])


@torch.no_grad()
def test_masks_that_contradict_the_stream_are_refused():
    model, ids = sinkattn.enable(build("llama"), S, W, headroom=4), random_ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :3] = 0
    cache = sinkattn.SinkCache(model)
    model(ids, attention_mask=mask, cache=cache)
    longer = torch.ones(2, 11, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask: expected 0 in row 1, column 0, as when that column was fed"):
        model(ids[:, :1], attention_mask=longer, cache=cache)
    longer[1, :3] = 0
    with pytest.raises(ValueError, match=r"position_ids: expected consecutive positions from \[10, 7\] on"):
        model(ids[:, :1], attention_mask=longer, position_ids=torch.tensor([[10], [10]]), cache=cache)
    model(ids[:, :1], attention_mask=longer, position_ids=torch.tensor([[10], [7]]), cache=cache)


@torch.no_grad()
def test_turns_with_nothing_but_the_new_ids():
    """Prompts shorter and longer than the stream so far; all ids of the stream work after them, too."""
    model = sinkattn.enable(build("llama"), S, W)
    cache, text = sinkattn.SinkCache(model), torch.zeros(1, 0, dtype=torch.int64)
    for turn, length in enumerate((3, 50, 10, 200)):
        new = random_ids(1, length, seed=turn)
        got = model.generate(new, cache=cache, max_new_tokens=30, do_sample=False)
        text = greedy(model, torch.cat((text, new), dim=1), 30)
        assert torch.equal(got, text[:, -length - 30 :])
        # The last token of a turn is not fed yet: it begins the next turn.
        model(got[:, -1:], cache=cache)
    whole = torch.cat((text, random_ids(1, 5, seed=9)), dim=1)
    got = model.generate(whole, cache=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(got, greedy(model, whole, 30))


@torch.no_grad()
def test_what_a_stream_began_with_is_what_counts():
    """After a prefix fed token by token, each with candidates rolled back; the new ids begin with the same token."""
    model = sinkattn.enable(build("llama"), S, W, headroom=4)
    first, new = random_ids(1, 20), random_ids(1, 40, seed=1)
    new[0, 0] = first[0, 0]
    whole = torch.cat((first, new), dim=1)
    want = greedy(model, whole, 30)
    for ids in (new, whole):
        cache = sinkattn.SinkCache(model)
        for i in range(20):
            model(torch.cat((first[:, i : i + 1], random_ids(1, 2, seed=i)), dim=1), cache=cache)
            cache.crop(-2)
        got = model.generate(ids, cache=cache, max_new_tokens=30, do_sample=False)
        assert torch.equal(got[:, -30:], want[:, -30:])
    # The ids of embeddings are unknown, so later ids are new.
    cache = sinkattn.SinkCache(model)
    model(inputs_embeds=model.get_input_embeddings()(first), cache=cache)
    got = model.generate(new, cache=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(got[:, -30:], want[:, -30:])


def test_turns_of_padded_rows():
    model = sinkattn.enable(build("llama"), S, W)
    rows = [random_ids(1, length, seed=length) for length in (3, 40)]
    ids, mask = padded(rows, "left")
    cache, new = sinkattn.SinkCache(model), random_ids(2, 7, seed=3)
    got = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=40, do_sample=False)
    again = model.generate(torch.cat((got[:, -1:], new), dim=1), cache=cache, max_new_tokens=40, do_sample=False)
    for row, alone in enumerate(rows):
        text = torch.cat((alone, got[row : row + 1, 40:], new[row : row + 1]), dim=1)
        assert torch.equal(again[row, 8:], greedy(model, text, 40)[0, -40:])


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "mask"), [(0, None), (5, None), (5, "new"), (5, "all")])
def test_the_decode_step_compiles_whole(prompt, mask):
    """With a new cache, too, whose memory is allocated in the graph."""
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(2, 200)
    want, cache = model(ids).logits, sinkattn.SinkCache(model)
    if prompt:
        model(ids[:, :prompt], cache=cache)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(token, cache, mask):
        return model(input_ids=token, cache=cache, attention_mask=mask).logits

    widths = [i + 1 if mask == "all" else 1 for i in range(200)]
    masks = [None if mask is None else torch.ones(2, width) for width in widths]
    got = [step(ids[:, i : i + 1], cache, masks[i]) for i in range(prompt, 200)]
    torch.testing.assert_close(torch.cat(got, dim=1), want[:, prompt:])
    assert len(graphs) <= 2  # the second one has the number of columns as a symbolic integer
    assert cache.get_seq_length() == 200


def test_generate_of_a_compiled_model():
    model, ids = sinkattn.enable(build("llama"), S, W), random_ids(1, 20)
    want = greedy(model, ids, NEW)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), want)


def test_pipeline_and_streamer_give_the_same_text():
    model, tokenizer = load(device="cpu")
    sinkattn.enable(model, S, W)
    options = {"max_new_tokens": NEW, "do_sample": False}
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generator("Once upon a time", return_full_text=False, **options)[0]["generated_text"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    worker = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **options})
    worker.start()
    assert "".join(streamer) == text
    worker.join()
    assert len(text) > NEW / 2


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_multi_token_prediction_equals_greedy(family, monkeypatch):
    """Greedy output does not depend on the draft's weights, which are random here."""
    modeling_layers = pytest.importorskip("transformers.modeling_layers")
    draft = getattr(modeling_layers, "MtpModel", None) or pytest.skip("this version of transformers has no MtpModel")

    def random_draft(cls, main_model, **options):
        model = cls(main_model, main_model.config.num_mtp_layers).to(torch.float32).eval()
        for parameter in model.layers.parameters():
            parameter.data.normal_(std=0.1)
        return model

    monkeypatch.setattr(draft, "from_pretrained", classmethod(random_draft))
    model, ids = families.build(family, num_mtp_layers=1), random_ids(1, 12)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    sinkattn.enable(model, S, W)
    with pytest.raises(ValueError, match="headroom: expected 1 or more, as assisted decoding rolls back so many"):
        model.generate(ids, use_mtp=True, **options)
    sinkattn.disable(model)
    sinkattn.enable(model, S, W, headroom=1)
    assert torch.equal(model.generate(ids, use_mtp=True, **options), model.generate(ids, **options))
