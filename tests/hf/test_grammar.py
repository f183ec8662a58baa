"""Text by a JSON schema or a grammar: always valid, and everything that is valid can come."""

import json
import re
import sys

import pytest
import torch

import sinkattn
from sinkattn import SamplingParams
from sinkattn.hf.load import load
from sinkattn.hf.sampling.batch_sampler import BatchSampler
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.stream import stream_tokens

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ring", "sink"]}, "slots": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "slots"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(device="cpu")
    return sinkattn.enable(model, 4, 60), tokenizer


def stream_of(loaded, grammar, end_ids=(), **params):
    model, tokenizer = loaded
    params = SamplingParams(grammar=grammar, **params)
    return StreamSampler(params, vocabulary=model.config.vocab_size, end_ids=end_ids, tokenizer=tokenizer)


@pytest.mark.parametrize("as_text", [False, True])
def test_a_stream_says_one_json_object(loaded, as_text):
    model, tokenizer = loaded
    said = []
    for seed in range(3):
        params = SamplingParams(temperature=1.5, seed=seed, grammar=json.dumps(SCHEMA) if as_text else SCHEMA)
        ids = list(stream_tokens(model, tokenizer("x = ").input_ids, sampling=params, tokenizer=tokenizer))
        said.append(json.loads(tokenizer.decode(ids)))
        assert set(said[-1]) == {"name", "slots"}
        assert said[-1]["name"] in ("ring", "sink")
        assert said[-1]["slots"] in range(100)
    assert said[0] != said[1] or said[1] != said[2]


def test_streams_of_a_batch_follow_their_own_grammars(loaded):
    """One by a schema, one by a regular expression, one by none, on logits that know nothing of it."""
    model, tokenizer = loaded
    streams = [
        stream_of(loaded, SCHEMA, temperature=1.0, seed=0),
        stream_of(loaded, "start: /(ab){3,5}c/", temperature=1.0, seed=1),
        StreamSampler(SamplingParams(), vocabulary=model.config.vocab_size),
    ]
    sampler, generator = BatchSampler(), torch.Generator().manual_seed(0)
    texts = [[] for _ in streams]
    fork = None
    for step in range(60):
        logits = torch.randn(len(streams), model.config.vocab_size, generator=generator)
        if step == 2:
            # A fork and a restored stream say the same, and leave the first one alone.
            fork, restored = streams[1].fork(), stream_of(loaded, "start: /(ab){3,5}c/", temperature=1.0)
            restored.restore(streams[1].state())
            [one], [other] = (BatchSampler().choose(logits[1:2], [each]).read() for each in (fork, restored))
            assert fork.state() == restored.state()
        tokens = sampler.choose(logits, streams).read()
        if step == 2:
            assert tokens[1] == one == other
        assert tokens[2] == int(logits[2].argmax())
        for text, token, stream in zip(texts, tokens, streams, strict=True):
            text.append(token)
            if stream.grammar is not None and stream.grammar.is_complete:
                text.append(-1)
    said = [json.loads(each) for each in split(tokenizer, texts[0])]
    assert all(each["slots"] in range(100) for each in said)
    said = split(tokenizer, texts[1])
    assert len(said) > 1, "after a text the next one begins"
    assert all(re.fullmatch("(ab){3,5}c", each) for each in said)


def split(tokenizer, tokens):
    """The complete texts that -1 ends."""
    texts = [[]]
    for token in tokens:
        if token == -1:
            texts.append([])
        else:
            texts[-1].append(token)
    return [tokenizer.decode(each) for each in texts[:-1]]


def test_an_end_token_comes_where_a_text_may_end(loaded):
    model, tokenizer = loaded
    end, [a, b] = (
        7,
        tokenizer("a", add_special_tokens=False).input_ids + tokenizer("b", add_special_tokens=False).input_ids,
    )
    stream, sampler = stream_of(loaded, "start: /a+b*/", end_ids=[end]), BatchSampler()
    logits = torch.zeros(1, model.config.vocab_size)
    for wanted, expected in ((end, a), (b, b), (end, end)):
        logits.zero_()
        logits[0, a], logits[0, wanted] = 1.0, 2.0
        assert not stream.grammar.is_complete
        assert sampler.choose(logits, [stream]).read() == [expected]
    assert stream.grammar.is_complete
    # `stream_tokens` ends there, and does not yield the end token.
    forced = SamplingParams(grammar="start: /a+/", logit_bias={end: 100.0, a: 90.0})
    assert list(stream_tokens(model, [5], sampling=forced, stop_ids=[end], tokenizer=tokenizer)) == [a]
    # Without an end token none is forced, and the text goes on.
    assert list(stream_tokens(model, [5], sampling=forced, tokenizer=tokenizer, max_new_tokens=5)) == [a] * 5


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"type": "objekt"}, "grammar: Invalid type: objekt"),
        ("start: /a(/", "grammar: .*invalid regex"),
        ("[1]", r"grammar: expected an object as JSON schema, got \[1\]"),
    ],
)
def test_what_is_no_grammar(loaded, grammar, message):
    with pytest.raises(ValueError, match=message):
        stream_of(loaded, grammar)


def test_what_a_grammar_needs(loaded, monkeypatch):
    model, _ = loaded
    with pytest.raises(
        ValueError, match="tokenizer: expected one with a tokenizers backend for a grammar, got NoneType"
    ):
        stream_tokens(model, [5], sampling=SamplingParams(grammar=SCHEMA))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"grammar: needs llguidance, pip install 'sinkattn\[grammar\]'"):
        stream_of(loaded, SCHEMA)


def test_after_a_rollback_or_reset_of_a_stream_the_text_begins_anew(loaded):
    model, tokenizer = loaded
    pool = sinkattn.StreamPool(model, 1, tokenizer=tokenizer)
    stream = pool.open(sampling=SamplingParams(grammar=SCHEMA, temperature=1.0, seed=2))
    for restart in (lambda: stream.rollback(3), stream.reset):
        stream.feed("x = ")
        assert len(list(stream.generate(3))) == 3
        restart()
        stream.feed("y = ")
        assert set(json.loads("".join(stream.generate_text()))) == {"name", "slots"}
