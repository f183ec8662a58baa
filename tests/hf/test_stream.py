"""`stream_tokens` and `stream_text`: the tokens of `generate`, in memory that does not grow; loading models."""

import gc
import tracemalloc
from itertools import islice

import pytest
import torch
from hf_models import build, random_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sinkattn
from sinkattn.hf.load import DEMO_MODEL, load
from sinkattn.hf.model_config import default_window
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.stream import MAX_HELD, stream_text, stream_tokens

LAYOUT = {"num_sinks": 2, "window": 9}


@pytest.fixture
def model():
    return sinkattn.enable(build("llama"), **LAYOUT)


def generated(model, ids, **options):
    out = model.generate(ids, max_new_tokens=60, **options)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt_tokens", [1, 5, 30])
def test_greedy_is_generate_across_ring_wraps(model, prompt_tokens):
    ids = random_ids(1, prompt_tokens)
    assert list(stream_tokens(model, ids, max_new_tokens=60)) == generated(model, ids, do_sample=False)


def test_seed_repeats_and_leaves_torch_alone(model):
    def draw(seed):
        return list(stream_tokens(model, [5, 6], max_new_tokens=30, temperature=1.0, seed=seed))

    before = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_extreme_sampling_is_greedy(model, options):
    sampled = stream_tokens(model, [5, 6], max_new_tokens=20, **{"temperature": 1.0, "seed": 0, **options})
    assert list(sampled) == list(stream_tokens(model, [5, 6], max_new_tokens=20))


@pytest.mark.parametrize("prefill_chunk", [1, 4, 11, 100])
def test_chunks_of_the_prompt_do_not_matter(model, prefill_chunk):
    ids = random_ids(1, 40)[0]
    expected = list(stream_tokens(model, ids, max_new_tokens=20))
    assert list(stream_tokens(model, ids.tolist(), max_new_tokens=20, prefill_chunk=prefill_chunk)) == expected


def test_a_stream_goes_on_with_its_cache(model):
    whole = list(stream_tokens(model, [5, 6], max_new_tokens=40))
    cache = sinkattn.SinkCache(model)
    first = list(stream_tokens(model, [5, 6], cache, max_new_tokens=15))
    assert cache.get_seq_length() == 2 + 14, "the last token has not been fed"
    assert first + list(stream_tokens(model, first[-1:], cache, max_new_tokens=25)) == whole


def test_ends(model):
    whole = list(stream_tokens(model, [5, 6], max_new_tokens=40))
    assert list(stream_tokens(model, [5, 6], max_new_tokens=0)) == []
    stop = whole[7]
    assert list(stream_tokens(model, [5, 6], stop_ids=[stop])) == whole[: whole.index(stop)]
    assert list(islice(stream_tokens(model, [5, 6]), 40)) == whole, "no end of its own"


@pytest.mark.parametrize("leak", [False, True])
def test_memory_stays_the_same(leak):
    def tensor_elements():
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)

    def container_bytes():
        # What grows with the tokens has a container of at least eight bytes for each. Small blocks are left out,
        # because Python's and torch's free lists keep some hundreds of them, now more and now fewer.
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().traces if trace.size > 512)

    gc.collect()
    gc.freeze()  # what other tests have left: looking through it would take most of the time
    try:
        model = sinkattn.enable(build("llama"), **LAYOUT)
        cache = sinkattn.SinkCache(model)
        tokens = stream_tokens(model, random_ids(1, 300), cache, temperature=1.0, repetition_penalty=1.2, seed=0)
        tracemalloc.start()  # it slows down all that runs
        kept = []
        for _ in islice(tokens, 200):
            kept.append(0)
        pointers = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        elements = tensor_elements()
        for _ in range(4):  # something of Python's own may grow in one of them, but not in each
            before = container_bytes()
            for _ in islice(tokens, 800):
                if leak:
                    kept.append(0)
            grows = container_bytes() - before > 800 * 4
            if not grows:
                break
        assert grows == leak, "keeping one number per token would take eight bytes each"
        assert tensor_elements() == elements
        assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == pointers
    finally:
        tracemalloc.stop()
        gc.unfreeze()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"prompt_ids: expected .* at least one, got \[1, 0\]"),
        ([[1, 2], [3, 4]], {}, r"prompt_ids: .* got \[2, 2\]"),
        ([1], {"temperature": -1}, "temperature: expected 0 or more, got -1"),
        ([1], {"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ([1], {"top_p": 0}, "top_p: expected more than 0 and at most 1, got 0"),
        ([1], {"min_p": 1.5}, "min_p: expected 0 to 1, got 1.5"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty: expected more than 0, got 0"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk: expected 1 or more, got 0"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
    ],
)
def test_arguments_are_refused_at_the_call(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        stream_tokens(model, prompt, **options)


def test_a_model_that_is_not_enabled_is_refused():
    with pytest.raises(ValueError, match="is not enabled"):
        stream_tokens(build("llama"), [1])


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_text_comes_as_soon_as_a_character_is_complete(byte_tokenizer):
    text = "aé\U0001f600 ß\n"
    ids = byte_tokenizer(text).input_ids
    pieces = list(stream_text(byte_tokenizer, iter(ids)))
    assert pieces == ["a", "", "é", "", "", "", "\U0001f600", " ", "", "ß", "\n"]


def test_an_unfinished_character_is_shown_at_the_end(byte_tokenizer):
    ids = byte_tokenizer("aé").input_ids[:-1]
    assert "".join(stream_text(byte_tokenizer, ids)) == "a\ufffd"


def test_bytes_that_are_no_text_are_not_held_back_for_ever(byte_tokenizer):
    broken = byte_tokenizer("é").input_ids[:1] * 1000
    longest = held = 0
    text = ""
    for piece in stream_text(byte_tokenizer, broken):
        held = 0 if piece else held + 1
        longest = max(longest, held)
        text += piece
    assert text == "\ufffd" * 1000
    assert longest <= MAX_HELD
    after = list(stream_text(byte_tokenizer, [*broken, *byte_tokenizer("fine").input_ids]))
    assert "".join(after).endswith("fine")


def test_spaces_at_the_seam():
    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(stream_text(tokenizer, [1, 0])) == "two one"
    assert "".join(stream_text(tokenizer, [1, 0], prompt_ids=[0])) == " two one"


def test_a_tokenizer_without_backend_is_refused():
    with pytest.raises(ValueError, match="tokenizer: expected one with a tokenizers backend, got object"):
        list(stream_text(object(), [1]))


def test_the_shipped_model_loads_and_streams_its_tokens_back():
    model, tokenizer = load(device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    text = "def f(x):\n    return x  # é\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert "".join(stream_text(tokenizer, ids[1:])) == text
    sinkattn.enable(model)
    assert require_patch(model).layout.window == default_window(model, 4) == 252
    tokens = list(stream_tokens(model, ids, max_new_tokens=5))
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_default_window():
    assert default_window(build("llama"), 4) == 508
    assert default_window(build("mistral"), 4) == 60
    assert default_window(build("llama"), 4, max_window=100) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "/no/such/folder"}, "model: cannot load /no/such/folder: there is no such file or folder"),
        ({"name": "two spaces in it"}, "model: cannot load two spaces in it: "),
        ({"device": "abacus"}, "device: 'abacus' is no device of torch"),
        ({"device": "cuda:99"}, "device: no such device here: cuda:99"),
    ],
)
def test_what_cannot_be_loaded(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_bytes((DEMO_MODEL / "config.json").read_bytes())
    with pytest.raises(ValueError, match="model: cannot load") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
