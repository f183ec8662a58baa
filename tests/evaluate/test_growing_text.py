"""Files that are followed, and pipes: what is read, when, and how much at once."""

import os
import threading
from pathlib import Path

import pytest

from sinkattn.evaluate import growing_text
from sinkattn.evaluate.growing_text import PIECE_BYTES, GrowingFile, OpenPipe, open_growing
from sinkattn.evaluate.text import TextError

LOG = Path("app.log")


class NothingMoreHappens(Exception):
    pass


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def follow(monkeypatch):
    """Follow the log while things happen to it, one whenever there is nothing to read; returns what was read."""

    def run(*happens):
        rest = iter(happens)

        def sleep(seconds):
            happening = next(rest, None)
            if happening is None:
                raise NothingMoreHappens
            happening()

        monkeypatch.setattr(growing_text.time, "sleep", sleep)
        read = []
        with pytest.raises(NothingMoreHappens):
            read.extend(GrowingFile(LOG).pieces())
        return read

    # `extend` keeps what came before an error.
    return run


def write(data, mode="ab"):
    def happens():
        with LOG.open(mode) as file:
            file.write(data)

    return happens


def rotate(data=b""):
    def happens():
        LOG.rename("app.log.1")
        LOG.write_bytes(data)

    return happens


def write_old(data):
    def happens():
        with Path("app.log.1").open("ab") as file:
            file.write(data)

    return happens


def quietly():
    pass


def test_a_file_that_grows(follow):
    LOG.write_bytes(b"one\nt")
    assert follow(write(b"wo\n"), quietly, write(b"three")) == ["one\nt", "wo\n", "three"]


def test_a_file_that_does_not_exist_yet(follow):
    assert follow(quietly, write(b"one\n"), write(b"two\n")) == ["one\n", "two\n"]


def test_a_file_that_is_cut_begins_again_on_a_new_line(follow):
    LOG.write_bytes(b"one\ntwo")
    assert follow(write(b"1\n", "wb"), write(b"2\n")) == ["one\ntwo", "\n", "1\n", "2\n"]
    LOG.write_bytes(b"one\n")
    assert follow(write(b"", "wb"), write(b"1\n")) == ["one\n", "1\n"]


def test_a_file_that_is_replaced_is_read_to_its_end(follow):
    LOG.write_bytes(b"one\n")
    happens = (rotate(), write_old(b"two\n"), write(b"1\n"), write(b"2\n"))
    assert follow(*happens) == ["one\n", "two\n", "1\n", "2\n"]
    Path("app.log.1").unlink()
    LOG.write_bytes(b"one")

    def all_at_once():
        write(b" and more")()
        rotate(b"1\n")()

    assert follow(all_at_once) == ["one", " and more", "\n", "1\n"]


def test_a_file_that_is_gone_may_come_back(follow):
    LOG.write_bytes(b"one\n")
    assert follow(LOG.unlink, quietly, write(b"1\n")) == ["one\n", "1\n"]


def test_a_character_may_come_in_pieces(follow):
    balloon = "🎈".encode()
    happens = [write(balloon[i : i + 1]) for i in range(4)]
    assert follow(*happens, write(b"!\n")) == ["🎈", "!\n"]
    LOG.write_bytes(balloon[:2])
    assert follow(write(b"x\n", "wb")) != ["x\n"]  # as long, so it is not noticed
    LOG.write_bytes(balloon[:3])
    assert follow(write(b"x\n", "wb")) == ["\N{REPLACEMENT CHARACTER}\n", "x\n"]
    LOG.write_bytes(b"caf\xe9 au lait\n")
    assert follow() == ["caf\N{REPLACEMENT CHARACTER} au lait\n"]


def test_how_far_behind(follow):
    LOG.write_bytes(b"x" * 5000)
    file = GrowingFile(LOG)
    assert file.behind is None
    pieces = file.pieces()
    assert len(next(pieces)) == PIECE_BYTES
    assert file.behind == 5000 - PIECE_BYTES
    write(b"y" * 100)()
    assert file.behind == 5100 - PIECE_BYTES


def test_what_cannot_be_read_is_refused():
    Path("folder").mkdir()
    with pytest.raises(TextError, match="follow: cannot read folder: Is a directory"):
        open_growing(Path("folder"))
    assert isinstance(open_growing(Path("nothing")), GrowingFile)


def test_a_pipe_with_a_name_ends():
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text("one\ntwo"))
    writer.start()
    pipe = open_growing(Path("pipe"))
    writer.join()
    assert (list(pipe.pieces()), pipe.behind) == (["one\ntwo"], None)


@pytest.fixture
def pipe():
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb", buffering=0) as writer:
        yield OpenPipe(reader, "stdin").pieces(), writer


def test_what_comes_slowly_is_read_at_once(pipe):
    pieces, writer = pipe
    for word in ("one", " two\n", "é"):
        writer.write(word.encode())
        assert next(pieces) == word
    writer.write("é".encode()[:1] + b"")
    writer.close()
    assert list(pieces) == ["\N{REPLACEMENT CHARACTER}"]


def test_a_fast_writer_has_to_wait(pipe):
    pieces, writer = pipe
    os.set_blocking(writer.fileno(), False)
    written = 0
    while count := writer.write(b"x" * 4096):
        written += count
    assert len(next(pieces)) == PIECE_BYTES
    assert not writer.write(b"x" * 4096)
    writer.close()
    assert sum(map(len, pieces)) == written - PIECE_BYTES
