"""`TokenizeStream`: however a text is cut, its ids are those of the whole, at every moment."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sinkattn.hf import tokenize_stream
from sinkattn.hf.tokenize_stream import TokenizeStream, text_ids

WORDS = ["a", "def", "'", "'s", " ", "    ", "\n", "\n\n", "\r\n", "\t", "):", "é", "日本", "1", "234", "<s>", "🎈"]
# That of Llama 3 and others, with which line breaks belong to what is before them.
CLASSES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "".join(f"def f{i}(x):\n    return x + {i} * y\n\n\nclass A{i}:\n\n    pass  # it's\n" for i in range(40))


def trained(backend):
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    """Byte level with two ways of cutting words; and, as Llama 2, words that begin with a mark, also at the start."""
    classes = Tokenizer(models.BPE())
    classes.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLASSES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    marked = Tokenizer(models.BPE(unk_token=None))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return {"gpt2": tokenizer, "llama3": trained(classes), "llama2": trained(marked)}


def pieces(text, sizes):
    while text:
        size = sizes.pop() if sizes else len(text)
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_are_those_of_the_whole_text(tokenizers, name, data):
    tokenizer, stream = tokenizers[name], TokenizeStream(tokenizers[name])
    words = data.draw(st.lists(st.sampled_from(WORDS), max_size=60))
    whole, ids = "".join(words), []
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=60))
    read = ""
    for piece in pieces(whole, sizes):
        read += piece
        ids += stream.append(piece)
        assert ids + stream.open_ids() == text_ids(tokenizer, read)
        assert ids + stream.open_ids("# ?") == text_ids(tokenizer, read + "# ?")
    assert ids + stream.finish() == text_ids(tokenizer, whole)
    assert stream.open_ids() == []


def test_cutting_at_lines_gives_other_ids(tokenizer):
    """So the tests above can fail."""
    lines = TEXT.splitlines(keepends=True)
    assert [token for line in lines for token in text_ids(tokenizer, line)] != text_ids(tokenizer, TEXT)


def test_most_ids_are_final_at_once(tokenizer):
    stream = TokenizeStream(tokenizer)
    for i in range(0, len(TEXT), 7):
        stream.append(TEXT[i : i + 7])
        assert len(stream.open_ids()) < 20


def test_a_text_without_white_space_is_not_kept(tokenizer):
    stream = TokenizeStream(tokenizer)
    final = sum(len(stream.append("x" * 100)) for _ in range(100))
    assert 0 < len(stream.open_ids()) <= tokenize_stream.MAX_OPEN
    assert final + len(stream.open_ids()) <= len(text_ids(tokenizer, "x" * 10_000)) + 10


def test_what_follows_the_end_is_another_text(tokenizer):
    stream = TokenizeStream(tokenizer)
    ids = stream.append("x = 1\ny = some more words\n") + stream.finish()
    assert ids == text_ids(tokenizer, "x = 1\ny = some more words\n")
    assert stream.append("return") + stream.finish() == text_ids(tokenizer, "return")
