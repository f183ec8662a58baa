"""Which requests continue a stream of a chat: those after which the model sees what it would see in a new one."""

import asyncio

import pytest

from sinkattn.serve.conversation import Message


@pytest.fixture(scope="module")
def server(make_server):
    return make_server(max_streams=4, max_parked=20)


LONG = "word " * 100  # does not fit into the window beside other messages


def turns(*texts):
    return [Message(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]


def chat(server, messages, reply="Yes"):
    """A conversation of these messages and a reply, as after a request."""
    conversation = asyncio.run(server.chat_opener(None)).open(server.pool, messages)
    conversation.begin_reply()
    conversation.stream.feed(conversation.encoder.reply(reply), begins_message=False, wait=False)
    conversation.end_reply(reply)
    return conversation


def many(count):
    return turns(*(f"message {index} of a chat" for index in range(count)))


def test_a_stream_that_began_with_the_end_of_a_long_chat_is_continued(server):
    messages = many(101)
    conversation = chat(server, messages)
    more = [*messages, Message("assistant", "Yes"), Message("user", "And?")]
    assert conversation.num_known(more) == 102
    assert conversation.num_known(more[60:]) == 42
    assert conversation.num_known(more[100:]) is None
    rewound = [*messages, Message("assistant", "Yes, "), Message("user", "And?")]
    assert conversation.num_known(rewound) is None
    assert conversation.rewind([*messages[:-1], Message("user", "Another one")]) == 100


def test_a_chat_that_ends_alike_is_another_one(server):
    """Of the stream little is in sight, as the message before is long; a new stream would see the other chat's."""
    conversation = chat(server, turns(LONG, "Yes", "Hello"))
    assert len(conversation.in_sight()) < 5
    ends = [Message("assistant", "Yes"), Message("user", "And?")]
    assert conversation.num_known([*turns(LONG, "Yes", "Hello"), *ends]) == 4
    assert conversation.num_known([*turns("A short one", "No", "Hello"), *ends]) is None


def test_spaces_matter_in_questions_but_not_around_replies(server):
    conversation = chat(server, turns("Hello"), " Yes\n")
    assert conversation.num_known(turns("Hello", "Yes", "And?")) == 2
    assert conversation.num_known(turns("Hello ", "Yes", "And?")) is None


def test_two_messages_of_one_role_are_no_turns(server):
    conversation = chat(server, turns("Hello"))
    with pytest.raises(ValueError, match="in turns"):
        conversation.add([Message("assistant", "Hi"), Message("user", "And?")])


def test_a_chat_may_begin_with_a_reply_that_does_not_fit(server):
    for count in (1, 2):
        messages = [*turns(*["Hello", LONG] * count)[1:], Message("user", "And?")]
        assert [part["role"] for part in chat(server, messages).in_sight()] == ["system", "user", "assistant"]


def test_an_old_message_that_is_too_long_is_forgotten(server):
    conversation = chat(server, turns(LONG, "No", "Hello"))
    assert [part["role"] for part in conversation.in_sight()][-2:] == ["user", "assistant"]
    with pytest.raises(ValueError, match="as a whole"):
        chat(server, turns("Hello", "No", LONG))
