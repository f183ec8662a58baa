"""Streams of several texts: what is held out is not streamed, and a text goes on where it was left."""

import sys
from itertools import islice

import pytest
from test_text import ByteTokenizer, NoStart

from sinkattn.evaluate import sections
from sinkattn.evaluate.sections import MODULES, PROSE, Sections, drifting_streams, largest_folders
from sinkattn.evaluate.text import StandardLibrary, TextError, TextFile, TokenStream, is_held_out


def streams(tmp_path, tokenizer=None, **texts):
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: TokenStream(TextFile(tmp_path / name), tokenizer or ByteTokenizer()) for name in texts}


def as_text(ids):
    return "".join("^" if token == 0 else chr(token - 1) for token in ids)


def test_sections_take_turns_without_what_is_held_out(tmp_path):
    stream = Sections(streams(tmp_path, one="abcdefghijkl", two="ABCDEFGHIJKL"), ["one", "two", "one"], 4)
    assert {name: as_text(ids) for name, ids in stream.held_out.items()} == {"one": "^abc", "two": "^ABC"}
    assert as_text(islice(stream.read(3), 9)) == "^deDEFfgh"
    assert stream.restarts == 0


def test_texts_that_are_too_short_are_started_over(tmp_path):
    stream = Sections(streams(tmp_path, one="abcdef", two="ABCDEFGHI"), ["one", "two"], 3)
    assert as_text(islice(stream.read(3), 12)) == "^cdCDEefaFGH"
    assert stream.restarts == 1


def test_without_a_start_token_or_a_text_held_out(tmp_path):
    stream = Sections(streams(tmp_path, NoStart(), one="abcdef"), ["one"], 0)
    assert stream.held_out == {}
    assert as_text(islice(stream.read(4), 5)) == "abcde"
    stream = Sections(streams(tmp_path, NoStart(), one="abcdef"), ["one"], 2)
    assert as_text(stream.held_out["one"]) == "ab"
    assert as_text(islice(stream.read(4), 5)) == "cdefa"


def test_of_several_files_some_are_held_out_whole(tmp_path, monkeypatch):
    names = [name for name in (f"m{i}.py" for i in range(1000)) if is_held_out(name)][:17]
    for name in names:
        (tmp_path / name).write_text(f"{name}\n" * 100)
    library = StandardLibrary(tmp_path)
    kept, others = library.names[::8], [name for i, name in enumerate(library.names) if i % 8]
    (tmp_path / kept[1]).write_text("")
    monkeypatch.setattr(sections, "MIN_PART", 10)
    stream = Sections({"files": TokenStream(library, ByteTokenizer())}, ["files"], 61)
    assert (
        as_text(stream.held_out["files"])
        == "^" + "".join(f"{name}\n" * 100 for name in (kept[0],))[:20] + (f"{kept[2]}\n" * 100)[:20]
    )
    streamed = "".join(f"{name}\n" * 100 for name in others)
    assert as_text(islice(stream.read(50_000), len(streamed) + 1)) == "^" + streamed
    assert stream.restarts == 0


def test_folders_with_most_held_out_text(tmp_path):
    def write(folder, size):
        names = (f"{folder}m{i}.py" for i in range(1000))
        path = tmp_path / next(name for name in names if is_held_out(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#" * size)

    for folder, size in (("a/", 10), ("b/x/", 40), ("c/", 20)):
        write(folder, size)
    assert largest_folders(StandardLibrary(tmp_path)) == ["b", "c", "a"]
    write("", 30)
    assert largest_folders(StandardLibrary(tmp_path)) == ["b", MODULES, "c"]


def test_a_library_with_few_folders_is_refused(tmp_path):
    path = tmp_path / next(f"m{i}.py" for i in range(1000) if is_held_out(f"m{i}.py"))
    path.write_text("#")
    with pytest.raises(TextError, match="expected a standard library of 3 folders or more, got 1"):
        largest_folders(StandardLibrary(tmp_path))


def test_the_text_that_drifts():
    found, order = drifting_streams(ByteTokenizer(), True)
    folders = largest_folders(StandardLibrary())
    assert order == [*folders, PROSE, folders[0]]
    assert list(found) == order[:-1]
    assert (len(found), len(order)) == (sections.NUM_TEXTS, sections.NUM_SECTIONS)
    beginnings = {name: as_text(islice(stream, 2000)) for name, stream in found.items()}
    assert len(set(beginnings.values())) == len(found)
    words = beginnings[PROSE].lower().split()
    assert sum(words.count(word) for word in ("the", "a", "is", "of")) > len(words) / 20
    library = StandardLibrary()
    for name in folders:
        names = found[name].text.names
        assert names
        assert set(names) <= set(library.names)
        assert {each.partition("/")[0] if "/" in each else MODULES for each in names} == {name}


def test_a_python_without_prose_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match=r"without the topics of help\(\); give --text FILE"):
        drifting_streams(ByteTokenizer(), True)
