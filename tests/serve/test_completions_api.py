"""``/v1/completions`` by OpenAI's own client."""

import openai
import pytest


@pytest.fixture
def complete(running):
    def complete(prompt, session_id=None, append=None, **options):
        extra = {name: x for name, x in (("session_id", session_id), ("append", append)) if x is not None}
        return running.client().completions.create(
            model="tiny", prompt=prompt, extra_body=extra, **{"max_tokens": 8, "temperature": 0, **options}
        )

    return complete


def ids_of(running, text):
    return running.server.tokenizer(text).input_ids


def test_a_completion_is_that_of_a_stream(running, complete):
    ids = ids_of(running, "import os\nimport sys\n")
    with running.server.pool.open(ids[:4]) as stream:
        stream.feed(ids[4:])
        expected = [*stream.generate(8)]
    completion = complete("import os\nimport sys\n", logprobs=2)
    assert completion.choices[0].text == running.server.tokenizer.decode(expected)
    assert len(completion.choices[0].logprobs.tokens) == 8
    assert completion.usage.prompt_tokens == len(ids)
    events = [*complete("import os\nimport sys\n", stream=True)]
    assert "".join(event.choices[0].text for event in events) == completion.choices[0].text


def test_ids_continue_their_stream_far_beyond_the_window(running, complete):
    ids = ids_of(running, "def f(x):\n    return x\n" * 60)
    assert len(ids) > 400
    first = complete(ids)
    assert first.usage.prompt_tokens == 4 + 200  # sinks and window
    again = complete([*ids, 5])  # what was generated is not what follows
    assert again.session_id != first.session_id
    [own] = [x for x in running.server.sessions.of("") if x.id == first.session_id]
    seen = own.content.stream.in_sight
    text = [*ids[: len(ids) - len(seen) + 4 + 8], *seen[4:]]
    assert len(text) == len(own.content.stream)
    more = complete([*text, 5, 6, 7])
    assert more.session_id == first.session_id
    assert more.usage.prompt_tokens_details.cached_tokens == 204


def test_appending(running, complete):
    first = complete("One", session_id="text")
    second = complete(" two", session_id="text", append=True)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="append"):
        running.chat("Hello", session_id="text", append=True)


def test_errors(running):
    for changed in ({"prompt": ""}, {"prompt": [10**6]}, {"echo": True}, {"best_of": 2}, {"max_tokens": 0}, {"x": 1}):
        response = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **changed})
        assert response.status_code == 400, changed
    assert running.server.num_at_work == 0
