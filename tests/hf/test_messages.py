"""Eviction by whole messages: where windows begin, against the definition."""

import random

import pytest

from sinkattn.hf.pool.messages import Messages


def begin_by_definition(begins, ends, token, window):
    """The first message of which a token sees all, or its own one, of which it sees the last tokens."""
    begun = [begin for begin in begins if begin <= token]
    # What is fed together, and what there is room for, has one window.
    last = max(token, *(end - 1 for end in ends[: len(begun)]))
    return next((begin for begin in begun if begin > last - window), begun[-1])


@pytest.mark.parametrize("seed", range(40))
def test_windows_begin_with_messages(seed):
    rng = random.Random(seed)
    num_sinks, window, kept = rng.randint(0, 5), rng.randint(1, 9), 3
    messages, begins, ends, token = Messages(num_sinks, window, kept), [num_sinks], [num_sinks], num_sinks
    assert messages.run_length(0, num_sinks + 1) == num_sinks + 1  # sinks and what follows them
    for _ in range(30):
        fed, generated, following = rng.randint(1, 12), rng.randint(0, 12), rng.choice([0, 0, rng.randint(1, 12)])
        messages.begin(token, fed + following, token)
        if token == num_sinks:
            ends[0] = token + fed + following
        else:
            begins.append(token)
            ends.append(token + fed + following)
        end = token + fed + generated
        while token < end:
            count = messages.run_length(token, end - token)
            wanted = {begin_by_definition(begins, ends, each, window) for each in range(token, token + count)}
            # Those that evict nothing that the window would hold are the same.
            assert {0 if each == num_sinks else each for each in wanted} == {messages.window_begin(token)}
            if token + count < end:
                assert messages.window_begin(token + count) != messages.window_begin(token)
            token += count
    assert len(messages.begins) == len(messages.ends) <= window + kept + 2
    state = Messages(num_sinks, window, kept)
    state.restore(messages.begins, messages.ends)
    assert [state.window_begin(each) for each in range(token, token + 20)] == [
        messages.window_begin(each) for each in range(token, token + 20)
    ]


def test_what_is_fed_together_runs_together():
    """Whatever leaves the window meanwhile."""
    messages = Messages(2, 10, 0)
    messages.begin(2, 6, 2)
    messages.begin(8, 7, 8)
    assert messages.run_length(8, 7) == 7
    assert messages.window_begin(8) == 8  # with the first message, the last token would not fit
    assert [messages.window_begin(token) for token in (14, 15, 17, 18)] == [8, 8, 8, 8]


def test_what_a_message_makes_room_for_runs_with_it():
    """Be it a message of its own, or a part of this one."""
    for is_message in (False, True):
        messages = Messages(2, 10, 0)
        for begin in (2, 6):
            messages.begin(begin, 4, begin)
        messages.begin(10, 2 + 3, 10)
        assert messages.window_begin(10) == 6  # though with 2 tokens the first message would fit
        if is_message:
            messages.begin(12, 3, 10)
        assert messages.run_length(10, 5) == 5
        assert messages.run_length(10, 9) == 6  # then the second message leaves, too
        assert messages.window_begin(16) == 10


def test_no_token_sees_half_an_earlier_message():
    """Not even at the beginning of a message that is longer than the window, or with more to follow than fits."""
    for count, following in ((15, 0), (8, 4)):
        messages = Messages(2, 10, 0)
        messages.begin(2, 6, 2)
        messages.begin(8, count + following, 8)
        assert messages.run_length(8, 30) == 30
        assert {messages.window_begin(token) for token in range(8, 38)} == {8}


def test_a_rollback_forgets_messages():
    messages = Messages(2, 10, 5)
    messages.begin(2, 4, 2)
    messages.begin(6, 9, 6)
    messages.rollback(9)
    assert (messages.begins, messages.ends) == ([2, 6], [6, 9])
    messages.rollback(6)
    assert (messages.begins, messages.ends) == ([2], [6])
