"""Where text comes from: the held-out rule, reading in pieces, starting over."""

import hashlib
import io
from itertools import islice

import pytest

from sinkattn.evaluate import text
from sinkattn.evaluate.text import Pipe, StandardLibrary, TextError, TextFile, TokenStream, is_held_out


class ByteTokenizer:
    """One token per byte, from 1 on; 0 is the start token."""

    bos_token_id = 0

    def __call__(self, piece, *, add_special_tokens, split_special_tokens, verbose):
        assert (add_special_tokens, split_special_tokens, verbose) == (False, True, False)
        return type("Encoding", (), {"input_ids": [byte + 1 for byte in piece.encode()]})


class NoStart(ByteTokenizer):
    bos_token_id = None


# Fixed once and for all: the shipped model has not been trained on the first two.
@pytest.mark.parametrize(
    ("path", "held_out"),
    [("traceback.py", True), ("dbm/__init__.py", True), ("argparse.py", False), ("asyncio/tasks.py", False)],
)
def test_held_out_rule(path, held_out):
    assert is_held_out(path) is held_out
    assert held_out == (int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20 == 0)


def write(root, name, content: bytes):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_standard_library_streams_held_out_files_in_hash_order(tmp_path):
    names = [f"package/m{i}.py" for i in range(200)]
    held_out = [name for name in names if is_held_out(name)]
    assert len(held_out) > 3
    for name in names:
        write(tmp_path, name, f"# {name}\n".encode())
    write(tmp_path, held_out[0], b"\xff\n")
    for i in range(200):
        write(tmp_path, f"site-packages/m{i}.py", b"# installed\n")
    library = StandardLibrary(tmp_path)
    assert library.names == sorted(held_out, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    expected = [f"# {name}\n" for name in library.names if name != held_out[0]]
    assert list(library.pieces()) == expected


def test_this_standard_library_has_enough_text():
    library = StandardLibrary()
    assert all(is_held_out(name) for name in library.names)
    assert len("".join(islice(library.pieces(), 5))) > 1000


def test_standard_library_without_sources(tmp_path):
    with pytest.raises(TextError, match=r"without the sources .*--text FILE"):
        StandardLibrary(tmp_path)


LONG_LINES = "".join(f"line {i}\n" for i in range(3000)) + "x" * 40_000 + "\nend é without newline"


@pytest.fixture
def long_file(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(LONG_LINES, encoding="utf-8")
    return path


def test_pieces_are_the_whole_text_and_short(long_file):
    pieces = list(TextFile(long_file).pieces())
    assert "".join(pieces) == LONG_LINES
    assert max(map(len, pieces)) <= 2 * text.PIECE_CHARACTERS
    assert pieces[0].endswith("\n")


def test_missing_file_and_other_encoding(tmp_path):
    with pytest.raises(TextError, match=r"text: cannot read .*nothing\.txt: No such file"):
        TextFile(tmp_path / "nothing.txt")
    write(tmp_path, "latin.txt", b"caf\xe9\n")
    with pytest.raises(TextError, match=r"text: .*latin\.txt is not UTF-8"):
        list(TextFile(tmp_path / "latin.txt").pieces())


def test_pipe_is_read_once_lazily_and_can_be_read_again():
    source = io.StringIO(LONG_LINES)
    pipe = Pipe(source)
    first = next(pipe.pieces())
    assert source.tell() == len(first), "no more is read than is asked for"
    half_way = list(islice(pipe.pieces(), 3))
    assert half_way[0] == first
    assert "".join(pipe.pieces()) == LONG_LINES
    assert "".join(pipe.pieces()) == LONG_LINES


def test_stream_begins_with_the_start_token_and_starts_over_without_it():
    stream = TokenStream(Pipe(io.StringIO("<s>")), ByteTokenizer())
    ids = [byte + 1 for byte in b"<s>"]
    assert list(islice(stream, 4)) == [0, *ids]
    assert stream.restarts == 0
    assert list(islice(stream, 11)) == [0, *ids, *ids, *ids, ids[0]]
    assert stream.restarts == 3
    assert list(islice(stream, 2)) == [0, ids[0]]
    assert stream.restarts == 3


def test_stream_without_start_token():
    stream = TokenStream(Pipe(io.StringIO("ab")), NoStart())
    assert stream.start_token is None
    assert list(islice(stream, 3)) == [98, 99, 98]


def test_empty_text():
    with pytest.raises(TextError, match="text: stdin is empty"):
        list(islice(TokenStream(Pipe(io.StringIO("")), ByteTokenizer()), 2))


def test_text_is_never_held_as_a_whole(tmp_path):
    """An endless source gives tokens at once."""

    class Endless(io.TextIOBase):
        def read(self, size):
            return "x" * size

        def readline(self, size):
            return "x" * size

    assert len(list(islice(TokenStream(Pipe(Endless()), ByteTokenizer()), 50_000))) == 50_000


def test_a_text_may_be_read_once(tmp_path):
    write(tmp_path, "a.txt", b"abc")
    stream = TokenStream(TextFile(tmp_path / "a.txt"), ByteTokenizer())
    assert list(stream.once()) == [0, 98, 99, 100]
    assert list(islice(stream, 5)) == [0, 98, 99, 100, 98]
    assert stream.restarts == 1
    write(tmp_path, "empty.txt", b"")
    with pytest.raises(TextError, match=r"text: empty.txt is empty"):
        list(TokenStream(TextFile(tmp_path / "empty.txt"), ByteTokenizer()).once())


def test_a_feed_is_read_as_it_comes_and_not_kept():
    class Source(io.StringIO):
        read_so_far = 0

        def read(self, size):
            self.read_so_far += size
            return super().read(size)

    source = Source("a line\n" * 1000)
    pieces = text.Feed(source).pieces()
    first = next(pieces)
    assert source.read_so_far == text.FEED_CHARACTERS <= len(first) < text.FEED_CHARACTERS + 7
    assert first.endswith("\n")
    assert first + "".join(pieces) == "a line\n" * 1000
    assert list(text.Feed(source).pieces()) == []
    with pytest.raises(TextError, match="stdin is not UTF-8"):
        list(text.Feed(io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8")).pieces())
