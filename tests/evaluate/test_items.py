"""Questions in a stream: what is asked, how far back the answer stands, and files that cannot be meant."""

import re
from itertools import islice

import numpy as np
import pytest

from sinkattn.evaluate.items import LineSource, code_items, line_items, read_items, read_questions


def lines_of(item):
    return re.findall(r"^line (\w+) (\d+)$", item.context, re.MULTILINE)


@pytest.mark.parametrize(("distance", "every"), [(1, 10), (7, 3), (25, 10), (3, 1)])
def test_every_question_is_for_the_line_so_many_back(distance, every):
    seen, first = [], True
    for item in islice(line_items(distance, every, seed=3), 40):
        new = lines_of(item)
        seen += new
        name, value = seen[-distance]
        assert item.context.endswith(f"Recall line {name} ")
        assert (item.answer, item.closing) == (value, "\n")
        assert [line for line, _ in seen[-distance:]].count(name) == 1
        assert len(new) == every or first
        first = False


def test_lines_are_drawn_anew_for_each_seed_and_none_is_asked_for_twice():
    streams = [list(islice(line_items(5, 10, seed), 30)) for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]
    asked = [item.context.splitlines()[-1] + item.answer for item in streams[0]]
    assert len(set(asked)) == 30


def test_a_name_rests_before_it_comes_again():
    source = LineSource(np.random.default_rng(0), max_distance=150)
    names = [source.draw()[0] for _ in range(3000)]
    last = {}
    for place, name in enumerate(names):
        assert place - last.get(name, -1000) > 300
        last[name] = place
    assert len(set(names)) == 600


@pytest.mark.parametrize(
    ("distance", "every", "message"), [(0, 1, "distance"), (1, 0, "every"), (1226, 1, "1225 lines")]
)
def test_lines_that_cannot_be_asked_for_are_refused(distance, every, message):
    with pytest.raises(ValueError, match=message):
        line_items(distance, every)


def test_code_is_asked_for_its_last_word():
    text = (
        "import os\n\nx = 1\nif x:\n    print(x)\n    y = 2\n    return value\na = b\n"
        + "z = 1\n" * 4
        + "call(self):\n"
    )
    first, second = code_items(iter([text]))
    assert first.context == "import os\nx = 1\nif x:\n    print(x)\n    y = 2\n    return "
    assert (first.answer, first.closing) == ("value", "\n\n")
    assert (first.question.partition("\n\n")[2], first.reply) == (first.context, first.answer)
    assert second.context.endswith("z = 1\ncall(")
    assert (second.answer, second.closing) == ("self", "):\n\n")


def test_pairs_are_read_from_a_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"question": " Two and two? ", "answer": "four", "more": 1}\n\n{"question": "Ü?", "answer": "ü"}\n'
    )
    first, second = read_items(file)
    file.write_text('\ufeff{"question": "a\u2028b", "answer": "c"}\r\n')
    assert [item.answer for item in read_items(file)] == ["c"]
    assert first.context + first.answer + first.closing == "Question: Two and two?\nAnswer: four\n\n"
    assert second.answer == "ü"
    assert (first.question, first.reply) == ("Two and two?", "four")


def test_questions_of_a_chat_need_no_answers(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": " How are you? "}\n{"question": "Why?", "answer": "So."}\n')
    assert read_questions(file) == ["How are you?", "Why?"]
    file.write_text('{"answer": "So."}\n')
    with pytest.raises(ValueError, match=r'questions: expected \{"question": "..."\} in line 1'):
        read_questions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b'{"question": "a", "answer": "b"}\nnonsense\n', "in line 2 of .*, got 'nonsense'"),
        (b'{"question": "a"}\n', "expected .*answer.* in line 1"),
        (b'{"question": "a", "answer": " "}\n', "in line 1"),
        (b'{"question": "a", "answer": 3}\n', "in line 1"),
        (b"[1]\n", "in line 1"),
        (b'{"question": "a", "answer": "b"}\n{"answer": "b"}', "in line 2"),
        (b"\xff\xfe", "cannot read .*: it is not UTF-8 text"),
    ],
)
def test_files_without_pairs_are_refused(content, message, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_items(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"questions: cannot read .*none.jsonl: No such file or directory"):
        read_items(tmp_path / "none.jsonl")
